"""Draws images and their nearest neighbours by cosine of the features."""

import os

import numpy as np

from clsa_tf.evaluation import knn
from clsa_tf.plots import sheet
from clsa_tf.text import abbreviated, printable

_SIDE = 112  # side of an image, in px
RIGHT, WRONG = "#1a9641", "#d7191c"  # green and red of different lightness


def short_name(name):
    """Abbreviates the name of a source for a title."""
    return abbreviated(printable(name), lambda text: len(text) <= 48)


def neighbours_grid(
    evaluation, task, found, unreadable, *, title, rows=6, columns=8
):
    """Arranges some queries and their nearest images of the bank.

    Args:
        evaluation: `clsa_tf.evaluation.task.Evaluation`.
        task: its `Task`.
        found: result of `task.features` for an encoder.
        unreadable: `UnreadableImages`, which counts unreadable images.
        title: title of the grid.
        rows: largest number of queries.
        columns: largest number of neighbours of each query.

    Returns:
        `sheet.Grid` with one query and its neighbours per row.
    """
    (bank, _), (queries, _) = found
    own = task.own(len(queries))
    # Evenly spaced, because the dataset may be sorted by class.
    chosen = np.linspace(0, len(queries) - 1, min(rows, len(queries)))
    chosen = chosen.astype(int)
    columns = min(columns, len(bank) - (own is not None))
    cosines, nearest = knn.neighbours(
        bank,
        queries[chosen],
        k=columns,
        own=None if own is None else own[chosen],
    )
    shown = _pick(evaluation.query_batches(unreadable, names=True), chosen)
    others = _pick(
        evaluation.bank_batches(unreadable, names=True), nearest.ravel()
    )
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
    return sheet.Grid(title, titles, [""] * len(cells), cells, _SIDE)


def _pick(batches, rows):
    """Selects some rows of a dataset of batches.

    Args:
        batches: dataset of (images, labels, names), see `evaluation_batches`.
        rows: array of int.

    Returns:
        dict, row -> (image uint8 `[S, S, 3]`, label int, name str).
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
    """Captions of the images in `neighbours.png`."""

    def __init__(self, evaluation, names):
        """Captions omit the directory that all `names` share."""
        self._bank = short_name(evaluation.bank.name)
        self._classes = None
        if evaluation.has_accuracy:
            self._classes = evaluation.bank.class_names
        self._prefix = len(os.path.commonprefix(names).rpartition("/")[0])

    @property
    def title(self):
        """Text that explains the captions."""
        text = f"nearest images of {self._bank}, by cosine of the features"
        if self._classes:
            text += "; green: the same class, red: another one"
        return text

    def query(self, picked):
        """The `sheet.Cell` of a query."""
        image, label, name = picked
        return sheet.Cell(image, self._lines(label, name, []))

    def neighbour(self, picked, query, cosine):
        """The `sheet.Cell` of a neighbour of `query`."""
        image, label, name = picked
        lines = self._lines(label, name, [f"cosine {cosine:.2f}"])
        frame = ""
        if self._classes:
            frame = RIGHT if label == query[1] else WRONG
        return sheet.Cell(image, lines, frame)

    def _lines(self, label, name, more):
        folder, _, file = name[self._prefix :].rpartition("/")
        if self._classes:  # usually the name of the folder, so omit the folder
            return [printable(self._classes[label]), file, *more]
        return [file, *more, folder.lstrip("/")]
