"""Trains a few steps on R replicas, until the end or a signal.

`python -m tests.resized CASE PHOTOS WORKDIR R` is a process of its own, because
the number of devices is fixed at the start. The same command with another
number of replicas resumes the run. `CASE` is one of `replicas.CASES`.
"""

import pathlib
import sys

import tensorflow as tf

from clsa_tf import train
from clsa_tf.errors import Stopped
from tests import replicas, runs, tiny


def main(case, photos, workdir, count):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    replicas.make_activations_smooth()
    runs.leave_out_pictures(pathlib.Path(workdir))
    config = tiny.config(
        backbone="one_block",
        dataset=f"folder:{photos}",
        labels="none",
        workdir=workdir,
        strategy="mirrored" if count > 1 else "one",
        base_lr=0.03,
        total_epochs=2,
        log_steps=1,
        checkpoint_steps=1,
        **replicas.CASES[case],
    )
    run_or_exit(config)


def run_or_exit(config):
    """Trains; exits with the command's status after a signal."""
    try:
        train.run(config)
    except Stopped as e:
        sys.exit(128 + e.signal)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
