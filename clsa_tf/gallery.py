"""Shows what training images are made into, on one sheet.

    python -m clsa_tf.gallery --flagfile=clsa --dataset=folder:/photos \\
        --output=views.png

Takes the flags of a training and draws its first images, each of their views,
and what every strong operation does. Nothing of a run is read or written.
"""

import os

from absl import flags

import clsa_tf.config
from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.options.flags import define_path, require
from clsa_tf.plots.views import gallery
from clsa_tf.terminal import progress


def check_output(path):
    """Raises `UserError` unless `path` can become a PNG file."""
    try:
        if not path.endswith(".png") or os.path.isdir(path):
            raise UserError(
                f"Expected an --output that is a .png file, received {path!r}; "
                "choose another name."
            )
        with open(path + ".tmp", "wb"):
            pass
        os.remove(path + ".tmp")
    except OSError as e:
        raise UserError(
            "Expected an --output in a directory that exists and can be "
            f"written, received {path!r} ({e.strerror}); create it or choose "
            "another."
        ) from e


def define_flags(flag_values):
    """Defines this command's flags: those of a training, and two more."""
    define_path("output", None, "PNG file to write", flag_values)
    flags.DEFINE_integer(
        "images",
        6,
        "images to show, in 1..64; of fewer in the dataset, all",
        lower_bound=1,
        upper_bound=64,
        flag_values=flag_values,
    )
    require(flag_values, "output")
    clsa_tf.config.define_flags(flag_values)


def main():
    """Reads the flags, draws and prints the path."""
    values = flags.FLAGS
    check_output(values.output)
    config = clsa_tf.config.from_flags()
    with progress.waiting("drawing views"):
        gallery(config, values.output, images=values.images)
    print(values.output)


if __name__ == "__main__":
    launch.launch(main, define_flags)
