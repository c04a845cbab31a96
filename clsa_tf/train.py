"""Pretrains an encoder: `python -m clsa_tf.train --flagfile=configs/clsa.flags`.

The same command again resumes where it stopped. Everything the run leaves is in
`--workdir`; `--flagfile=<workdir>/run.flags` repeats it.
"""

import os
import sys

import tensorflow as tf
from absl import flags
from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf import distribute, entry, methods, metrics, optimizer, report
from clsa_tf.callbacks import Log, Monitor, Save
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.data.faults import Faults
from clsa_tf.data.pipeline import check_sizes, training_batches
from clsa_tf.data.sources import open_source
from clsa_tf.errors import UserError
from clsa_tf.evaluation.monitor import KnnMonitor


def main():
    """Reads the flags and runs."""
    run(config_lib.from_flags())


def run(config):
    """Trains as `config` says until the last epoch, resuming if it was begun.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        the trained `Method`.

    Raises:
        UserError: something from outside was wrong; see its message.
    """
    # ---- Data
    source = open_training_source(config)
    views = methods.load(config.method).METHOD.views(config.options)
    check_sizes(source, views, allow_upscaling=config.allow_upscaling)
    if config.batch_size > source.size:
        raise UserError(
            f"Expected a batch no larger than the dataset of {source.size} "
            f"images, received --batch_size={config.batch_size}; lower it."
        )
    steps_per_epoch = source.size // config.batch_size
    faults = Faults(source.size, max_bad_share=config.max_bad_share)

    # ---- Where
    claim(config)

    # ---- What
    strategy = distribute.make_strategy(config.strategy)
    if config.batch_size % strategy.num_replicas_in_sync:
        raise UserError(
            "Expected a batch that the replicas can share, received "
            f"--batch_size={config.batch_size} for "
            f"{strategy.num_replicas_in_sync} replicas; round it."
        )
    schedule = optimizer.CosineByEpoch(
        config.base_lr * config.batch_size / 256,
        steps_per_epoch=steps_per_epoch,
        total_epochs=config.total_epochs,
    )
    with strategy.scope():
        method = make_method(config, schedule)
        checkpoints = Checkpoints(
            method,
            os.path.join(config.workdir, "checkpoints"),
            keep=config.keep_checkpoints,
        )

    # ---- From where
    step = checkpoints.restore()
    metrics.rewind(config.workdir, step)
    total_steps = config.total_epochs * steps_per_epoch
    announce(config, source, strategy, step, steps_per_epoch)

    # ---- Train
    log = Log(
        config.workdir,
        step,
        config=config,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        seconds=checkpoints.seconds,
    )
    callbacks = [log, Save(
        checkpoints,
        step,
        every=config.checkpoint_steps,
        steps_per_epoch=steps_per_epoch,
    )]
    return method
