"""Training runs: loop, checkpoints, metrics, evaluation during training."""
