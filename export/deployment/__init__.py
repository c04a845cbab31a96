"""The parts of `python -m export.deploy`."""
