"""From a trained run to SavedModels that are served."""

# Chooses Keras 2 and what is printed, before anything imports TensorFlow.
import clsa_tf  # noqa: F401
