"""The parts of `export.client` and `export.embed`."""
