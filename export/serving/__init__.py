"""The parts of the embedded server, `export.server`."""
