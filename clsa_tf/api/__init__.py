"""Functions that `import clsa_tf` offers."""
