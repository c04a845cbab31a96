"""The parts of the embedded server, `python -m export.server`."""
