"""Contrastive attraction and contrastive repulsion (CACR).

Hard positives attract more: among the other views of the same image, distant
ones weigh more. Hard negatives repel more: among the other images, near ones
weigh more. Costs are squared distances of unit rows, `2 - 2 cos`, in [0, 4].
The weights are a softmax over the distances. Its `sharpness`, the paper's t+
(attraction) or t- (repulsion), multiplies the distances; it is an inverse
temperature, and 0 gives equal weights. The paper's factors alpha and beta of
the two costs do not enter these weights; the caller multiplies by them.

The published forms, where `x` and `y` are views of an image:

* In the batch: the mean over x of `cacr_attraction` to all other views, plus
  the mean over pairs x < y of `cacr_repulsion` of x from the other images' y.
  t+ = 1; t- = 0.9 for CIFAR-10, 2 for CIFAR-100 and STL-10.
* With a queue: the mean over x of `cacr_attraction` of query x to the other
  views' keys, with `constant_weights`, and of `cacr_repulsion` from the other
  images' queries x and the `queue`. t+ = 1, t- = 2.
* With a momentum encoder and no queue: the mean over the key views of
  `cacr_rbf`, or of `cacr_euclidean`, of the other views' queries. T = 1 for
  ResNet-50, 0.2 for ViT.

alpha = beta = 1 in the first two.

Source: Zheng et al. (arXiv 2105.03746); JegZheng/CACR-SSL@fbc9d94.
"""

import tensorflow as tf

from clsa_tf.losses.contrast import (
    cosines,
    info_nce,
    mask_own,
)
from clsa_tf.losses.products import at_least_float32, row_by_row


def cacr_attraction(queries, positives, *, sharpness, constant_weights=False):
    """Attraction: weighted distance of each row to other views of its image.

    With `d_v = |q - p_v|^2` and `w = softmax_v(sharpness d_v)` this is
    `sum_v w_v d_v`. A single other view has weight 1.

    Args:
        queries: float `[N, D]`, unit rows.
        positives: sequence of float `[N, D]`, unit rows: other views of the
            same images, row for row.
        sharpness: t+ >= 0; published 1.
        constant_weights: whether `w` is constant for the gradient. True if the
            positives are keys of a momentum encoder, as published. The gradient
            always flows through `d`, into both rows.

    Returns:
        float `[N]`, squared length, in [0, 4].

    Source: CACR-SSL@fbc9d94 `small_scale_experiments/losses/__init__.py`;
    with constant weights
    `large_scale_shift_experiments/imagenet/ours/builder.py`.
    """
    queries = at_least_float32(queries)
    distances = tf.stack(
        [2 - 2 * row_by_row(queries, x) for x in positives],
        axis=1,
    )
    weights = tf.nn.softmax(sharpness * distances)
    if constant_weights:
        weights = tf.stop_gradient(weights)
    return row_by_row(weights, distances)


def cacr_repulsion(queries, others, example_ids, *, sharpness, queue=None):
    """Repulsion: negated weighted distance of each row to other images.

    With `d_c = |q - o_c|^2` and `u = softmax_c(-sharpness d_c)` over the other
    images `c` this is `- sum_c u_c d_c`. The gradient flows through `d` and
    `u`, into `queries` and `others`, so the caller has to gather with gradient.
    Inside `u` the distances to the queue are constants.

    The published code with a queue differs twice: its `others` are the
    replica's own part of the batch, and it uses the first view's distances to
    the queue for all views.

    Args:
        queries: float `[N, D]`, unit rows.
        others: float `[G, D]`, unit rows: a view of each image of the global
            batch. The own row is masked; without a queue G has to exceed 1.
        example_ids: int32 `[N]`, in [0, G): position of each query in the
            global batch.
        sharpness: t- >= 0; published 0.9 or 2, see the module's docstring.
        queue: float `[K, D]`, unit rows, older keys, or None.

    Returns:
        float `[N]`, squared length, in [-4, 0].

    Source: as `cacr_attraction`.
    """
    distances = 2 - 2 * cosines(queries, others)
    logits = mask_own(-sharpness * distances, example_ids)
    if queue is not None:
        to_queue = 2 - 2 * cosines(queries, queue)
        distances = tf.concat([to_queue, distances], axis=1)
        logits = tf.concat(
            [tf.stop_gradient(-sharpness * to_queue), logits], axis=1
        )
    return -row_by_row(tf.nn.softmax(logits), distances)


def cacr_rbf(queries, keys, example_ids, *, temperature):
    """Attraction and repulsion with a radial basis function as the cost.

    `2 T sum_v p_v info_nce(q_v, keys)` with `p = softmax_v(|q_v - k|^2 / T)`
    for the row's own key `k`. No gradient flows into `p` or the keys. For one
    query view this is MoCo v3's contrast of one direction. The published total
    is the *mean* over key views, so with two views it is half of MoCo v3's.

    Args:
        queries: sequence of float `[N, D]`, unit rows: all views of the image
            except that of `keys`.
        keys: float `[G, D]`, unit rows: keys of the global batch.
        example_ids: int32 `[N]`, in [0, G): position of each query in the
            global batch.
        temperature: T > 0, divides cosines and distances.

    Returns:
        float `[N]`, >= 0, nats times 2 T.

    Source: CACR-SSL@fbc9d94 `imagenet_pretraining/moco/builder.py`.
    """
    similarities = _with_constant_keys(queries, keys)
    weights = _weights_of_views(similarities, example_ids, temperature)
    contrasts = tf.stack(
        [
            info_nce(x, example_ids, temperature=temperature)
            for x in similarities
        ]
    )
    return 2 * temperature * tf.reduce_sum(weights * contrasts, axis=0)


def cacr_euclidean(queries, keys, example_ids, *, temperature):
    """Attraction and repulsion with half the squared distance as the cost.

    With `c_vj = 1 - q_v.k_j`, `p` as in `cacr_rbf` and
    `u_v = softmax_{j != i}(-c_vj / T)`, `i` the row's own, this is

        sum_v p_v (c_vi - sum_{j != i} u_vj c_vj).

    No gradient flows into `p`, `u` or the keys. The published code sums this
    over the replica's batch, but takes the mean of `cacr_rbf`. Its loss is
    therefore `N` times the mean of these rows.

    Args:
        queries: see `cacr_rbf`.
        keys: see `cacr_rbf`; G > 1.
        example_ids: see `cacr_rbf`.
        temperature: T > 0, divides the costs.

    Returns:
        float `[N]`, halved squared length, in [-2, 2].

    Source: as `cacr_rbf`.
    """
    similarities = _with_constant_keys(queries, keys)
    weights = _weights_of_views(similarities, example_ids, temperature)
    costs = []
    for x in similarities:
        near = tf.nn.softmax(mask_own((x - 1) / temperature, example_ids))
        repulsion = row_by_row(tf.stop_gradient(near), x - 1)
        costs.append(1 - _own(x, example_ids) + repulsion)
    return tf.reduce_sum(weights * tf.stack(costs), axis=0)


def _with_constant_keys(queries, keys):
    return [cosines(x, tf.stop_gradient(keys)) for x in queries]


def _weights_of_views(similarities, example_ids, temperature):
    """Weights `p`, `[V, N]`; larger for views farther from the own key."""
    distances = tf.stack([2 - 2 * _own(x, example_ids) for x in similarities])
    return tf.stop_gradient(tf.nn.softmax(distances / temperature, axis=0))


def _own(similarities, example_ids):
    return tf.gather(similarities, example_ids, batch_dims=1)
