"""Batches of views for training.

A training batch is a pure function of (seed, step). The batch of step `s` holds
the examples with counters `s * G` to `s * G + G - 1`. Neither the number of
threads nor the step at which the dataset starts changes it.
"""

import math
import os
from typing import Optional, Sequence

import tensorflow as tf

from clsa_tf.augment.views import View
from clsa_tf.data import headers
from clsa_tf.data.batch_parts import BatchParts
from clsa_tf.data.batch_rows import arrange, next_valid
from clsa_tf.data.order import ALONE, Worker, prefetch_in_order
from clsa_tf.data.service_client import Services
from clsa_tf.data.source import Source
from clsa_tf.data.source_checks import (
    check_batch_size,
    check_readable_elsewhere,
)
from clsa_tf.data.unreadable import UnreadableImages

# Largest number of images per message of a service. TensorFlow keeps about
# fifteen messages of each service ready.
_MAX_SENT = 16


# AutoGraph would take seconds to convert functions that have no use for it.
@tf.autograph.experimental.do_not_convert
def training_batches(
    source: Source,
    views: Sequence[View],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    unreadable: UnreadableImages,
    completed: bool = True,
    keep_params: bool = False,
    whole_epochs: bool = True,
    prefetch: int = 2,
    parallel_calls: Optional[int] = None,
    worker: Worker = ALONE,
    replicas: int = 1,
    services: Optional[Services] = None,
) -> tf.data.Dataset:
    """Returns the endless dataset of batches, starting at a step.

    Each example is decoded once. Its views depend on (seed, counter) only.
    An unreadable image is replaced by the next readable one of the batch,
    cyclically, and reported to `unreadable`. The dataset ends with an error if
    there are too many of them.

    The memory needed does not depend on the size of the dataset. It holds
    `prefetch` finished batches, the batch in progress (up to twice), and for
    each parallel call the decoded images and the views of four examples. With
    services, the memory for the calls is needed there, and this process holds
    the views of about 250 examples of each service.

    Args:
        source: where the images come from.
        views: the views to make of each image.
        batch_size: G, examples in a global batch; fastest if divisible by 4.
        seed: seed of all random draws.
        start_step: step of the first batch.
        unreadable: collects the names of unreadable images. After an error of
            the iterator, `unreadable.error()` is set if they caused it.
        completed: whether views are complete. Otherwise they are only cropped
            and resized, and `complete_batch` completes them on the
            accelerator.
        keep_params: whether batches hold the drawn parameters. Batches of
            incomplete views always do.
        whole_epochs: whether an epoch ends with its last full batch, as in
            published code. Otherwise a batch may continue into the next epoch
            and hold an image twice.
        prefetch: number of finished batches to keep ready.
        parallel_calls: number of groups of images made at the same time. None
            means two per processor core (one on a single core), or one per
            core in a service. It does not change the batches.
        worker: which part of each global batch this process makes.
        replicas: number of parts into which the rows are split. The dataset
            returns the parts one after the other.
        services: processes that read images and make views instead of this
            one. They do not change the batches. See `Services.distribute` for
            the errors of the iterator.

    Returns:
        Dataset of dicts:

        * name of each view -> u8[G, S, S, 3];
        * `"index"` i64[G], number of each example's record in the dataset,
          if the source has random access;
        * `"label"` i64[G], if the source has classes;
        * `"<name>_order"` i32[G], for a view with `shuffle`: the example in
          each row of the permuted view. The rows of `"<name>"` are permuted.
          With `both_orders` they are not, and if there are several replicas,
          `"<name>_shuffled"` holds the permuted rows. With several workers no
          rows are permuted, because other workers have the images. Then the
          order lists the rows of the global batch that belong to this worker;
        * `"<name>_params"` f32[G, p], if kept: the drawn parameters of each
          row. `augment.views.unpack` returns them in the form of
          `augment.views.draw`.

    Raises:
        UserError: the batch is larger than the dataset, a view shares parts
            that it cannot share, a service does not take its dataset, or the
            source cannot be read by services.
    """
    check_batch_size(source, batch_size)
    parts = BatchParts(
        source=source,
        views=tuple(views),
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        worker=worker,
        completed=completed,
        keep_params=keep_params or not completed,
        whole_epochs=whole_epochs,
    )
    if services:
        check_readable_elsewhere(
            source, "with --data_service", "leave --data_service out"
        )
        batches = _from_services(parts, services, parallel_calls)
    else:
        batches = parts.make(parts.share, calls=parallel_calls or _calls())
    batches = batches.map(_assemble(parts, unreadable, replicas))
    if replicas > 1:
        batches = batches.unbatch()
    # Without this, several workers prepare for the end of the data, with
    # batches of unknown size.
    endless = tf.data.experimental.assert_cardinality(
        tf.data.experimental.INFINITE_CARDINALITY
    )
    # Prefetching must come last. After any other transformation TensorFlow adds
    # its own buffer, which keeps growing if batches are taken in bursts.
    return prefetch_in_order(
        batches.apply(endless), prefetch=prefetch * replicas
    )


def _from_services(parts, services, calls):
    """Dataset of batches, of parts that services make in turn."""
    rows = math.gcd(parts.share, _MAX_SENT)
    batches = services.distribute(
        lambda first, stride: parts.make(rows, first, stride, calls=calls)
    ).batch(parts.share // rows, drop_remainder=True)
    steps = tf.data.Dataset.counter(parts.start_step)
    return tf.data.Dataset.zip((steps, batches)).map(
        _expected(parts.batch_size, parts.worker)
    )


def _assemble(parts, unreadable, replicas):
    """Returns a function from the parts of a batch to the batch."""

    def assemble(batch):
        # Flattens (parts of) groups of examples to examples.
        outer = batch["code"].shape.rank
        batch = {
            name: tf.reshape(x, [-1, *x.shape[outer:]])
            for name, x in batch.items()
        }
        step = parts.step_of(batch["counter"][0])
        seen = step - parts.start_step + 1
        batch["valid"] = batch["code"] == headers.OK
        with tf.control_dependencies(
            [_report(batch, seen, parts.source, unreadable)]
        ):
            donors = next_valid(batch["valid"])  # [G]
        result = arrange(
            batch,
            donors,
            parts.views,
            parts.seed,
            step,
            parts.worker,
            copies=replicas > 1,
        )
        return tf.nest.map_structure(_split_rows(replicas), result)

    return assemble


def _expected(batch_size, worker):
    """Returns a function that checks that a batch belongs to its step.

    A restarted service might confuse its clients.
    """

    def expected(step, batch):
        rows = tf.range(batch_size, dtype=tf.int64)[worker.rows(batch_size)]
        counters = tf.reshape(batch["counter"], [-1])
        check = tf.debugging.assert_equal(
            counters,
            step * batch_size + rows,
            "A service sent a batch of another step.",
        )
        with tf.control_dependencies([check]):
            return tf.nest.map_structure(tf.identity, batch)

    return expected


def _calls():
    """Number of groups of images that this process makes at the same time."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux: cores it may use
        cores = len(os.sched_getaffinity(0))
    # A call sometimes waits for the threads of XLA and of the guard. With one
    # call per core, two cores were idle for a fifth of the time. A single core
    # is never idle.
    return 2 * cores if cores > 1 else 1


def _split_rows(count):
    """Returns a function from [n, ...] to parts [count, n/count, ...]."""
    if count == 1:
        return lambda x: x
    return lambda x: tf.reshape(x, [count, x.shape[0] // count, *x.shape[1:]])


def _report(batch, batches_seen, source, unreadable):
    valid = batch["valid"]  # [G]

    def report():
        names = tf.boolean_mask(batch["name"], ~valid)
        codes = tf.boolean_mask(batch["code"], ~valid)
        seen = batches_seen * tf.size(valid, tf.int64)
        lost = ~tf.reduce_any(valid)
        return unreadable.report_op(
            names, codes, source=source, seen=seen, lost=lost
        )

    return tf.cond(tf.reduce_all(valid), tf.no_op, report)
