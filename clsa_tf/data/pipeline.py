"""Batches of views for training.

A training batch is a pure function of (seed, step). The batch of step `s` holds
the examples with counters `s * G` to `s * G + G - 1`. Neither the number of
threads nor the step at which the dataset starts changes it.
"""

import functools
import math
import os
from typing import Optional, Sequence

import tensorflow as tf

from clsa_tf.augment.chain import compiled_draw, make_views
from clsa_tf.augment.views import View, params_key, split_packed
from clsa_tf.data import headers
from clsa_tf.data.batch_rows import arrange, next_valid
from clsa_tf.data.checks import check_batch_size, check_readable_elsewhere
from clsa_tf.data.decode import REDUCIBLE, try_decode_boxes, try_open
from clsa_tf.data.order import ALONE, VIEWS, Worker, key, prefetch_in_order
from clsa_tf.data.service_client import Services
from clsa_tf.data.source import Source
from clsa_tf.data.unreadable import UnreadableImages

# Largest number of images per call. A call of a compiled program has a fixed
# cost of about 0.1 ms on a host, and so has a guard against damaged files.
_MAX_GROUP = 4
# Largest number of images per message of a service. TensorFlow keeps about
# fifteen messages of each service ready.
_MAX_SENT = 16


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
        * `"index"` i64[G], number of each example's record in the data set,
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
    views = tuple(views)
    keep_params = keep_params or not completed
    check_batch_size(source, batch_size)
    share = batch_size // worker.count  # rows that this process makes
    group_size = math.gcd(share, _MAX_GROUP)
    calls = parallel_calls
    if not (calls or services):
        cores = _cores()
        # A call sometimes waits for the threads of XLA and of the guard. With
        # one call per core, two cores were idle for a fifth of the time. A
        # single core is never idle.
        calls = 2 * cores if cores > 1 else 1

    def records(rows, first, stride):
        """Records of a stream that one of `stride` services reads.

        The parts of all steps are numbered, and each service makes every
        `stride`-th part. So each service reads its own files, at whatever step
        it starts.
        """
        before = start_step * (share // rows)  # parts of earlier steps
        owner = (first + before) % stride
        reader = Worker(worker.index * stride + owner, worker.count * stride)
        size = source.epoch_size(batch_size, whole_epochs)
        read = max(0, -(-(before - owner) // stride)) * rows
        return source.stream_of(reader, start=read, seed=seed, size=size)

    def parts(rows, first=0, stride=1):
        """Dataset of the parts first, first + stride, … of `rows` rows each."""

        def belongs(counter, _=None):
            step, row = counter // batch_size, counter % share
            number = ((step - start_step) * share + row) // rows
            return tf.equal(number % stride, first)

        start = start_step * batch_size
        if stride > 1 and not source.random_access:
            counters = tf.data.Dataset.counter(start).filter(
                lambda c: (c % batch_size) // share == worker.index
            )
            items = tf.data.Dataset.zip(
                (counters.filter(belongs), records(rows, first, stride))
            )
        else:
            items = source.items_of(
                worker,
                start=start,
                seed=seed,
                batch_size=batch_size,
                whole_epochs=whole_epochs,
            )
            items = items.filter(belongs) if stride > 1 else items
        groups = items.batch(group_size, drop_remainder=True).map(
            _views_of_items(
                source, views, seed, group_size, completed, keep_params
            ),
            num_parallel_calls=calls or tf.data.AUTOTUNE,
            deterministic=True,
        )
        options = tf.data.Options()
        if calls:
            options.threading.private_threadpool_size = max(2, calls)
        else:  # one call per core of the service, at most 16
            options.autotune.enabled = False
        return groups.batch(
            rows // group_size, drop_remainder=True
        ).with_options(options)

    def finish(batch):
        # Flattens (parts of) groups of examples to examples.
        outer = batch["code"].shape.rank
        batch = {
            name: tf.reshape(x, [-1, *x.shape[outer:]])
            for name, x in batch.items()
        }
        step = batch["counter"][0] // batch_size
        batch["valid"] = batch["code"] == headers.OK
        with tf.control_dependencies(
            [_report(batch, step - start_step + 1, source, unreadable)]
        ):
            donors = next_valid(batch["valid"])  # [G]
        result = arrange(
            batch, donors, views, seed, step, worker, copies=replicas > 1
        )
        return tf.nest.map_structure(_in_parts(replicas), result)

    if services:
        check_readable_elsewhere(
            source, "with --data_service", "leave --data_service out"
        )
        rows = math.gcd(share, _MAX_SENT)
        batches = services.distribute(functools.partial(parts, rows))
        batches = batches.batch(share // rows, drop_remainder=True)
        steps = tf.data.Dataset.counter(start_step)
        batches = tf.data.Dataset.zip((steps, batches)).map(
            _expected(batch_size, worker)
        )
    else:
        batches = parts(share)
    batches = batches.map(finish)
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


def _views_of_items(source, views, seed, group_size, completed, keep_params):
    """Returns a function from `group_size` items to their views."""
    sizes = [view.size for view in views]
    draw = _draw(views, seed)

    def views_of_items(counters, items):
        columns = [
            tf.unstack(x, num=group_size) for x in tf.nest.flatten(items)
        ]
        rows = [tf.nest.pack_sequence_as(items, row) for row in zip(*columns)]
        examples = [source.read(row) for row in rows]
        opened = try_open(
            [example["bytes"] for example in examples],
            rules=source.rules,
            load=source.load,
            whole_below=REDUCIBLE * max(sizes),
        )
        boxes, drawn = draw(counters, tf.stack([x.size for x in opened]))
        decoded = [
            try_decode_boxes(x, boxes[i], sizes=sizes)
            for i, x in enumerate(opened)
        ]
        codes, images, boxes = zip(*decoded)
        packed = split_packed(drawn, views=views)
        result = make_views(
            images, tf.stack(boxes), packed, views=views, completed=completed
        )
        if keep_params:
            for view in views:
                result[params_key(view)] = packed[view.name]
        if source.random_access:
            result["index"] = items
        if source.class_names:
            result["label"] = tf.stack(
                [example["label"] for example in examples]
            )
        return {
            "code": tf.stack(codes),
            "name": tf.stack([example["name"] for example in examples]),
            "counter": counters,
            **result,
        }

    return views_of_items


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


def _cores():
    """Returns the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Compiles once per key. The bound lets programs of other views be freed.
@functools.lru_cache(maxsize=16)
def _draw(views, seed):
    """Returns a function that draws parameters from counters i64[K].

    Its second argument is sizes i32[K, 2]. See `compiled_draw` for the result.
    """
    program = compiled_draw(views)

    def view_seed(counter):
        """Returns i32[2] whose 64 bits all depend on all arguments."""
        bits = tf.random.stateless_uniform(
            [], key(seed, VIEWS, counter), None, None, tf.int64, alg="philox"
        )
        return tf.bitcast(bits, tf.int32)

    @tf.function(jit_compile=True, autograph=False)
    def draw(counters, sizes):
        seeds = tf.map_fn(view_seed, counters, fn_output_signature=tf.int32)
        return program(seeds, sizes)

    return draw


def _in_parts(count):
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
