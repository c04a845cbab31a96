"""A run: training loop, checkpoints, metrics, evaluation while training."""
