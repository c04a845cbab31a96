"""Warns, at the start of a run, of settings that do harm there."""

import math

from clsa_tf import methods
from clsa_tf.methods.momentum import keys_per_step
from clsa_tf.options.fields import AUTO
from clsa_tf.training.auto import (
    IMAGES_PER_KEY,
    IMAGES_PER_PART,
    LEAST_MOMENTUM,
)

# Thresholds of the warnings.
FEW_STEPS = 1000  # a run with fewer steps is short
# Share of the initial weights in the momentum encoder at the end of a run.
INITIAL_SHARE = 0.05
BANK_PER_NEIGHBOUR = 10  # images in the bank per neighbour that votes
# A CPU is too slow for views of this size (px) with a network of this width.
PROCESSOR_SIZE, PROCESSOR_WIDTH = 96, 0.5


def advice(config, *, images, replicas, bank=None, accelerated=True):
    """Lists settings that do harm with this dataset on these devices.

    The run is possible with all of them.

    Args:
        config: `clsa_tf.config.Config`, resolved.
        images: N, number of training images.
        replicas: R, number of devices that share each batch.
        bank: number of images that the kNN evaluation takes neighbours from;
            None: the training images; 0: there is no evaluation.
        accelerated: whether the replicas are GPUs or TPUs.

    Returns:
        list of sentences, each with a remedy.
    """
    checks = (
        "" if accelerated else _on_processor(config),
        _on_batch_norm(config, replicas),
        _on_queue(config, images),
        _on_momentum(config, images),
        _on_steps(config, images),
        _on_neighbours(config, images if bank is None else bank),
    )
    own = methods.class_of(config).advice(config)
    return [sentence for sentence in (*checks, *own) if sentence]


def _on_processor(config):
    views = methods.class_of(config).views(config.options)
    size = max(view.size for view in views)
    if size < PROCESSOR_SIZE or config.width < PROCESSOR_WIDTH:
        return ""
    return (
        f"without a GPU or TPU, a step of {config.backbone} on "
        f"{config.batch_size} images of {size} px takes minutes; on a CPU use "
        "a small network and small views, as in --flagfile=photos"
    )


def _on_batch_norm(config, replicas):
    parts = replicas * config.accumulation_steps
    if config.batch_norm == "split":
        parts = config.batch_norm_splits
    whole = parts == 1 or config.batch_norm == "sync"
    wanted = methods.class_of(config).batch_statistics
    if wanted == "parts" and whole:
        return (
            f"--batch_norm={config.batch_norm} on {replicas} device(s) "
            "normalises a query and its key with statistics of the same "
            "images, so that a network can recognise the batch instead of the "
            "image; use --batch_norm=split with a --batch_size that is a "
            f"multiple of {2 * IMAGES_PER_PART}"
        )
    if wanted == "whole" and not whole and config.accumulation_steps == 1:
        return (
            f"--batch_norm={config.batch_norm} uses statistics of {parts} "
            f"parts of the batch, but {config.method} is published with "
            "statistics of the whole batch; use --batch_norm=sync"
        )
    return ""


def _on_queue(config, images):
    size = getattr(config.options, "queue_size", 0)
    if size <= images:
        return ""
    return (
        f"--queue_size={size} is larger than the dataset of {images:,} "
        f"images: {size / images:.3g} keys of every query's own image are "
        f"among its negatives; use --queue_size={AUTO}, or at most "
        f"{max(images // IMAGES_PER_KEY, keys_per_step(config))}"
    )


def _on_momentum(config, images):
    m = getattr(config.options, "key_momentum", 0.0)
    steps = config.total_steps(images)
    if m <= LEAST_MOMENTUM:
        return ""
    # With the cosine schedule, which ends at 1, 1 - m is half on average.
    schedule = getattr(config.options, "key_momentum_schedule", "constant")
    half = schedule == "cosine"
    left = m ** (steps / 2 if half else steps)
    if left <= INITIAL_SHARE:
        return ""
    return (
        f"--key_momentum={m} leaves {left:.0%} of its initial weights in the "
        f"momentum encoder after all {steps:,} steps; use --key_momentum="
        f"{AUTO}, or train for longer"
    )


def _on_steps(config, images):
    steps = config.total_steps(images)
    if steps >= FEW_STEPS:
        return ""
    epochs = math.ceil(FEW_STEPS / config.steps_per_epoch(images))
    return (
        f"{steps:,} steps are few: raise --total_epochs to {epochs} or more, "
        "or lower --batch_size"
    )


def _on_neighbours(config, bank):
    bank = min(bank, config.knn_bank)
    if (
        not (bank and config.knn_epochs)
        or config.knn_k * BANK_PER_NEIGHBOUR <= bank
    ):
        return ""
    return (
        f"--knn_k={config.knn_k} of {bank:,} images vote in the kNN "
        "evaluation, distant ones too; use about --knn_k="
        f"{max(1, bank // BANK_PER_NEIGHBOUR // 5)}"
    )
