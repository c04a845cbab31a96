"""Evaluates a run, draws pictures and writes summary.json.

    python -m clsa_tf.report --workdir=runs/quickstart

Prints nearest-neighbour accuracies and the paths of the pictures. All files are
in the run's directory.
"""

import os

from absl import flags

from clsa_tf.cli import launch
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import shell
from clsa_tf.training.report import report, show


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path("workdir", None, "directory of the run", flag_values)
    define_path(
        "savedmodel",
        "",
        "path of the run's export, for the summary; empty: the newest in "
        "<workdir>/savedmodel",
        flag_values,
    )
    require(flag_values, "workdir")


def main():
    """Reads the flags, evaluates and prints."""
    values = flags.FLAGS
    summary = report(values.workdir, savedmodel=values.savedmodel)
    show(summary)
    if not summary["savedmodel"]:
        export = shell.of_module(
            "export.savedmodel",
            workdir=values.workdir,
            output=os.path.join(values.workdir, "savedmodel"),
        )
        print(f"to export the encoder, type\n  {export}")


if __name__ == "__main__":
    launch.launch(main, define_flags)
