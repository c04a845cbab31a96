"""Pretrains an image encoder without labels.

    python -m clsa_tf.train --flagfile=quickstart
    python -m clsa_tf.train --flagfile=photos --dataset=folder:/photos \\
        --workdir=runs/photos
    python -m clsa_tf.train --flagfile=clsa --dataset=folder:/photos \\
        --workdir=runs/photos

The first command trains on small pictures that the library draws (minutes on a
CPU), the second on your own images with a small network (for a CPU), the third
with the network of the paper (for GPUs). The same command resumes a run that
was stopped. All files of a run are in --workdir; --flagfile=WORKDIR/run.flags
repeats the run.
"""

from absl import flags

import clsa_tf.config
from clsa_tf.cli import launch, list_methods
from clsa_tf.errors import UserError
from clsa_tf.training.run import run


def define_flags(flag_values):
    """Defines this command's flags: those of a run and --list_methods."""
    clsa_tf.config.define_flags(flag_values)
    flags.DEFINE_bool(
        "list_methods",
        False,
        "print the methods with their recipes, and exit",
        flag_values,
    )


def check_required(config):
    """Raises `UserError` unless `--dataset` and `--workdir` are set."""
    missing = [
        f"--{name}"
        for name in ("dataset", "workdir")
        if not getattr(config, name)
    ]
    if missing:
        command = "\n    python -m clsa_tf.train --flagfile="
        raise UserError(
            f"Expected {' and '.join(missing)}, received none; use one of"
            f"{command}quickstart"
            f"{command}photos --dataset=folder:/photos --workdir=runs/photos"
            f"{command}clsa --dataset=folder:/photos --workdir=runs/photos"
            f"{command}clsa"
            "\nfor the embedded dataset (minutes on a CPU), your own folder "
            "on a CPU, your own folder on GPUs, or a prepared ImageNet; "
            "`--help` lists the flags."
        )


def main():
    """Reads the flags and trains."""
    if flags.FLAGS.list_methods:
        print(list_methods.describe())
        return
    config = clsa_tf.config.from_flags()
    check_required(config)
    run(config)


if __name__ == "__main__":
    launch.launch(main, define_flags)
