"""Checks that a run's flags suit its dataset and its devices."""

import tensorflow as tf

from clsa_tf import methods
from clsa_tf.data.source_checks import check_readable_elsewhere
from clsa_tf.distributed.collectives import num_loaders
from clsa_tf.distributed.strategy import is_accelerated
from clsa_tf.errors import UserError


def check_needs(config, source):
    """Raises `UserError` if the dataset lacks numbers or labels.

    Args:
        config: `clsa_tf.config.Config`.
        source: `Source` of the training images.
    """
    method_class = methods.class_of(config)
    if method_class.needs_index and not source.random_access:
        raise UserError(
            f"Expected numbered images for --method={config.method}, received "
            f"{source.name}, which is read as a stream; use a folder, "
            "array_record files or a smaller dataset."
        )
    if method_class.needs_label and not source.class_names:
        raise UserError(
            f"Expected labels for --method={config.method}, received "
            f"{source.name} without labels: {source.unlabelled}; train on a "
            "labelled dataset."
        )


def check_remote_hosts(config, source):
    """Raises `UserError` for images that a TPU's hosts cannot read.

    Args:
        config: `clsa_tf.config.Config` with the name of a TPU in `tpu`.
        source: `Source` of the training images.
    """
    if config.data_service:
        raise UserError(
            f"Expected no --data_service with --tpu={config.tpu}, whose hosts "
            f"read the images, received {config.data_service}; omit it, or "
            "train on a TPU VM with --tpu=local."
        )
    check_readable_elsewhere(
        source,
        "on the hosts of the TPU",
        "train on a TPU VM with --tpu=local",
    )


def check_batch(config, strategy):
    """Raises `UserError` if the batch does not fit the replicas.

    Args:
        config: `clsa_tf.config.Config`, resolved.
        strategy: `tf.distribute.Strategy`.
    """
    replicas = strategy.num_replicas_in_sync
    parts = replicas * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            "Expected --batch_size to be divisible by replicas x "
            f"--accumulation_steps, received --batch_size={config.batch_size} "
            f"for {replicas} replica(s) and --accumulation_steps="
            f"{config.accumulation_steps}; change one of them."
        )
    if config.batch_norm == "split" and config.batch_norm_splits % parts:
        raise UserError(
            "Expected --batch_norm_splits, parts of the global batch, to be "
            "divisible by replicas x --accumulation_steps, received "
            f"--batch_norm_splits={config.batch_norm_splits} for {replicas} "
            f"replica(s) and --accumulation_steps={config.accumulation_steps}; "
            "change one of them."
        )
    if replicas == 1:
        return
    if config.batch_norm == "sync" and config.accumulation_steps > 1:
        raise UserError(
            "Expected --batch_norm=local or split with --accumulation_steps on "
            "several replicas, received sync; change one of the two. Replicas "
            "cannot share the statistics of a micro-batch."
        )
    if config.jit_compile:
        _check_compiler(config, strategy)


def _check_compiler(config, strategy):
    """Raises `UserError` if XLA cannot compile what replicas exchange."""
    if not is_accelerated(strategy):
        raise UserError(
            "Expected one replica, GPUs or TPUs with --jit_compile, received "
            f"{strategy.num_replicas_in_sync} CPUs; omit --jit_compile. XLA "
            "cannot compile an exchange between CPUs."
        )
    loaders = num_loaders(strategy)
    views = methods.class_of(config).views(config.options)
    exchanged = config.batch_norm != "sync" and any(v.shuffle for v in views)
    on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    if loaders > 1 and exchanged and not on_tpu:
        raise UserError(
            "Expected --batch_norm=sync with --jit_compile on several machines "
            f"with GPUs, received --batch_norm={config.batch_norm} on {loaders}"
            " machines; change it or omit --jit_compile. XLA cannot compile "
            "the exchange of images between machines."
        )
