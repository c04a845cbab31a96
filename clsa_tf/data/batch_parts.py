"""Parts of training batches: from items of the source to views.

Any process can make any part, see `BatchParts`.
"""

import dataclasses
import functools
import math
from typing import Tuple

import tensorflow as tf

from clsa_tf.augment.chain import compiled_draw, make_views
from clsa_tf.augment.views import View, params_key, split_packed
from clsa_tf.data.decode import REDUCIBLE, try_decode_boxes, try_open
from clsa_tf.data.order import VIEWS, Worker, key
from clsa_tf.data.source import Source

# Largest number of images per call. A call of a compiled program has a fixed
# cost of about 0.1 ms on a host, and so has a guard against damaged files.
_MAX_GROUP = 4


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """Parts of the rows that one worker makes of each global batch.

    The parts of all batches from `start_step` on are numbered. `make` returns
    every part, or every n-th one, so that several processes can share the
    work.

    Attributes:
        source: `Source` of the images.
        views: tuple of the views to make of each image.
        batch_size: G, examples in a global batch.
        seed: seed of all random draws.
        start_step: step of the first batch.
        worker: the worker and their number.
        completed: see `training_batches`.
        keep_params: whether parts hold the drawn parameters.
        whole_epochs: see `training_batches`.
    """

    source: Source
    views: Tuple[View, ...]
    batch_size: int
    seed: int
    start_step: int
    worker: Worker
    completed: bool
    keep_params: bool
    whole_epochs: bool

    @property
    def share(self):
        """Number of rows of each batch that this worker makes."""
        return self.batch_size // self.worker.count

    def step_of(self, counter):
        """Step whose batch holds the example with a counter."""
        return counter // self.batch_size

    def make(self, rows, first=0, stride=1, *, calls=None):
        """Returns the parts first, first + stride, first + 2 stride, …

        Args:
            rows: rows of a part; divides `share`.
            first: number of the first part.
            stride: distance of the parts.
            calls: number of groups of images made at the same time; None: one
                per core, without a thread that tunes it (for services).

        Returns:
            Dataset of dicts of tensors `[groups, rows / groups, ...]`.
        """
        size = math.gcd(self.share, _MAX_GROUP)
        function = _views_of_items(
            self.source,
            self.views,
            self.seed,
            size,
            self.completed,
            self.keep_params,
        )
        groups = self._items(rows, first, stride)
        groups = groups.batch(size, drop_remainder=True).map(
            function,
            num_parallel_calls=calls or tf.data.AUTOTUNE,
            deterministic=True,
        )
        options = tf.data.Options()
        if calls:
            options.threading.private_threadpool_size = max(2, calls)
        else:  # one call per core of the service, at most 16
            options.autotune.enabled = False
        return groups.batch(rows // size, drop_remainder=True).with_options(
            options
        )

    def _items(self, rows, first, stride):
        """Dataset of (counter, item) of the examples of the parts."""

        def belongs(counter, _=None):
            batch = self.step_of(counter) - self.start_step
            number = (batch * self.share + counter % self.share) // rows
            return tf.equal(number % stride, first)

        if stride > 1 and not self.source.random_access:
            counters = tf.data.Dataset.counter(self._start).filter(
                lambda c: (
                    (c % self.batch_size) // self.share == self.worker.index
                )
            )
            return tf.data.Dataset.zip(
                (
                    counters.filter(belongs),
                    self._records_of_service(rows, first, stride),
                )
            )
        items = self.source.items_of(
            self.worker,
            start=self._start,
            seed=self.seed,
            batch_size=self.batch_size,
            whole_epochs=self.whole_epochs,
        )
        return items.filter(belongs) if stride > 1 else items

    @property
    def _start(self):
        return self.start_step * self.batch_size

    def _records_of_service(self, rows, first, stride):
        """Records of a stream that one of `stride` services reads.

        Each service makes every `stride`-th part. So each service reads its own
        files, at whatever step it starts. An epoch of a service ends with the
        last of its parts in that epoch of the run.
        """
        per_batch = self.share // rows
        before = self.start_step * per_batch  # earlier parts
        owner = (first + before) % stride
        reader = Worker(
            self.worker.index * stride + owner, self.worker.count * stride
        )

        def made(parts):
            """Records of this service among those of the first `parts`."""
            return (parts - owner + stride - 1) // stride * rows

        size = self.source.epoch_size(self.batch_size, self.whole_epochs)
        if self.whole_epochs:
            length = size // self.batch_size * per_batch  # parts of an epoch
            epoch = before // length
            skipped = made(before) - made(epoch * length)

            def share(number):
                return made((number + 1) * length) - made(number * length)
        else:
            equal = max(1, size // reader.count)
            epoch, skipped = divmod(made(before), equal)

            def share(_):
                return equal

        return self.source.stream_of(
            reader, seed=self.seed, first=epoch, skipped=skipped, share=share
        )


def _views_of_items(source, views, seed, group_size, completed, keep_params):
    """Returns a function from `group_size` items to their views.

    The function takes counters i64[K] and a structure of items `[K, ...]`. It
    returns a dict of tensors `[K, ...]`.
    """
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
