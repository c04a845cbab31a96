"""Benchmarks of `clsa_tf`, and a reference implementation of the views."""

# Selects Keras 2 before TensorFlow is imported.
from clsa_tf.terminal import console

# Benchmarks start processes, which need some of a GPU's memory, too.
console.share_gpus()
