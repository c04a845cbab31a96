"""Files of one stack, read by another, in two processes.

python -m tests.stacks write DIR      a run, its export, a file for Keras
python -m tests.stacks read DIR FILE  their outputs, to FILE (.npz)
python -m tests.stacks views DIR FILE views of a folder of photographs
"""

import pathlib
import sys

import numpy as np
import tensorflow as tf

import clsa_tf
from clsa_tf.augment.views import View
from clsa_tf.data.open import open_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.unreadable import UnreadableImages
from export import formats
from tests import exports

IMAGES = exports.noise(4)


def write(directory):
    """Writes `run`, `run/export/1` and `keras` into a directory."""
    made = exports.make(directory / "run")
    formats.export(
        str(made.workdir), str(directory / "keras"), formats=["keras"]
    )


def read(directory):
    """Computes the outputs of each written model for `IMAGES`.

    Returns:
        dictionary of arrays float32 `[4, F]`.
    """
    version = directory / "run" / "export" / "1"
    served = tf.saved_model.load(str(version)).signatures["images_uint8"]
    plain = tf.keras.models.load_model(directory / "keras" / "encoder.keras")
    return {
        "served": served(images=IMAGES)["embedding"],
        "plain_keras": plain(np.float32(IMAGES))["embedding"],
        **{
            name: clsa_tf.load_encoder(directory / path)(IMAGES)
            for name, path in {
                "run": "run",
                "export": "run/export/1",
                "keras": "keras/encoder.keras",
            }.items()
        },
    }


def views(photos):
    """Views of 48 photographs of a folder, uint8, by their names."""
    batches = training_batches(
        open_source(f"folder:{photos}"),
        (
            View("weak", 24, 0.2, 1.0),
            View("strong", 16, 0.2, 1.0, strong_ops=5),
        ),
        batch_size=48,
        seed=0,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.0),
    )
    batch = next(iter(batches))
    return {name: batch[name] for name in ("weak", "strong")}


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "write":
        write(pathlib.Path(paths[0]))
    else:
        made = {"read": read, "views": views}[command](pathlib.Path(paths[0]))
        np.savez(paths[1], **made)
