"""From a trained run to SavedModels that are served."""

# Chooses Keras 2, before anything imports TensorFlow.
import clsa_tf  # noqa: F401
