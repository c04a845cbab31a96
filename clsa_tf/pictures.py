"""Pictures: of a run's views, curves and neighbours, and captioned sheets."""

import contextlib
import dataclasses
import io
import os

import matplotlib
import numpy as np
import tensorflow as tf

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib.figure import Figure  # noqa: E402

_DPI = 100
# Of the text of `sheet`, in px but for the first.
_POINTS = 8
_CHARACTER, _LINE, _GAP = 7, 14, 8


def views(batch, names, path, *, rows=6):
    """Draws what each view makes of the same images.

    Args:
        batch: dictionary, view name -> uint8 `[G, S, S, 3]`, as
            `training_batches` yields it.
        names: views to show, one column each.
        path: PNG file to write.
        rows: images to show, at most.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    columns = [in_order(batch, name, batch[name])[:rows] for name in names]
    side = max(images.shape[1] for images in columns)
    columns = [
        tf.image.resize(images, [side, side], "nearest").numpy()
        for images in columns
    ]
    titles = [
        f"{name}, {batch[name].shape[1]} px".replace("_", " ") for name in names
    ]
    cells = np.stack(columns, axis=1)  # [rows, columns, side, side, 3]
    return gallery(cells, titles, path)


def in_order(batch, name, rows):
    """Puts rows of a view that was shuffled back into the batch's order.

    Args:
        batch: dictionary, as `training_batches` yields it.
        name: of the view.
        rows: its images, `batch[name]`, or what was drawn for them; a tensor
            or a structure of tensors, `[G, ...]`.

    Returns:
        `rows` as arrays; row n belongs to example n.
    """
    shuffled = f"{name}_rows" in batch
    order = np.argsort(batch[f"{name}_rows"]) if shuffled else slice(None)
    return tf.nest.map_structure(lambda x: np.asarray(x)[order], rows)


def gallery(cells, titles, path):
    """Draws a grid of images with a title over each column.

    Args:
        cells: uint8 `[rows, columns, H, W, 3]`.
        titles: a string for each column.
        path: PNG file to write.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # It is slow to import, and says then which Keras it uses.
        from keras_cv import visualization

    rows, columns = cells.shape[:2]
    figure = visualization.plot_image_gallery(
        cells.reshape(-1, *cells.shape[2:]),
        value_range=(0, 255),
        rows=rows,
        cols=columns,
    )
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title)
    picture = _write(figure, path)
    matplotlib.pyplot.close(figure)
    return picture


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images with words, for `sheet`.

    Attributes:
        title: stands above the grid.
        columns: lines of text above each column, a string with newlines.
        labels: text to the left of each row; empty strings for none.
        cells: for each row a list of (image uint8 `[H, W, 3]`, list of the
            lines under it); a row may be shorter than `columns`.
        side: of the square that an image is fitted into, in px.
    """

    title: str
    columns: list
    labels: list
    cells: list
    side: int


def sheet(grids, path):
    """Draws grids of captioned images, one below the other, on white.

    Args:
        grids: list of `Grid`.
        path: PNG file to write.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    sizes = [_grid_size(grid) for grid in grids]
    width = max(size[0] for size in sizes)
    height = sum(size[1] for size in sizes)
    figure = Figure(figsize=(width / _DPI, height / _DPI), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are pixels
    top = 0
    for grid, size in zip(grids, sizes):
        _draw_grid(axes, grid, top)
        top += size[1]
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return _write(figure, path)


def _grid_size(grid):
    """Width and height in px, margins included."""
    width = len(grid.columns) * (grid.side + _GAP) + _label_width(grid)
    # The title may be wider than the images.
    width = max(width, _text_width(grid.title)) + _GAP
    rows = sum(_row_height(grid, row) for row in grid.cells)
    return width, _head_height(grid) + rows + _LINE


def _label_width(grid):
    longest = max(map(_text_width, grid.labels))
    return longest + _GAP if longest else 0


def _text_width(text):
    return max(_CHARACTER * len(line) for line in text.split("\n"))


def _head_height(grid):
    lines = 1 + max(text.count("\n") for text in grid.columns)
    return _GAP + 2 * _LINE + lines * _LINE


def _row_height(grid, row):
    return grid.side + max(len(lines) for _, lines in row) * _LINE + _GAP


def _draw_grid(axes, grid, top):
    def write(x, y, text, **style):
        axes.text(
            x, y, text, fontsize=_POINTS, linespacing=1.15, va="top", **style
        )

    first = _GAP + _label_width(grid)
    lefts = [first + i * (grid.side + _GAP) for i in range(len(grid.columns))]
    write(_GAP, top + _GAP, grid.title, weight="bold")
    for x, text in zip(lefts, grid.columns):
        write(x, top + _GAP + 2 * _LINE, text)
    y = top + _head_height(grid)
    for label, row in zip(grid.labels, grid.cells):
        write(_GAP, y, label)
        for x, (image, lines) in zip(lefts, row):
            height, width = image.shape[:2]
            scale = grid.side / max(height, width)
            axes.imshow(
                image,
                extent=(x, x + scale * width, y + scale * height, y),
                aspect="auto",
            )
            write(x, y + scale * height + 2, "\n".join(lines))
        y += _row_height(grid, row)


def curves(entries, path, *, useless, unit, baselines):
    """Draws the curves of a run over its epochs.

    Args:
        entries: dictionaries of `metrics.jsonl`.
        path: PNG file to write.
        useless: contrast of an encoder that has learned nothing.
        unit: of the contrast.
        baselines: dictionary, name -> kNN accuracy, drawn as level lines.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    contrast, divergence, accuracy = figure.subplots(1, 3)
    contrast.axhline(
        useless, color="gray", linestyle=":", label=f"useless: {useless:.2f}"
    )
    # A method without DDM has nothing but the contrast in its loss.
    name = "contrast" if any("contrast" in e for e in entries) else "loss"
    _line(contrast, entries, name)
    contrast.set_ylabel(unit)
    _line(divergence, entries, "ddm_kl", "divergence from the weak views")
    divergence.set_ylabel("nats")
    _line(accuracy, entries, "contrast_accuracy", "contrast accuracy")
    _line(accuracy, entries, "knn", "kNN accuracy")
    for (label, level), style in zip(baselines.items(), (":", "--")):
        accuracy.axhline(
            level, color="gray", linestyle=style, label=f"kNN, {label}"
        )
    accuracy.set_ylim(0, 1)
    for axes in (contrast, divergence, accuracy):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    _write(figure, path)


def neighbours(queries, found, path):
    """Draws images beside the images nearest to them.

    Args:
        queries: uint8 `[Q, S, S, 3]`.
        found: uint8 `[Q, k, S, S, 3]`, nearest first.
        path: PNG file to write.
    """
    cells = np.concatenate([queries[:, np.newaxis], found], axis=1)
    titles = ["image"] + [f"nearest {i + 1}" for i in range(found.shape[1])]
    gallery(cells, titles, path)


def _line(axes, entries, name, label=None):
    points = [(e["epoch"], e[name]) for e in entries if name in e]
    if points:
        marker = "o" if name == "knn" else None
        axes.plot(*zip(*points), label=label or name, marker=marker, ms=3)


def _write(figure, path):
    """Writes a figure atomically; returns it as uint8 `[H, W, 3]`."""
    draft = path + ".tmp"
    figure.savefig(draft, format="png", dpi=_DPI)
    os.replace(draft, path)
    return tf.io.decode_png(tf.io.read_file(path), channels=3).numpy()
