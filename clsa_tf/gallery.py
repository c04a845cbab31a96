"""Draws training images, their views and the strong operations on one sheet.

    python -m clsa_tf.gallery --flagfile=clsa --dataset=folder:/photos \\
        --output=views.png

Takes the flags of a run and draws its first images, each of their views, and
the effect of every strong operation. It neither reads nor writes files of a
run.
"""

import os
import tempfile

from absl import flags

import clsa_tf.config
from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.options.flags import define_path, require
from clsa_tf.plots.views import gallery
from clsa_tf.terminal import progress


def check_output(path):
    """Raises `UserError` unless a PNG file can be written to `path`."""
    try:
        if not path.endswith(".png") or os.path.isdir(path):
            raise UserError(
                f"Expected an --output that is a .png file, received {path!r}; "
                "choose another name."
            )
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
            pass
    except OSError as e:
        raise UserError(
            "Expected an --output in a directory that exists and can be "
            f"written, received {path!r} ({e.strerror}); create it or choose "
            "another."
        ) from e


def define_flags(flag_values):
    """Defines this command's flags: those of a run, --output and --images."""
    define_path("output", None, "PNG file to write", flag_values)
    flags.DEFINE_integer(
        "images",
        6,
        "number of images to show, in 1..64; at most all images of the dataset",
        lower_bound=1,
        upper_bound=64,
        flag_values=flag_values,
    )
    require(flag_values, "output")
    clsa_tf.config.define_flags(flag_values)


def main():
    """Reads the flags, draws the sheet and prints its path."""
    values = flags.FLAGS
    check_output(values.output)
    config = clsa_tf.config.from_flags()
    with progress.waiting("drawing views"):
        gallery(config, values.output, images=values.images)
    print(values.output)


if __name__ == "__main__":
    launch.launch(main, define_flags)
