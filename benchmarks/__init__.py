"""Benchmarks of `clsa_tf`, and a reference implementation of the views."""

# Selects Keras 2 before TensorFlow is imported.
import clsa_tf  # noqa: F401
