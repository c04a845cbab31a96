"""Summary that a run prints at its end: results and the next commands."""

import os
import statistics

from clsa_tf import methods
from clsa_tf.terminal import shell
from clsa_tf.text import counted
from clsa_tf.training import collapse, metrics_log


def of_run(config, *, step, steps_per_epoch, seconds, unreadable=""):
    """Returns the summary of a complete run.

    Args:
        config: `clsa_tf.config.Config`.
        step: steps taken.
        steps_per_epoch: int.
        seconds: time spent in training, over all starts.
        unreadable: sentence about unreadable images, or "".

    Returns:
        str of several lines, without a final newline.
    """
    entries = metrics_log.read(config.workdir)
    lines = [
        f"trained for {counted(step / steps_per_epoch, 'epoch')}, "
        f"{counted(step, 'step')}, in {_duration(seconds)}" + _speed(entries),
        *_loss(config, entries),
        *_knn(entries),
        *_projections(config, entries),
        *([unreadable] if unreadable else []),
        f"results are in {config.workdir}; to evaluate and export them, type",
        "  " + shell.of_module("clsa_tf.report", workdir=config.workdir),
        "  "
        + shell.of_module(
            "export.savedmodel",
            workdir=config.workdir,
            output=os.path.join(config.workdir, "savedmodel"),
        ),
    ]
    return "\n".join(lines)


def _duration(seconds):
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _speed(entries):
    found = [
        e["images_per_second"] for e in entries if "images_per_second" in e
    ]
    # Not the mean: compilation slows down the first steps.
    if not found:
        return ""
    return f", {statistics.median(found):,.0f} images/s (median)"


def _loss(config, entries):
    """Line with the last loss and the chance-level loss, if it is known."""
    # Methods without DDM log no "contrast": it is all of their loss.
    name = "contrast" if any("contrast" in e for e in entries) else "loss"
    values = [e[name] for e in entries if name in e]
    if not values:
        return []
    method_class = methods.class_of(config)
    chance = method_class.chance_loss(config)
    line = f"  {name:<12} {values[-1]:.3f} {method_class.loss_unit}"
    if chance is not None:
        line += f", at chance level {chance:.3f}"
    return [line]


def _knn(entries):
    found = [e for e in entries if "knn" in e]
    if not found:
        return []
    best, last = max(found, key=lambda e: e["knn"]), found[-1]
    if best["knn"] == last["knn"]:
        return [f"  kNN accuracy {last['knn']:.1%}, the best so far"]
    return [
        f"  kNN accuracy {last['knn']:.1%}, at best {best['knn']:.1%} after "
        f"epoch {best['epoch']:g}"
    ]


def _projections(config, entries):
    found = collapse.verdict(entries, config.options.projection_size)
    if found is None:
        return []
    warning = "  warning: " if found.unusable else "  "
    return [warning + found.words]
