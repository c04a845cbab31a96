"""Pretrains on a folder of images from Python, then finds similar images.

    python examples/pretrain.py --images=photos --workdir=runs/photos

The images need no labels. The same command resumes an interrupted run. The
settings are for a small network on small images, on a CPU. Queue size and
momentum are chosen from the number of images and steps. Any flag of
`python -m clsa_tf.train` can be passed to `clsa_tf.pretrain` in the same way.
"""

import argparse
import os
import sys

import clsa_tf

# Import clsa_tf before TensorFlow: it selects Keras 2. `quieten` hides harmless
# messages of TensorFlow; omit it to see the whole log.
clsa_tf.quieten()
# Take the memory of a GPU as needed. Otherwise TensorFlow takes all of it.
clsa_tf.share_gpus()

import numpy as np
import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


def pretrain(arguments):
    """Pretrains; returns the encoder, a functional Keras model."""
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
    """Reads the images that TensorFlow decodes.

    Unreadable files are skipped, as in training. (Training also reads WebP,
    TIFF and HEIC files and applies the EXIF orientation. So does
    `python -m export.embed`.)

    Returns:
        (images float32 `[N, S, S, 3]` in 0..255, list of their paths).

    Raises:
        UserError: no image can be decoded.
    """
    images, paths = [], []
    for path in files(folder):
        try:
            image = tf.io.decode_image(
                tf.io.read_file(path), channels=3, expand_animations=False
            )
        except tf.errors.OpError:
            print(f"skipped, because it cannot be read: {path}")
            continue
        images.append(
            keras.preprocessing.image.smart_resize(image, [image_size] * 2)
        )
        paths.append(path)
    if not images:
        raise UserError(
            f"Expected images that TensorFlow can decode in {folder}, received "
            "none; use `python -m export.embed`, which reads other formats."
        )
    return np.stack(images), paths


def files(folder):
    """Sorted paths of the images in a folder and its subfolders."""
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
    """Pretrains, then prints the nearest neighbours of some images."""
    encoder = pretrain(arguments)
    images, paths = read(arguments.images, image_size=arguments.image_size)
    features = encoder.predict(images, verbose=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1.0)  # excludes the image itself
    for i in range(0, len(paths), -(-len(paths) // 5)):
        near = cosines[i].argmax()
        print(f"{paths[i]} is most like {paths[near]} ({cosines[i, near]:.3f})")


def parse():
    """Parses the command line."""
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
    add("--workdir", required=True, help="directory of the run")
    add("--epochs", type=int, default=20, help="epochs to train")
    add("--batch_size", type=int, default=32, help="images per step")
    add("--image_size", type=int, default=48, help="side of the views, in px")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
