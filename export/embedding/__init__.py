"""What `export.client` and `export.embed` are made of."""
