"""Pretrains an image encoder without labels.

    python -m clsa_tf.train --flagfile=quickstart
    python -m clsa_tf.train --flagfile=photos --dataset=folder:/photos \\
        --workdir=runs/photos
    python -m clsa_tf.train --flagfile=clsa --dataset=folder:/photos \\
        --workdir=runs/photos

The first trains on small pictures that are drawn for it (minutes on a CPU), the
second on your own images with a small network (for a CPU), the third with that
of the paper (for GPUs). The same command again resumes where it stopped.
Everything that a run leaves is in --workdir; --flagfile=WORKDIR/run.flags
repeats it.
"""

from absl import flags

import clsa_tf.config
from clsa_tf.cli import launch, list_methods
from clsa_tf.errors import UserError
from clsa_tf.training.run import run


def define_flags(flag_values):
    """Defines this command's flags: those of a run, and one more."""
    clsa_tf.config.define_flags(flag_values)
    flags.DEFINE_bool(
        "list_methods",
        False,
        "print the methods with their recipes, and exit",
        flag_values,
    )


def check_told(config):
    """Raises `UserError` unless it was said on what to train, and where to."""
    missing = [
        f"--{name}"
        for name in ("dataset", "workdir")
        if not getattr(config, name)
    ]
    if missing:
        command = "\n    python -m clsa_tf.train --flagfile="
        raise UserError(
            f"Expected {' and '.join(missing)}, received none; type one of"
            f"{command}quickstart"
            f"{command}photos --dataset=folder:/photos --workdir=runs/photos"
            f"{command}clsa --dataset=folder:/photos --workdir=runs/photos"
            f"{command}clsa"
            "\nfor the embedded pictures (minutes on a CPU), a folder of your "
            "own on a CPU, the same on GPUs, or a prepared ImageNet; `--help` "
            "lists the flags."
        )


def main():
    """Reads the flags and trains."""
    if flags.FLAGS.list_methods:
        print(list_methods.describe())
        return
    config = clsa_tf.config.from_flags()
    check_told(config)
    run(config)


if __name__ == "__main__":
    launch.launch(main, define_flags)
