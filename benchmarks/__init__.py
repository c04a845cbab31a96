"""What the speed and the bytes of `clsa_tf` are compared with."""

# Chooses Keras 2, before anything imports TensorFlow.
import clsa_tf  # noqa: F401
