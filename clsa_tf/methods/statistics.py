"""Statistics of the embeddings of a batch."""

import tensorflow as tf

_TINY = 1e-12


def measures(embeddings):
    """Spread, rank and uniformity of embeddings of different images.

    All from one encoder: cosines between those of two encoders, such as
    queries and keys, look like a spread when each of the two has collapsed to
    a point of its own.

    Args:
        embeddings: float32 `[G, D]`, unit vectors; `G > 1`, and two say nothing
            about the rank.

    Returns:
        dictionary of float32 scalars:

        * `spread`, trace of the covariance `C`, equal to `1 - mean cosine`:
          0 if all are the same, 1 if they are spread evenly over the sphere;
        * `rank`, `trace(C)^2 / trace(C C)`: number of directions in which
          they vary, 1 to D. The estimate is that of Bai and Saranadasa (1996),
          whatever the ratio of D and G;
        * `uniformity`, `log mean exp(-2 distance^2)`: 0 if all are the same,
          down to about -4 (Wang and Isola, arXiv 2005.10242, with t = 2).
    """
    x = tf.stop_gradient(embeddings)
    size, dimension = map(float, x.shape)
    # From the mean first: cosines near 1 would leave no digits.
    x -= tf.reduce_mean(x, axis=0)
    covariance = tf.matmul(x, x, transpose_a=True) / (size - 1.0)  # [D, D]
    spread = tf.linalg.trace(covariance)
    squares = tf.reduce_sum(covariance**2) - spread**2 / (size - 1.0)
    squares *= (size - 1.0) ** 2 / (max(size - 2.0, 1.0) * (size + 1.0))
    # Noise may leave less than D directions can have.
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
    products = tf.matmul(x, x, transpose_b=True)
    distances = squares[:, tf.newaxis] + squares - 2.0 * products
    # Exactly 0 from a row to itself, whatever the order of the sums.
    return tf.linalg.set_diag(
        tf.maximum(distances, 0.0), tf.zeros_like(squares)
    )
