"""Export trained encoders as SavedModels and serve them."""

# Selects Keras 2 and the log level before any module imports TensorFlow.
import clsa_tf  # noqa: F401
