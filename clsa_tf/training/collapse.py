"""Detects collapse: judges how much the projections of images differ."""

import typing

# Thresholds of the spread and the rank. Below them the projections are almost a
# point, or almost a line.
_LOW_SPREAD = 0.05
_LOW_RANK = 2.0
# Above this spread the projections count as spread out. Untrained networks may
# have any lower spread.
_HIGH_SPREAD = 0.5
# Below this share of the best spread so far the spread is falling.
_FALL = 0.5
# Steps within which a narrow cone is normal, or the steps of an epoch if these
# are more.
PATIENCE = 500


class Verdict(typing.NamedTuple):
    """Whether the projections of different images differ.

    Attributes:
        state: "open" (they differ), "narrow" (not yet, normal at the
            beginning), "late" (still not, long after the beginning), "line"
            (in one property only), "falling" (less and less) or "collapsed"
            (no longer).
        step: step of the measurement.
        words: the verdict with its figures, as a clause without capital and
            full stop.
    """

    state: str
    step: int
    words: str

    @property
    def unusable(self):
        """Whether the encoder is unusable, bool."""
        return self.state in ("late", "line", "collapsed")


def verdict(entries, dimension):
    """Judges a run by its metrics.

    Args:
        entries: list of dict, see `metrics_log.read`.
        dimension: D, width of the projection: `options.projection_size`.

    Returns:
        `Verdict` of the last entry with `spread`, `rank` and `uniformity`, or
        None if there is no such entry.
    """
    measured = [e for e in entries if {"spread", "rank", "uniformity"} <= {*e}]
    if not measured:
        return None
    last = measured[-1]
    epoch = round(last["step"] / last["epoch"]) if last.get("epoch") else 0
    watch = Watch(dimension, patience=max(PATIENCE, epoch))
    return [watch.judge(entry["step"], entry) for entry in measured][-1]


class Watch:
    """Reports changes in the state of the projections.

    The projections of an untrained network lie in a narrow cone, and leave it
    within the first hundreds of steps. A narrow cone is reported as a fact
    until then, and as a warning afterwards.

    Args:
        dimension: D, width of the projection.
        patience: number of steps within which a narrow cone is normal.
    """

    def __init__(self, dimension, *, patience):
        """See the class."""
        self._dimension = dimension
        self._patience = patience
        self._state = ""
        self._best = 0.0

    def words(self, step, values):
        """Returns a sentence if the state has changed at `step`, otherwise "".

        Args:
            step: steps taken.
            values: dict with `spread`, `rank` and `uniformity`.
        """
        before = self._state
        now = self.judge(step, values)
        if now.state == before:
            return ""
        if now.state == "open" and not before:
            return ""  # good from the first measurement on
        return f"step {step}: {now.words}"

    def judge(self, step, values):
        """Returns the `Verdict` at `step`; for the arguments see `words`.

        It depends on earlier calls: only projections that were spread out can
        collapse.
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
        # Hysteresis: after falling, "open" needs a higher spread.
        limit = _FALL if self._state != "falling" else 0.75
        return "falling" if spread < limit * self._best else "open"

    def _sentence(self, spread):
        state = self._state
        if state == "open" and spread < _HIGH_SPREAD:
            state = "partly"
        return {
            "narrow": "all projections still point almost the same way, as "
            "those of untrained networks do",
            "late": "all projections still point almost the same way: the "
            "encoder does not learn to distinguish images, even if the loss "
            "falls; try a lower --base_lr or higher temperatures",
            "line": "all projections lie near one line: they distinguish "
            "images by one property only, such as brightness; compare kNN "
            "accuracies",
            "partly": "the projections of different images differ, as those of "
            "some untrained networks do",
            "open": "the projections have spread out",
            "falling": "the projections are drawing together: their spread is "
            f"below half of its best of {self._best:.3f}; a collapse may be "
            "under way",
            "collapsed": "the projections have collapsed: all images look "
            "alike to the encoder; lower --base_lr or raise the temperatures, "
            "and start from an earlier checkpoint",
        }[state]
