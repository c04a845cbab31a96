"""Checks that a run's flags suit its dataset and its devices."""

from clsa_tf import methods
from clsa_tf.distributed.strategy import is_accelerated
from clsa_tf.errors import UserError


def check_needs(config, source):
    """Raises `UserError` unless the source has what the method needs."""
    method_class = methods.load(config.method).METHOD
    if method_class.needs_index and not source.random_access:
        raise UserError(
            f"Expected images that have a number each for --method="
            f"{config.method}, received {source.name}, which is read as a "
            "stream; use a folder, array_record files or a smaller dataset."
        )
    if method_class.needs_label and not source.class_names:
        raise UserError(
            f"Expected labels for --method={config.method}, received "
            f"{source.name} without any: {source.unlabelled}; train on a "
            "labelled dataset."
        )


def check_batch(config, size, strategy):
    """Raises `UserError` unless the batch suits the dataset and replicas."""
    replicas = strategy.num_replicas_in_sync
    if config.batch_size > size:
        raise UserError(
            f"Expected a batch no larger than the dataset of {size} images, "
            f"received --batch_size={config.batch_size}; lower it."
        )
    parts = replicas * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            "Expected a batch that divides among the replicas and micro-"
            f"batches, received --batch_size={config.batch_size} for "
            f"{replicas} replica(s) and --accumulation_steps="
            f"{config.accumulation_steps}; change one."
        )
    if config.batch_norm == "split" and config.batch_norm_splits % parts:
        raise UserError(
            "Expected --batch_norm_splits of the global batch that divide "
            "among the replicas and micro-batches, received "
            f"{config.batch_norm_splits} for {replicas} replica(s) and "
            f"--accumulation_steps={config.accumulation_steps}; change one."
        )
    if replicas == 1:
        return
    if config.batch_norm == "sync" and config.accumulation_steps > 1:
        raise UserError(
            "Expected --batch_norm=local or split with --accumulation_steps on "
            "several replicas, which cannot share the statistics of a micro-"
            "batch, received sync; change one."
        )
    if config.jit_compile and not is_accelerated(strategy):
        raise UserError(
            "Expected one replica, GPUs or TPUs with --jit_compile, received "
            f"{replicas} CPUs, between which XLA cannot compile an exchange; "
            "leave it out."
        )
