"""An encoder as the backbone of a KerasCV detector (RetinaNet).

    python examples/keras_cv_detector.py --encoder=runs/quickstart \\
        --images=photos

`--encoder` is what `clsa_tf.load_encoder` takes: a run, an export, or a file
`encoder.keras`. So that it runs without annotations, `scenes` makes them: it
pastes images of a labelled folder (one folder per class) somewhere on noise,
and the detector has to find and name them. Replace it by what reads your own
boxes; nothing else has to change.

The feature pyramid is built on the outputs of the encoder's last three stages,
whose weights are trained with the rest. Prints the loss per epoch and, for
some scenes, the surest box beside the true one. (What KerasCV 0.9 prints as
`percent_boxes_matched_with_anchor` is 0 where all boxes are matched.) The
detector's weights are written to `--output`.
"""

import argparse

from clsa_tf.terminal import console

# Before TensorFlow is imported, which chooses then what it prints, and which
# Keras it has. A program that wants all of its log leaves the call out.
console.quieten()

import keras_cv
import numpy as np
import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf.api import load

BOXES = "xyxy"  # left, top, right, bottom in px


def scenes(folder, *, count, size, seed):
    """Makes images with one labelled box each.

    Returns:
        images float32 `[count, size, size, 3]` in 0..255, a dictionary of
        `boxes` `[count, 1, 4]` and `classes` `[count, 1]`, and class names.
    """
    photos = keras.utils.image_dataset_from_directory(
        folder,
        image_size=(size // 2, size // 2),
        crop_to_aspect_ratio=True,
        batch_size=None,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, [count, size, size, 3]).astype(np.float32)
    boxes = np.zeros([count, 1, 4], np.float32)
    classes = np.zeros([count, 1], np.float32)
    for i, (photo, label) in enumerate(photos.repeat().take(count)):
        side = int(rng.integers(size // 4, size // 2 + 1))
        top, left = rng.integers(0, size - side + 1, 2)
        pasted = tf.image.resize(photo, [side, side], antialias=True)
        images[i, top : top + side, left : left + side] = pasted
        boxes[i, 0] = left, top, left + side, top + side
        classes[i, 0] = label
    return images, {"boxes": boxes, "classes": classes}, photos.class_names


def backbone(encoder):
    """The encoder as KerasCV wants it: with names for its pyramid's levels."""
    stages = load.stages(encoder)
    model = keras_cv.models.Backbone(
        inputs=encoder.input, outputs=encoder.get_layer(stages[-1]).output
    )
    # (Called so whatever their strides are.)
    model.pyramid_level_inputs = dict(zip(("P3", "P4", "P5"), stages[1:]))
    return model


def detector(encoder, *, classes, size, rate):
    """RetinaNet on the encoder, compiled, for images `[N, size, size, 3]`."""
    trunk = backbone(encoder)
    coarsest = size // trunk.compute_output_shape([1, size, size, 3])[1]
    strides = [coarsest // 4 * 2**i for i in range(5)]  # of P3 to P7
    model = keras_cv.models.RetinaNet(
        backbone=trunk,
        num_classes=classes,
        bounding_box_format=BOXES,
        # KerasCV's default, except that it supposes strides from 8 px on.
        anchor_generator=keras_cv.layers.AnchorGenerator(
            bounding_box_format=BOXES,
            sizes=[4.0 * stride for stride in strides],
            aspect_ratios=[0.5, 1.0, 2.0],
            scales=[2**x for x in (0, 1 / 3, 2 / 3)],
            strides=strides,
            clip_boxes=True,
        ),
        # Likewise, except that less sure boxes are shown, too.
        prediction_decoder=keras_cv.layers.NonMaxSuppression(
            bounding_box_format=BOXES,
            from_logits=True,
            confidence_threshold=0.05,
        ),
    )
    model.compile(
        # Detectors are sensitive to single large gradients.
        optimizer=keras.optimizers.Adam(rate, global_clipnorm=10.0),
        box_loss="smoothl1",
        classification_loss="focal",
        jit_compile=False,
    )
    return model


def said(boxes, row, names):
    """The first box of an image in words."""
    name, box = int(boxes["classes"][row, 0]), boxes["boxes"][row, 0]
    if name < 0:  # what rows without boxes are filled with
        return "nothing"
    return f"{names[name]} at {[int(x) for x in box]}"


def main(arguments):
    """Trains a detector and shows what it finds."""
    keras.utils.set_random_seed(0)
    size = arguments.image_size
    images, labels, names = scenes(
        arguments.images, count=arguments.scenes, size=size, seed=0
    )
    encoder = clsa_tf.load_encoder(arguments.encoder)
    model = detector(
        encoder, classes=len(names), size=size, rate=arguments.rate
    )
    batches = tf.data.Dataset.from_tensor_slices((images, labels))
    batches = batches.shuffle(len(images), seed=0).batch(arguments.batch_size)
    model.fit(batches, epochs=arguments.epochs, verbose=2)

    images, labels, _ = scenes(arguments.images, count=4, size=size, seed=1)
    found = model.predict(images, verbose=0)
    for i in range(len(images)):
        print("true: ", said(labels, i, names), "found:", said(found, i, names))
    model.save_weights(arguments.output)
    print(f"written to {arguments.output}")


def parse():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", required=True, help="what was pretrained")
    add("--images", required=True, help="folder with a folder per class")
    add("--output", default="detector.weights.h5", help="file to write")
    add("--epochs", type=int, default=10, help="passes over the scenes")
    add("--scenes", type=int, default=64, help="images to make")
    add("--batch_size", type=int, default=8, help="scenes per step")
    add("--image_size", type=int, default=128, help="side in px, of 32s")
    add("--rate", type=float, default=3e-4, help="learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
