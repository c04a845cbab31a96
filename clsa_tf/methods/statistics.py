"""Statistics of the projections of a batch, which show a collapse."""

import tensorflow as tf

from clsa_tf.losses import products

_TINY = 1e-12


def measures(projections):
    """Computes spread, rank and uniformity of projections.

    The projections must come from one encoder. If encoder and momentum encoder
    have each collapsed to a different point, cosines between queries and keys
    look like a spread.

    Args:
        projections: float32 `[G, D]`, unit rows, one per image; `G > 1`. The
            rank is meaningful for `G > 2` only.

    Returns:
        dictionary of float32 scalars:

        * `spread`, trace of the covariance `C`, equal to `1 - mean cosine`:
          0 if all rows are equal, 1 if they are uniform on the sphere;
        * `rank`, `trace(C)^2 / trace(C C)`: number of directions in which the
          rows vary, 1 to D. The estimate of Bai and Saranadasa (1996) holds for
          any ratio of D and G;
        * `uniformity`, `log mean exp(-2 distance^2)`: 0 if all rows are equal,
          down to about -4 (Wang and Isola, arXiv 2005.10242, with t = 2).
    """
    x = tf.stop_gradient(projections)
    size, dimension = map(float, x.shape)
    # Centre first: 1 - cosine loses all digits if the cosine is near 1.
    x -= tf.reduce_mean(x, axis=0)
    columns = tf.transpose(x)
    covariance = products.all_pairs(columns, columns) / (size - 1.0)  # [D, D]
    spread = tf.linalg.trace(covariance)
    squares = tf.reduce_sum(covariance**2) - spread**2 / (size - 1.0)
    squares *= (size - 1.0) ** 2 / (max(size - 2.0, 1.0) * (size + 1.0))
    # Noise can make the estimate smaller than D directions allow.
    squares = tf.maximum(squares, spread**2 / dimension)
    rank = tf.math.divide_no_nan(spread**2, squares)
    potential = tf.exp(-2.0 * _squared_distances(x))
    potential = (tf.reduce_sum(potential) - size) / (size * (size - 1.0))
    return {
        "spread": spread,
        "rank": tf.maximum(rank, 1.0),
        "uniformity": tf.math.log(tf.maximum(potential, _TINY)),
    }


def _squared_distances(x):
    """float32 `[G, D]` -> `[G, G]`."""
    squares = tf.reduce_sum(x**2, axis=1)
    inner = products.all_pairs(x, x)
    distances = squares[:, tf.newaxis] + squares - 2.0 * inner
    # Rounding depends on the order of sums: set the distance to itself to 0.
    return tf.linalg.set_diag(
        tf.maximum(distances, 0.0), tf.zeros_like(squares)
    )
