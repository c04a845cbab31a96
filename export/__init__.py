"""From a trained run to SavedModels that are served."""
