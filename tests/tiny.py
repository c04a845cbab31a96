"""A run small enough for tests, and batches that need no files."""

import functools

import numpy as np
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.methods.base import RunInfo
from clsa_tf.networks import backbones
from clsa_tf.networks.backbones import resnet
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.options.fields import Crop
from clsa_tf.training.run import make_method

ROWS = 16
RUN = RunInfo(total_steps=100)

# Two blocks instead of eight, one with a convolution in its shortcut.
resnet.BLOCKS["tiny"] = (False, (1, 1))
# For tests that build many graphs: the time grows with the number of layers.
resnet.BLOCKS["one_block"] = (False, (1,))
for _name in ("tiny", "one_block"):
    backbones.BACKBONES[_name] = functools.partial(resnet.resnet, _name)


def config(method="clsa", **changes):
    settings = dict(
        backbone="tiny",
        width=0.125,
        stem="small",
        batch_norm="local",
        batch_norm_splits=8,
        batch_size=ROWS,
        base_lr=0.3,
    )
    options = dict(
        projection_size=16,
        projection_hidden=0,
        queue_size=40,  # not a multiple of the batch
        key_momentum=0.9,
        key_crop=Crop(16, 0.2, 1.0),
        query_crops=(Crop(16, 0.2, 1.0),),
        crop=Crop(16, 0.2, 1.0),
        crops=(Crop(16, 0.2, 1.0),) * 3,
        strong_crops=(Crop(12, 0.1, 0.6),),
        ddm_weight=1.0,
        frozen_steps=2,
    )
    # Only the options that the method has.
    known = methods.load(method).Options.__dataclass_fields__
    settings |= {k: v for k, v in options.items() if k in known}
    return config_lib.default(method, **settings | changes)


def make(config, run=RUN):
    """Returns the compiled method; its rate changes every two steps."""
    schedule = make_schedule(config.replace(total_epochs=50), 2)
    return make_method(config, schedule, run)


def batches(config, steps, *, first=0):
    """Returns batches in which an image's views are noisy copies of it."""
    images = np.random.default_rng(0).uniform(0, 256, [1024, 4, 4, 3])
    views = methods.class_of(config).views(config.options)
    found = []
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        rows = rng.choice(len(images), config.batch_size, replace=False)
        batch = {}
        for view in views:
            x = tf.image.resize(images[rows], [view.size] * 2).numpy()
            x = np.uint8(np.clip(x + rng.normal(0, 20, x.shape), 0, 255))
            if view.shuffle:
                order = rng.permutation(len(x)).astype(np.int32)
                batch[f"{view.name}_order"] = order
                x = x if view.both_orders else x[order]
            batch[view.name] = x
        found.append(batch)
    stacked = {k: np.stack([b[k] for b in found]) for k in found[0]}
    return tf.data.Dataset.from_tensor_slices(stacked)


def fit(method, dataset, *, eager=False):
    """Trains; returns the reports of every step.

    A single step is faster `eager` than compiled.
    """
    method.run_eagerly = eager
    reports = []
    collect = tf.keras.callbacks.LambdaCallback(
        on_batch_end=lambda _, logs: reports.append(dict(logs))
    )
    method.fit(dataset, verbose=0, callbacks=[collect])
    return reports


def queues(method):
    """Returns the queues of a method: none, one or several."""
    several = getattr(method, "queues", None)
    return several or [q for q in [getattr(method, "queue", None)] if q]
