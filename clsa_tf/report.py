"""Sums up a run: evaluates it, draws pictures and writes summary.json.

    python -m clsa_tf.report --workdir=runs/quickstart

Prints nearest-neighbour accuracies and the paths of the pictures, which are in
the run's directory.
"""

import json
import os

import numpy as np
from absl import flags

from clsa_tf import copyable, entry, files, methods, metrics, outcome, pictures
from clsa_tf.checkpoint import load_trained
from clsa_tf.data.faults import Faults
from clsa_tf.data.sources import open_train_source
from clsa_tf.evaluation import features, knn
from clsa_tf.evaluation.task import knn_task
from clsa_tf.methods.base import make_encoder
from clsa_tf.spelling import define_path, require


def report(workdir, *, savedmodel=""):
    """Evaluates the run in `workdir` and writes its summary and pictures.

    Args:
        workdir: directory of the run.
        savedmodel: path of its export, to be named in the summary; empty: the
            newest version in `<workdir>/savedmodel`, if any.

    Returns:
        dictionary: `knn_pixels`, `knn_untrained`, `knn_trained` (in [0, 1];
        None where the dataset has no labels), `savedmodel` (path or None),
        `train_seconds`, `pictures` (list of paths), and those of
        `clsa_tf.outcome.of`.
    """
    trained = load_trained(workdir)
    config, encoder = trained.config, trained.encoder
    faults = Faults(max_bad_share=config.max_bad_share)
    task = knn_task(config, open_train_source(config), faults)
    summary = {"knn_pixels": None, "knn_untrained": None, "knn_trained": None}
    paths = [os.path.join(workdir, "views.png")]
    if task:
        print("kNN of raw pixels, of the untrained and of the trained encoder")
        untrained = make_encoder(config, name="untrained")
        encode = features.compiled(encoder)
        summary = {
            "knn_pixels": task.accuracy(features.pixels),
            "knn_untrained": task.accuracy(features.compiled(untrained)),
            "knn_trained": task.accuracy(encode),
        }
        paths.append(os.path.join(workdir, "neighbours.png"))
        draw_neighbours(task, encode, paths[-1])
    paths.append(os.path.join(workdir, "curves.png"))
    learner = methods.load(config.method).METHOD
    pictures.curves(
        metrics.read(workdir),
        paths[-1],
        useless=learner.useless(config),
        unit=learner.unit,
        baselines={
            "raw pixels": summary["knn_pixels"],
            "untrained": summary["knn_untrained"],
        }
        if task
        else {},
    )
    summary |= {
        "savedmodel": savedmodel
        or files.newest_savedmodel(os.path.join(workdir, "savedmodel")),
        "train_seconds": round(trained.seconds, 1),
        "pictures": paths,
    } | outcome.of(workdir, trained)
    files.write_atomically(
        os.path.join(workdir, "summary.json"),
        json.dumps(summary, indent=2) + "\n",
    )
    return summary


def draw_neighbours(task, function, path, *, rows=6, columns=8):
    """Draws the nearest images of the bank beside some of the queries."""
    (bank, _), (queries, _) = task.features(function)
    # Spread over the dataset: its order may be by class.
    chosen = np.linspace(0, len(queries) - 1, rows).astype(int)
    _, found = knn.neighbours(bank, queries[chosen], k=columns)
    images = _pick(task.bank, found.ravel())
    pictures.neighbours(
        _pick(task.queries, chosen),
        images.reshape(rows, columns, *images.shape[1:]),
        path,
    )


def _pick(batches, rows):
    """Images uint8 `[len(rows), S, S, 3]` at `rows` of a dataset of batches."""
    wanted, start = {}, 0
    for images, _ in batches:
        for row in set(rows.tolist()):
            if start <= row < start + len(images):
                wanted[row] = images[row - start].numpy()
        start += len(images)
    return np.stack([wanted[row] for row in rows.tolist()])


def show(summary):
    """Prints a summary for a person."""
    for name in ("pixels", "untrained", "trained"):
        value = summary[f"knn_{name}"]
        if value is not None:
            print(f"  kNN accuracy, {name:<10} {100 * value:5.1f} %")
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
