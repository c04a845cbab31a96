"""Whether embeddings still tell images apart, in numbers and in words.

Measured on cosines between the embeddings of different images, so that nothing
but the batch is needed:

* spread, `1 - mean cosine`: 0 if all embeddings are the same, 1 if they are
  spread evenly over the sphere;
* rank, `(sum of v)^2 / sum of v^2` of the eigenvalues `v` of the embeddings'
  covariance: number of directions in which they vary, 1 to about D;
* uniformity, `log mean exp(-2 distance^2)`: 0 if all are the same, down to
  about -4 (Wang and Isola, arXiv 2005.10242, with t = 2).
"""

import math

import tensorflow as tf

# Where words begin: below, the embeddings are as good as one, or as a line.
_LOW_SPREAD = 0.05
_LOW_RANK = 2.0
# Below this share of the best so far there is something to be said, too.
_FALL = 0.5
_TINY = 1e-12

_MOMENTS = (
    "embedding_distance",
    "embedding_distance2",
    "embedding_distance_pairs",
    "embedding_potential",
)


def moments(cosines, rows):
    """Means over other images, per image, that `summary` works from.

    They are plain means, so that they can be averaged over replicas and
    micro-batches.

    Args:
        cosines: float32 `[n, G]`, of each embedding with one of each image of
            the global batch.
        rows: int32 `[n]`, the column of the same image.

    Returns:
        dictionary of float32 `[n]`.
    """
    count = tf.cast(tf.shape(cosines)[1], tf.float32)
    others = 1.0 - tf.one_hot(rows, tf.shape(cosines)[1])  # [n, G]

    def mean(values):
        return tf.einsum("ng,ng->n", values, others) / (count - 1.0)

    # Half the squared distance; cosines near 1 would leave no digits.
    distances = 1.0 - tf.stop_gradient(cosines)
    first, second = mean(distances), mean(tf.square(distances))
    # Products of the distances to two different images.
    pairs = (first**2 * (count - 1.0) - second) / (count - 2.0)
    potential = mean(tf.exp(-4.0 * distances))
    return dict(zip(_MOMENTS, (first, second, pairs, potential)))


def summary(values, *, dimension):
    """Replaces the means of `moments` by what they say.

    Args:
        values: dictionary of floats; without moments it is returned as it is.
        dimension: D, width of the embedding.

    Returns:
        dictionary with `spread`, `rank` and `uniformity`.
    """
    if not values.keys() >= set(_MOMENTS):
        return values
    spread, second, pairs, potential = (values[name] for name in _MOMENTS)
    rest = {k: v for k, v in values.items() if k not in _MOMENTS}
    # Traces of the covariance C and of C C.
    squared = second - 2.0 * pairs + spread**2
    return rest | {
        "spread": spread,
        # Estimated from G images: noise can leave the possible range.
        "rank": min(max(spread**2 / max(squared, _TINY), 1.0), dimension),
        "uniformity": math.log(max(potential, _TINY)),
    }


class Watch:
    """Says in words how the embeddings develop, once per change.

    Networks begin in a narrow cone and leave it within the first hundreds of
    steps: that they have not left it yet is said at first as a fact, later as
    a warning.

    Args:
        dimension: D, width of the embedding.
        patience: steps after which a narrow cone is no longer a beginning.
    """

    def __init__(self, dimension, *, patience):
        """See the class."""
        self._dimension = dimension
        self._patience = patience
        self._state = ""
        self._best = 0.0

    def words(self, step, values):
        """Returns what has changed at `step`, a sentence, or "".

        Args:
            step: steps taken.
            values: dictionary with `spread`, `rank` and `uniformity`.
        """
        if "spread" not in values:
            return ""
        spread, rank = values["spread"], values["rank"]
        state = self._judge(step, spread, rank)
        self._best = max(self._best, spread)
        if state == self._state:
            return ""
        before, self._state = self._state, state
        if state == "open" and not before:
            return ""  # as it should be, from the first look on
        figures = (
            f"spread {spread:.3f} of 1, rank {rank:.1f} of {self._dimension}, "
            f"uniformity {values['uniformity']:.2f}"
        )
        return f"step {step}: {self._sentence(state)} ({figures})"

    def _judge(self, step, spread, rank):
        if spread < _LOW_SPREAD:
            if self._best > 2 * _LOW_SPREAD:
                return "collapsed"
            return "late" if step >= self._patience else "narrow"
        if rank < _LOW_RANK and step >= self._patience:
            return "line"
        # Falling has to be undone before it counts as open again.
        limit = _FALL if self._state != "falling" else 0.75
        return "falling" if spread < limit * self._best else "open"

    def _sentence(self, state):
        return {
            "narrow": "all embeddings still point almost the same way, as "
            "those of untrained networks do",
            "late": "all embeddings still point almost the same way: the "
            "encoder is not learning to tell images apart; compare `contrast` "
            "with the value printed at the start, and try another learning "
            "rate or temperature",
            "line": "all embeddings lie near one line: they tell images apart "
            "by one property only, such as brightness; compare kNN accuracies",
            "open": "the embeddings spread: the encoder tells images apart",
            "falling": "the embeddings are drawing together: their spread is "
            f"below half of its best of {self._best:.3f}; a collapse may be "
            "under way",
            "collapsed": "the embeddings have collapsed: all images look alike "
            "to the encoder; lower --base_lr or raise the temperatures, and "
            "start from an earlier checkpoint",
        }[state]
