"""Pretrains on a folder of images from Python, and looks for similar ones.

    python examples/pretrain.py --images=photos --workdir=runs/photos

The images need no labels. The same command again goes on where it stopped.
Settings are those of a small network on small images, for a CPU; queue and
momentum follow from the number of images and steps. Any flag of
`python -m clsa_tf.train` can be set in the same way.
"""

import argparse
import os
import sys

from clsa_tf.terminal import console

# Before TensorFlow is imported, which chooses then what it prints, and which
# Keras it has. A program that wants all of its log leaves the call out.
console.quieten()

import numpy as np
import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


def pretrain(arguments):
    """Returns the encoder, a functional Keras model."""
    size = arguments.image_size
    return clsa_tf.pretrain(
        arguments.images,
        workdir=arguments.workdir,
        total_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        backbone="resnet18",
        width=0.25,
        key_crop=f"{size}:0.3:1",
        query_crops=f"{size}:0.3:1",
        strong_crops=f"{size // 2}:0.2:0.8",
        image_size=size,
    )


def read(folder, *, image_size):
    """Images float32 `[N, S, S, 3]` in 0..255, and their paths.

    Files that cannot be read are left out, as they were in training. (That
    also reads WebP, TIFF and HEIC files, and turns photographs upright;
    `python -m export.embed` does the same and looks at all files.)
    """
    images, paths = [], []
    for path in files(folder):
        try:
            image = tf.io.decode_image(
                tf.io.read_file(path), channels=3, expand_animations=False
            )
        except tf.errors.OpError:
            print(f"left out, since it cannot be read: {path}")
            continue
        images.append(
            keras.preprocessing.image.smart_resize(image, [image_size] * 2)
        )
        paths.append(path)
    if not images:
        raise UserError(
            f"Expected images that TensorFlow decodes in {folder}, received "
            "none; `python -m export.embed` reads other kinds, too."
        )
    return np.stack(images), paths


def files(folder):
    """Paths of the images in a folder and those below it, in order."""
    paths = (
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
    )
    return sorted(
        path
        for path in paths
        if path.lower().endswith(ENDINGS) and os.path.isfile(path)
    )


def main(arguments):
    """Pretrains, then prints the nearest neighbour of some images."""
    encoder = pretrain(arguments)
    images, paths = read(arguments.images, image_size=arguments.image_size)
    features = encoder.predict(images, verbose=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1.0)  # other than itself
    for i in range(0, len(paths), -(-len(paths) // 5)):
        near = cosines[i].argmax()
        print(f"{paths[i]} is most like {paths[near]} ({cosines[i, near]:.3f})")


def parse():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--images",
        required=True,
        type=os.path.expanduser,
        help="folder of images",
    )
    add("--workdir", required=True, help="directory for the run")
    add("--epochs", type=int, default=20, help="passes over the images")
    add("--batch_size", type=int, default=32, help="images per step")
    add("--image_size", type=int, default=48, help="side, in px")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
