"""Evaluates a run; writes its pictures and summary.json."""

import json
import os

from clsa_tf import files, methods
from clsa_tf.data.open import open_train_source
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.evaluation import features, protocols
from clsa_tf.evaluation.protocols import PROTOCOLS
from clsa_tf.evaluation.task import plan
from clsa_tf.networks.encoder import make_encoder
from clsa_tf.plots import curves as curves_plot
from clsa_tf.plots import sheet
from clsa_tf.plots.neighbours import neighbours_grid, short_name
from clsa_tf.terminal import progress
from clsa_tf.training import metrics_log, outcome
from clsa_tf.training.checkpoint import load_trained

_ENCODERS = ("pixels", "untrained", "trained")


def report(workdir, *, savedmodel=""):
    """Evaluates the run in `workdir` and writes its summary and pictures.

    Args:
        workdir: directory of the run.
        savedmodel: path of its export, for the summary; empty: the newest
            version in `<workdir>/savedmodel`, if any.

    Returns:
        dict: for each protocol of `clsa_tf.evaluation.protocols`, such as
        `knn`, the accuracies `knn_pixels`, `knn_untrained`, `knn_trained` (in
        [0, 1]; None without labels); `no_knn_because` (reason for None,
        otherwise None),
        `savedmodel` (path or None), `train_seconds`, `pictures` (list of
        paths), and the keys of `clsa_tf.training.outcome.of`.
    """
    with progress.waiting("loading the encoder"):
        trained = load_trained(workdir)
    config = trained.config
    unreadable = UnreadableImages(max_bad_share=config.max_bad_share)
    source = open_train_source(config)
    evaluation = plan(config, source)
    title = f"{config.method}, {config.backbone}, {describe(trained, source)}"

    task = evaluation.task(unreadable)
    with progress.waiting("encoding images, for the neighbours of each"):
        found = task.features(features.compiled(trained.encoder))
    accuracies = {}
    if evaluation.has_accuracy:
        accuracies = _accuracies(config, task, found)

    names = ("views.png", "neighbours.png", "curves.png")
    views, neighbours, curves = (os.path.join(workdir, name) for name in names)
    grid = neighbours_grid(evaluation, task, found, unreadable, title=title)
    sheet.sheet([grid], neighbours)
    method_class = methods.class_of(config)
    curves_plot.curves(
        metrics_log.read(workdir),
        curves,
        title=title,
        chance_loss=method_class.chance_loss(config),
        unit=method_class.loss_unit,
        baselines={
            label: accuracies[name]
            for label, name in (
                ("raw pixels", "knn_pixels"),
                ("untrained", "knn_untrained"),
            )
            if name in accuracies
        },
    )
    summary = {
        f"{protocol}_{encoder}": accuracies.get(f"{protocol}_{encoder}")
        for protocol in PROTOCOLS
        for encoder in _ENCODERS
    }
    summary |= {
        "no_knn_because": evaluation.no_accuracy or None,
        "savedmodel": savedmodel
        or files.newest_savedmodel(os.path.join(workdir, "savedmodel")),
        "train_seconds": round(trained.seconds, 1),
        "pictures": [views, neighbours, curves],
    } | outcome.of(workdir, trained)
    files.write_atomically(
        os.path.join(workdir, "summary.json"),
        json.dumps(summary, indent=2) + "\n",
    )
    return summary


def _accuracies(config, task, trained):
    """Evaluates every protocol on pixels, untrained and trained encoder.

    Args:
        config: `clsa_tf.config.Config`.
        task: `clsa_tf.evaluation.task.Task`.
        trained: `task.features` of the trained encoder.

    Returns:
        dict: `<protocol>_<encoder>` -> accuracy in [0, 1].
    """
    titles = " and ".join(protocols.load(name).TITLE for name in PROTOCOLS)
    found = {"trained": trained}
    with progress.waiting(f"{titles} accuracy of raw pixels"):
        found["pixels"] = task.features(features.pixels)
    with progress.waiting(f"{titles} accuracy of the untrained encoder"):
        untrained = make_encoder(config, name="untrained")
        found["untrained"] = task.features(features.compiled(untrained))
    return {
        f"{protocol}_{encoder}": task.accuracy_of(*found[encoder], protocol)
        for protocol in PROTOCOLS
        for encoder in _ENCODERS
    }


def describe(trained, source):
    """Describes the dataset and the length of a run, for titles.

    Args:
        trained: `clsa_tf.training.checkpoint.Trained`.
        source: `Source` of the training images.
    """
    total = trained.config.total_epochs
    done = trained.step / trained.config.steps_per_epoch(source.size)
    epochs = f"{total}" if done >= total else f"{done:.3g} of {total}"
    name = short_name(source.name)
    word = "epoch" if epochs == "1" else "epochs"
    return f"{source.size} images of {name}, {epochs} {word}"


def show(summary):
    """Prints a summary that `report` returned."""
    for protocol in PROTOCOLS:
        title = protocols.load(protocol).TITLE
        for name in _ENCODERS:
            value = summary[f"{protocol}_{name}"]
            if value is not None:
                print(f"  {title} accuracy, {name:<10} {100 * value:5.1f} %")
    if summary["no_knn_because"]:
        print(f"  no kNN accuracy: {summary['no_knn_because']}")
    print(f"  trained for            {summary['train_seconds'] / 60:5.1f} min")
    for change in outcome.history(summary):
        print(f"  changed                {change}")
    if summary["savedmodel"]:
        print(f"  SavedModel             {summary['savedmodel']}")
    for path in summary["pictures"]:
        print(f"  picture                {path}")
    for _, sentence in outcome.warnings(summary):
        print(f"  warning: {sentence}")
