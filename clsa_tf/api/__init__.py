"""What `import clsa_tf` offers."""
