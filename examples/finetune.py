"""Fine-tunes a pretrained encoder on a folder of labelled images.

    python examples/finetune.py --encoder=runs/quickstart --images=photos

`--encoder` is what `clsa_tf.load_encoder` takes: a run, an export, or a file
`encoder.keras`. `--images` holds one folder per class. Prints the accuracy on
a fifth of the images that is kept out of training

* of a linear classifier on the frozen encoder,
* after fine-tuning both, and
* of the same network trained from scratch for as many epochs.

The classifier is written to `--output`; plain Keras loads it, without clsa_tf:

    model = keras.models.load_model("classifier.keras")
    model.predict(images)  # RGB in 0..255; probabilities of the classes
"""

import argparse
import os
import sys

from clsa_tf.terminal import console

# Before TensorFlow is imported, which chooses then what it prints, and which
# Keras it has. A program that wants all of its log leaves the call out.
console.quieten()

import tensorflow as tf
from tensorflow import keras

import clsa_tf
from clsa_tf.errors import UserError, first_line


def read(folder, *, image_size, batch_size):
    """Datasets (images float32 `[N, S, S, 3]` in 0..255, labels) and names."""
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
            f"Expected a folder of images per class in {folder}, received: "
            f"{first_line(e).rstrip('.')}; correct --images."
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
            # Of any encoder to the same scale, so that one rate fits all.
            keras.layers.LayerNormalization(center=False, scale=False),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )


def fit(model, train, *, epochs, rate):
    """Trains what is trainable."""
    # Compiled each time: Keras looks at `trainable` then.
    model.compile(
        keras.optimizers.Adam(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(train, epochs=epochs, verbose=2)


def show(name, model, test):
    """Prints the accuracy on images that were not trained on."""
    _, accuracy = model.evaluate(test, verbose=0)
    print(f"accuracy, {name:<28} {accuracy:6.1%}", flush=True)


def main(arguments):
    """Trains and compares."""
    keras.utils.set_random_seed(0)
    encoder = clsa_tf.load_encoder(arguments.encoder)
    size = arguments.image_size or clsa_tf.image_size(arguments.encoder)
    if not size:
        raise SystemExit(
            f"Expected --image_size, because {arguments.encoder} does not name "
            "the size that it was trained for; add the side in px."
        )
    print(f"images of {size} x {size} px")
    train, test, names = read(
        arguments.images, image_size=size, batch_size=arguments.batch_size
    )
    scratch = keras.models.clone_model(encoder)  # with initial weights

    # First only the classifier: its first steps would otherwise send large,
    # random gradients through the pretrained weights.
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
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", required=True, help="what was pretrained")
    add(
        "--images",
        required=True,
        type=os.path.expanduser,
        help="folder with a folder per class",
    )
    add("--output", default="classifier.keras", help="file to write")
    add("--epochs", type=int, default=5, help="of each of the two phases")
    add("--batch_size", type=int, default=32, help="images per step")
    add(
        "--image_size",
        type=int,
        help="side of the images, in px; default: that of the encoder",
    )
    add("--probe_rate", type=float, default=1e-2, help="learning rate, linear")
    add("--rate", type=float, default=1e-3, help="learning rate, whole")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
