# Chooses Keras 2, before anything imports TensorFlow.
import clsa_tf  # noqa: F401
