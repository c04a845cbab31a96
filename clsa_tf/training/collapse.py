"""Whether embeddings still tell images apart, in numbers and in words."""

import typing

# Where words begin: below, the embeddings are as good as one, or as a line.
_LOW_SPREAD = 0.05
_LOW_RANK = 2.0
# Above, words say so without reserve; networks begin anywhere below.
_HIGH_SPREAD = 0.5
# Below this share of the best so far there is something to be said, too.
_FALL = 0.5
# Steps after which a narrow cone is no longer a beginning, or an epoch's if
# those are more.
PATIENCE = 500


class Verdict(typing.NamedTuple):
    """Whether the embeddings tell images apart.

    Attributes:
        state: "open" (they do), "narrow" (not yet, as at the beginning), "late"
            (never did, long after the beginning), "line" (by one property
            only), "falling" (less and less) or "collapsed" (no longer).
        step: at which they were measured.
        words: what that means, with the figures, without a capital or a stop.
    """

    state: str
    step: int
    words: str

    @property
    def unusable(self):
        """Whether the encoder is not worth using, bool."""
        return self.state in ("late", "line", "collapsed")


def verdict(entries, dimension):
    """Judges a run by what it logged.

    Args:
        entries: list of dictionaries, as `metrics.read` returns it.
        dimension: D, width of the embedding: `options.projection_size`.

    Returns:
        the `Verdict` at the last of the entries that have the measures, or None
        if none has.
    """
    measured = [e for e in entries if {"spread", "rank", "uniformity"} <= {*e}]
    if not measured:
        return None
    last = measured[-1]
    epoch = round(last["step"] / last["epoch"]) if last.get("epoch") else 0
    watch = Watch(dimension, patience=max(PATIENCE, epoch))
    return [watch.judge(entry["step"], entry) for entry in measured][-1]


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
        before = self._state
        now = self.judge(step, values)
        if now.state == before:
            return ""
        if now.state == "open" and not before:
            return ""  # as it should be, from the first look on
        return f"step {step}: {now.words}"

    def judge(self, step, values):
        """Returns the `Verdict` at `step`; the arguments are those of `words`.

        It depends on what was seen before: a collapse is one of embeddings that
        were spread out.
        """
        spread, rank = values["spread"], values["rank"]
        self._state = self._judge(step, spread, rank)
        self._best = max(self._best, spread)
        figures = (
            f"spread {spread:.3f} of 1, rank {rank:.1f} of {self._dimension}, "
            f"uniformity {values['uniformity']:.2f}"
        )
        return Verdict(
            self._state, step, f"{self._sentence(spread)} ({figures})"
        )

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

    def _sentence(self, spread):
        state = self._state
        if state == "open" and spread < _HIGH_SPREAD:
            state = "partly"
        return {
            "narrow": "all embeddings still point almost the same way, as "
            "those of untrained networks do",
            "late": "all embeddings still point almost the same way: whatever "
            "the loss says, the encoder is not learning to tell images apart; "
            "try a lower --base_lr or higher temperatures",
            "line": "all embeddings lie near one line: they tell images apart "
            "by one property only, such as brightness; compare kNN accuracies",
            "partly": "the embeddings of different images differ, as those of "
            "some untrained networks do",
            "open": "the embeddings have spread out",
            "falling": "the embeddings are drawing together: their spread is "
            f"below half of its best of {self._best:.3f}; a collapse may be "
            "under way",
            "collapsed": "the embeddings have collapsed: all images look alike "
            "to the encoder; lower --base_lr or raise the temperatures, and "
            "start from an earlier checkpoint",
        }[state]
