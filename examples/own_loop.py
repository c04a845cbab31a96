"""A custom training loop with the losses of CLSA, on the dataset `shapes`.

    python examples/own_loop.py

The losses are plain functions of tensors and work with any model and loop. This
example uses a small network, keys from the same batch, and Keras' Adam. The
first run generates the 12,000 images of `shapes`.
"""

import argparse

import clsa_tf

# Import clsa_tf before TensorFlow: it selects Keras 2. `quieten` hides harmless
# messages of TensorFlow; omit it to see the whole log.
clsa_tf.quieten()
# Take the memory of a GPU as needed. Otherwise TensorFlow takes all of it.
clsa_tf.share_gpus()

import tensorflow as tf
from tensorflow import keras

from clsa_tf import losses
from clsa_tf.augment.views import View
from clsa_tf.data.open import open_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.unreadable import UnreadableImages

TEMPERATURE = 0.2
VIEWS = (
    View("key", 32, 0.5, 1.0, blur=0.0),
    View("query", 32, 0.5, 1.0, blur=0.0),
    # Smaller, with five strong operations.
    View("strong", 24, 0.4, 1.0, blur=0.0, strong_ops=5),
)


def network():
    """Network from uint8 `[N, H, W, 3]` of any size to unit rows `[N, 64]`."""
    layers = [keras.layers.Rescaling(1 / 127.5, -1.0)]
    for channels in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(channels, 3, strides=2, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(64),
        keras.layers.UnitNormalization(),
    ]
    return keras.Sequential(layers)


@tf.function
def train_step(model, optimizer, batch):
    """Takes one step; returns mean contrast and mean divergence, in nats."""
    with tf.GradientTape() as tape:
        keys = model(batch["key"], training=True)
        weak = losses.cosines(model(batch["query"], training=True), keys)
        strong = losses.cosines(model(batch["strong"], training=True), keys)
        own = tf.range(tf.shape(keys)[0])  # the key of row i is column i
        contrast = losses.info_nce(weak, own, temperature=TEMPERATURE)
        ddm = losses.ddm([weak], [strong], temperature=TEMPERATURE)
        loss = tf.reduce_mean(contrast + ddm)  # losses have one value per row
    weights = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
    return tf.reduce_mean(contrast), tf.reduce_mean(ddm)


def main(arguments):
    """Trains for `--steps` steps."""
    keras.utils.set_random_seed(0)
    model, optimizer = network(), keras.optimizers.Adam(arguments.rate)
    batches = training_batches(
        open_source(arguments.dataset, data_dir=arguments.data_dir),
        VIEWS,
        batch_size=arguments.batch_size,
        seed=0,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.05),
    )
    print("compiling the views and the step …", flush=True)
    for step, batch in enumerate(batches.take(arguments.steps), 1):
        contrast, ddm = train_step(model, optimizer, batch)
        if step % 10 == 0:
            print(f"step {step}: contrast {contrast:.3f}, ddm {ddm:.3f}")


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="shapes", help="as in python -m clsa_tf.train")
    add("--data_dir", default="runs/data", help="directory of datasets")
    add("--steps", type=int, default=300, help="steps to train")
    add("--batch_size", type=int, default=128, help="images per step")
    add("--rate", type=float, default=1e-3, help="learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
