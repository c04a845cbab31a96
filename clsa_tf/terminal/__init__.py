"""A process and its terminal: log, signals, progress."""
