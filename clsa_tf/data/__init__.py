"""From a dataset to batches of views."""
