"""Fine-tunes a pretrained encoder on a folder of labelled images.

    python examples/finetune.py --encoder=runs/quickstart --images=photos

`--encoder` is a run, an export, or a file `encoder.keras`, as for
`clsa_tf.load_encoder`. `--images` contains one folder per class. The program
prints accuracies on a fifth of the images, which is held out of training:

* of a linear classifier on the frozen encoder,
* after fine-tuning encoder and classifier,
* of the same network trained from scratch for as many epochs.

It writes the classifier to `--output`. Keras loads it without clsa_tf:

    model = keras.models.load_model("classifier.keras")
    model.predict(images)  # RGB in 0..255; probabilities of the classes
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

import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import UserError, first_line


def read(folder, *, image_size, batch_size):
    """Reads labelled images.

    Returns:
        (training dataset, test dataset, class names). The datasets yield images
        float32 `[N, S, S, 3]` in 0..255 and labels int32 `[N]`.

    Raises:
        UserError: the folder does not contain a folder of images per class.
    """
    try:
        train, test = keras.utils.image_dataset_from_directory(
            folder,
            validation_split=0.2,
            subset="both",
            seed=0,
            image_size=(image_size, image_size),
            crop_to_aspect_ratio=True,
            batch_size=batch_size,
        )
    except (ValueError, tf.errors.OpError) as e:
        raise UserError(
            f"Expected --images with one folder of images per class, received "
            f"{folder} ({first_line(e).rstrip('.')}); use another folder."
        ) from e
    names = train.class_names
    flip = keras.layers.RandomFlip("horizontal", seed=0)
    train = train.map(lambda x, y: (flip(x, training=True), y))
    return train.prefetch(2), test.prefetch(2), names


def classifier(encoder, classes):
    """A linear classifier on the encoder's features."""
    return keras.Sequential(
        [
            encoder,
            # Normalised features, so that one learning rate fits all.
            keras.layers.LayerNormalization(center=False, scale=False),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )


def fit(model, train, *, epochs, rate):
    """Trains the trainable weights."""
    # Compile again: Keras reads `trainable` when it compiles.
    model.compile(
        keras.optimizers.Adam(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(train, epochs=epochs, verbose=2)


def show(name, model, test):
    """Prints the accuracy on the held-out images."""
    _, accuracy = model.evaluate(test, verbose=0)
    print(f"accuracy, {name:<28} {accuracy:6.1%}", flush=True)


def main(arguments):
    """Trains the three classifiers and prints their accuracies."""
    keras.utils.set_random_seed(0)
    encoder = clsa_tf.load_encoder(arguments.encoder)
    size = arguments.image_size or clsa_tf.image_size(arguments.encoder)
    if not size:
        raise SystemExit(
            f"Expected --image_size, because {arguments.encoder} contains no "
            "image size; add the side of the images in px."
        )
    print(f"images of {size} x {size} px")
    train, test, names = read(
        arguments.images, image_size=size, batch_size=arguments.batch_size
    )
    scratch = keras.models.clone_model(encoder)  # with initial weights

    # Train only the classifier first. Its first steps would send large, random
    # gradients through the pretrained weights.
    encoder.trainable = False
    model = classifier(encoder, len(names))
    fit(model, train, epochs=arguments.epochs, rate=arguments.probe_rate)
    show("linear classifier", model, test)
    encoder.trainable = True
    fit(model, train, epochs=arguments.epochs, rate=arguments.rate)
    show("fine-tuned", model, test)
    model.save(arguments.output)

    model = classifier(scratch, len(names))
    fit(model, train, epochs=2 * arguments.epochs, rate=arguments.rate)
    show("from scratch", model, test)
    print(f"classes {', '.join(names)}; written to {arguments.output}")


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", required=True, help="run, export or encoder.keras")
    add(
        "--images",
        required=True,
        type=os.path.expanduser,
        help="folder with one folder of images per class",
    )
    add("--output", default="classifier.keras", help="file to write")
    add("--epochs", type=int, default=5, help="epochs of each phase")
    add("--batch_size", type=int, default=32, help="images per step")
    add(
        "--image_size",
        type=int,
        help="side of the images, in px; default: that of the encoder",
    )
    add(
        "--probe_rate",
        type=float,
        default=1e-2,
        help="learning rate of the linear classifier",
    )
    add(
        "--rate",
        type=float,
        default=1e-3,
        help="learning rate of the whole network",
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
