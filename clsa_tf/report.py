"""Sums up a run: evaluates it, draws pictures and writes summary.json.

    python -m clsa_tf.report --workdir=runs/quickstart

Prints nearest-neighbour accuracies and the paths of the pictures, which are in
the run's directory.
"""

import json
import os

import numpy as np
from absl import flags

from clsa_tf import (
    copyable,
    entry,
    files,
    methods,
    metrics,
    outcome,
    pictures,
    progress,
)
from clsa_tf.checkpoint import load_trained
from clsa_tf.data.faults import Faults
from clsa_tf.data.sources import open_train_source
from clsa_tf.evaluation import features, knn
from clsa_tf.evaluation.task import plan
from clsa_tf.methods.base import make_encoder
from clsa_tf.spelling import define_path, require
from clsa_tf.text import abbreviated, printable

_SIDE = 112  # of an image among neighbours, in px
RIGHT, WRONG = "#1a9641", "#d7191c"  # green and red that differ in lightness


def report(workdir, *, savedmodel=""):
    """Evaluates the run in `workdir` and writes its summary and pictures.

    Args:
        workdir: directory of the run.
        savedmodel: path of its export, to be named in the summary; empty: the
            newest version in `<workdir>/savedmodel`, if any.

    Returns:
        dictionary: `knn_pixels`, `knn_untrained`, `knn_trained` (in [0, 1];
        None where there are no labels), `no_knn_because` (why there are none,
        or None), `savedmodel` (path or None), `train_seconds`, `pictures`
        (list of paths), and those of `clsa_tf.outcome.of`.
    """
    with progress.waiting("loading the encoder"):
        trained = load_trained(workdir)
    config = trained.config
    faults = Faults(max_bad_share=config.max_bad_share)
    source = open_train_source(config)
    evaluation = plan(config, source)
    title = f"{config.method}, {config.backbone}, {describe(trained, source)}"

    task = evaluation.task(faults)
    with progress.waiting("encoding images, for the neighbours of each"):
        found = task.features(features.compiled(trained.encoder))
    accuracies = {}
    if not evaluation.no_accuracy:
        with progress.waiting("kNN accuracy of raw pixels"):
            accuracies["pixels"] = task.accuracy(features.pixels)
        with progress.waiting("kNN accuracy of the untrained encoder"):
            untrained = make_encoder(config, name="untrained")
            untrained = features.compiled(untrained)
            accuracies["untrained"] = task.accuracy(untrained)
        accuracies["trained"] = task.accuracy_of(*found)

    names = ("views.png", "neighbours.png", "curves.png")
    views, neighbours, curves = (os.path.join(workdir, name) for name in names)
    grid = neighbours_grid(evaluation, task, found, faults, title=title)
    pictures.sheet([grid], neighbours)
    learner = methods.load(config.method).METHOD
    pictures.curves(
        metrics.read(workdir),
        curves,
        title=title,
        useless=learner.useless(config),
        unit=learner.unit,
        baselines={
            label: accuracies[name]
            for label, name in (
                ("raw pixels", "pixels"),
                ("untrained", "untrained"),
            )
            if name in accuracies
        },
    )
    summary = {
        f"knn_{name}": accuracies.get(name)
        for name in ("pixels", "untrained", "trained")
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


def describe(trained, source):
    """What a run was trained on and how long, for titles.

    Args:
        trained: `clsa_tf.checkpoint.Trained`.
        source: `Source` that it trains on.
    """
    total = trained.config.total_epochs
    done = trained.step / max(1, source.size // trained.config.batch_size)
    epochs = f"{total}" if done >= total else f"{done:.3g} of {total}"
    name = _short(source.name)
    word = "epoch" if epochs == "1" else "epochs"
    return f"{source.size} images of {name}, {epochs} {word}"


def _short(name):
    return abbreviated(printable(name), lambda text: len(text) <= 48)


def neighbours_grid(
    evaluation, task, found, faults, *, title, rows=6, columns=8
):
    """The nearest images of the bank beside some of the queries.

    Args:
        evaluation: `clsa_tf.evaluation.task.Evaluation`.
        task: its `KnnTask`.
        found: what `task.features` made of an encoder.
        faults: `Faults`, which counts unreadable images.
        title: of the picture.
        rows: queries, at most.
        columns: neighbours of each, at most.

    Returns:
        `pictures.Grid`, a query and its neighbours in each row.
    """
    (bank, _), (queries, _) = found
    own = task.own(len(queries))
    # Spread over the dataset: its order may be by class.
    chosen = np.linspace(0, len(queries) - 1, min(rows, len(queries)))
    chosen = chosen.astype(int)
    columns = min(columns, len(bank) - (own is not None))
    cosines, nearest = knn.neighbours(
        bank,
        queries[chosen],
        k=columns,
        own=None if own is None else own[chosen],
    )
    shown = _pick(evaluation.query_batches(faults, names=True), chosen)
    others = _pick(evaluation.bank_batches(faults, names=True), nearest.ravel())
    names = [name for _, _, name in [*shown.values(), *others.values()]]
    captions = _Captions(evaluation, names)
    cells = [
        [captions.query(shown[row])]
        + [
            captions.neighbour(others[n], shown[row], cosine)
            for n, cosine in zip(nearest[i], cosines[i])
        ]
        for i, row in enumerate(chosen)
    ]
    titles = ["image"] + [f"nearest {i + 1}" for i in range(columns)]
    title += f"\n{captions.title}"
    return pictures.Grid(title, titles, [""] * len(cells), cells, _SIDE)


def _pick(batches, rows):
    """What stands at some rows of a dataset of batches.

    Args:
        batches: dataset of (images, labels, names), see `evaluation_batches`.
        rows: array of int.

    Returns:
        dictionary, row -> (uint8 `[S, S, 3]`, label, name as str).
    """
    wanted, start, picked = set(rows.tolist()), 0, {}
    for images, labels, names in batches:
        end = start + len(images)
        for row in [row for row in wanted if start <= row < end]:
            i = row - start
            name = printable(names[i].numpy())
            picked[row] = images[i].numpy(), int(labels[i]), name
        start = end
    return picked


class _Captions:
    """What is written below the images of `neighbours.png`."""

    def __init__(self, evaluation, names):
        """Takes the names of all images, to leave out what they begin with."""
        self._bank = _short(evaluation.bank.name)
        self._classes = None
        if not evaluation.no_accuracy:
            self._classes = evaluation.bank.class_names
        self._prefix = len(os.path.commonprefix(names).rpartition("/")[0])

    @property
    def title(self):
        """How to read them."""
        text = f"nearest images of {self._bank}, by cosine of the features"
        if self._classes:
            text += "; green: the same class, red: another one"
        return text

    def query(self, picked):
        """The image whose neighbours follow, as `pictures.Cell`."""
        image, label, name = picked
        return pictures.Cell(image, self._lines(label, name, []))

    def neighbour(self, picked, query, cosine):
        """One of its neighbours, as `pictures.Cell`."""
        image, label, name = picked
        lines = self._lines(label, name, [f"cosine {cosine:.2f}"])
        frame = ""
        if self._classes:
            frame = RIGHT if label == query[1] else WRONG
        return pictures.Cell(image, lines, frame)

    def _lines(self, label, name, more):
        folder, _, file = name[self._prefix :].rpartition("/")
        if self._classes:  # more often than not it is the folder
            return [printable(self._classes[label]), file, *more]
        return [file, *more, folder.lstrip("/")]


def show(summary):
    """Prints a summary for a person."""
    for name in ("pixels", "untrained", "trained"):
        value = summary[f"knn_{name}"]
        if value is not None:
            print(f"  kNN accuracy, {name:<10} {100 * value:5.1f} %")
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


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path("workdir", None, "directory of the run to sum up", flag_values)
    define_path(
        "savedmodel",
        "",
        "path of its export, named in the summary; empty: the newest in "
        "<workdir>/savedmodel",
        flag_values,
    )
    require(flag_values, "workdir")


def main():
    """Reads the flags, reports and prints."""
    values = flags.FLAGS
    summary = report(values.workdir, savedmodel=values.savedmodel)
    show(summary)
    if not summary["savedmodel"]:
        export = copyable.of_module(
            "export.savedmodel",
            workdir=values.workdir,
            output=os.path.join(values.workdir, "savedmodel"),
        )
        print(f"to export the encoder, type\n  {export}")


if __name__ == "__main__":
    entry.launch(main, define_flags)
