"""The rows of a batch: replaces unreadable images, permutes shuffled views."""

import tensorflow as tf

from clsa_tf.augment.views import params_key, shuffled_copy
from clsa_tf.data.order import ROWS, key


def next_valid(valid):
    """Returns for each row the next valid row, cyclically; itself if valid."""
    size = tf.size(valid)
    rows = tf.cast(tf.where(valid)[:, 0], tf.int32)  # [number of valid]
    following = tf.searchsorted(rows, tf.range(size))  # [G]
    return tf.gather(rows, following % tf.size(rows))  # [G]


def arrange(batch, donors, views, seed, step, worker, *, copies):
    """Replaces invalid rows, and permutes the rows of shuffled views.

    Args:
        batch: dict of tensors [G, ...], with `"valid"`.
        donors: i32[G], the row that replaces each row; itself if valid.
        views: the views of the batch.
        seed: seed of the permutations.
        step: step of the batch.
        worker: `Worker`.
        copies: whether views with `both_orders` get a permuted copy.

    Returns:
        The batch as `training_batches` returns it.
    """
    size = donors.shape[0]
    result = _replaced(batch, ("index", "label"), donors)
    for i, view in enumerate(views):
        names = view.name, params_key(view)
        if not view.shuffle:
            result |= _replaced(batch, names, donors)
            continue
        order = tf.random.experimental.stateless_shuffle(
            tf.range(size * worker.count), key(seed, ROWS, step, i), "philox"
        )[worker.rows(size * worker.count)]  # [G]
        result[f"{view.name}_order"] = order
        alone = worker.count == 1
        if view.both_orders or not alone:
            result |= _replaced(batch, names, donors)
        if alone and (copies or not view.both_orders):
            place = shuffled_copy(view) if view.both_orders else view
            places = place.name, params_key(place)
            result |= {
                new: tf.gather(batch[old], tf.gather(donors, order))
                for new, old in zip(places, names)
                if old in batch
            }
    return tf.nest.map_structure(_with_rows(size), result)


def _rows_of(batch, names):
    return {name: batch[name] for name in names if name in batch}


def _replaced(batch, names, donors):
    """Returns some tensors of a batch, with invalid rows replaced."""
    rows = _rows_of(batch, names)
    if not rows:
        return {}
    return tf.cond(
        tf.reduce_all(batch["valid"]),
        lambda: rows,
        lambda: _gather(rows, donors),
    )


def _with_rows(count):
    """Returns a function that sets the static number of rows of a tensor."""
    return lambda x: tf.ensure_shape(x, [count, *x.shape[1:]])


def _gather(rows, index):
    return tf.nest.map_structure(lambda x: tf.gather(x, index), rows)
