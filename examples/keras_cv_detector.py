"""Uses an encoder as the backbone of a KerasCV detector (RetinaNet).

    python examples/keras_cv_detector.py --encoder=runs/quickstart \\
        --images=photos

`--encoder` is a run, an export, or a file `encoder.keras`, as for
`clsa_tf.load_encoder`. The example needs no annotations: `scenes` pastes images
of a labelled folder (one folder per class) onto noise, and the detector has to
locate and classify them. To use your own boxes, replace `scenes` only.

The feature pyramid uses the outputs of the encoder's last three stages. All
weights are trained. The program prints the loss per epoch and, for some scenes,
the true box and the most confident one. (KerasCV 0.9 reports a
`percent_boxes_matched_with_anchor` of 0 if all boxes are matched.) It writes
the detector's weights to `--output`.
"""

import argparse

import clsa_tf

# Import clsa_tf before TensorFlow: it selects Keras 2. `quieten` hides harmless
# messages of TensorFlow; omit it to see the whole log.
clsa_tf.quieten()
# Take the memory of a GPU as needed. Otherwise TensorFlow takes all of it.
clsa_tf.share_gpus()

import keras_cv
import numpy as np
import tensorflow as tf
from tensorflow import keras

from clsa_tf.api import load

BOXES = "xyxy"  # left, top, right, bottom in px


def scenes(folder, *, count, size, seed):
    """Makes images with one labelled box each.

    Returns:
        (images, labels, class names): images float32 `[count, size, size, 3]`
        in 0..255; labels a dict of `boxes` float32 `[count, 1, 4]`, in px, and
        `classes` float32 `[count, 1]`.
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
    """The encoder as a KerasCV backbone, with names of the pyramid's levels."""
    stages = load.stages(encoder)
    model = keras_cv.models.Backbone(
        inputs=encoder.input, outputs=encoder.get_layer(stages[-1]).output
    )
    # KerasCV needs these names, whatever the strides are.
    model.pyramid_level_inputs = dict(zip(("P3", "P4", "P5"), stages[1:]))
    return model


def detector(encoder, *, classes, size, rate):
    """Compiled RetinaNet on the encoder, for images `[N, size, size, 3]`."""
    trunk = backbone(encoder)
    coarsest = size // trunk.compute_output_shape([1, size, size, 3])[1]
    strides = [coarsest // 4 * 2**i for i in range(5)]  # of P3 to P7
    model = keras_cv.models.RetinaNet(
        backbone=trunk,
        num_classes=classes,
        bounding_box_format=BOXES,
        # KerasCV's default assumes strides of 8 px and more.
        anchor_generator=keras_cv.layers.AnchorGenerator(
            bounding_box_format=BOXES,
            sizes=[4.0 * stride for stride in strides],
            aspect_ratios=[0.5, 1.0, 2.0],
            scales=[2**x for x in (0, 1 / 3, 2 / 3)],
            strides=strides,
            clip_boxes=True,
        ),
        # KerasCV's default, with a lower confidence threshold.
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


def described(boxes, row, names):
    """Describes the first box of an image."""
    name, box = int(boxes["classes"][row, 0]), boxes["boxes"][row, 0]
    if name < 0:  # padding of images without boxes
        return "nothing"
    return f"{names[name]} at {[int(x) for x in box]}"


def main(arguments):
    """Trains a detector and prints some predictions."""
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
        true, best = (described(x, i, names) for x in (labels, found))
        print("true: ", true, "found:", best)
    model.save_weights(arguments.output)
    print(f"written to {arguments.output}")


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", required=True, help="run, export or encoder.keras")
    add("--images", required=True, help="folder with one folder per class")
    add("--output", default="detector.weights.h5", help="file to write")
    add("--epochs", type=int, default=10, help="epochs to train")
    add("--scenes", type=int, default=64, help="number of scenes to make")
    add("--batch_size", type=int, default=8, help="scenes per step")
    add(
        "--image_size",
        type=int,
        default=128,
        help="side of the scenes in px, a multiple of 32",
    )
    add("--rate", type=float, default=3e-4, help="learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
