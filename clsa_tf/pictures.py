"""Pictures: of a run's views, curves and neighbours, and captioned sheets."""

import dataclasses
import math
import os
import typing

import matplotlib
import numpy as np
import tensorflow as tf

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

from clsa_tf.text import abbreviated  # noqa: E402

_DPI = 100
# Of the text of `sheet`, in px but for the first.
_POINTS = 8
_LINE, _ASCENT, _GAP = 14, 9, 8
_FRAME = 2.5  # points
_FAMILY = "DejaVu Sans"  # comes with matplotlib
_FONTS = {
    weight: font_manager.get_font(
        font_manager.findfont(
            font_manager.FontProperties(family=_FAMILY, weight=weight)
        )
    )
    for weight in ("normal", "bold")
}


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


class Cell(typing.NamedTuple):
    """An image of a `Grid`.

    Attributes:
        image: uint8 `[H, W, 3]`.
        lines: list of the lines under it; too long ones are abbreviated.
        frame: colour of a frame around it; "" for none.
    """

    image: np.ndarray
    lines: list
    frame: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images with words, for `sheet`.

    Attributes:
        title: stands above the grid.
        columns: lines of text above each column, a string with newlines.
        labels: text to the left of each row; empty strings for none.
        cells: for each row a list of `Cell`; it may be shorter than `columns`.
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
    width = max(width, _text_width(grid.title, "bold") + _GAP) + _GAP
    rows = sum(_row_height(grid, row) for row in grid.cells)
    return width, _head_height(grid) + rows + _LINE


def _label_width(grid):
    longest = max(map(_text_width, grid.labels), default=0)
    return longest + _GAP if longest else 0


def _text_width(text, weight="normal"):
    """Width of the longest line in px."""
    font = _FONTS[weight]
    font.set_size(_POINTS, _DPI)
    widths = []
    for line in _drawable(text).split("\n"):
        font.set_text(line)
        widths.append(font.get_width_height()[0] / 64)
    return math.ceil(max(widths))


def _drawable(text):
    """Replaces what the font has no sign for, of which matplotlib warns."""
    known = _FONTS["normal"].get_char_index
    return "".join(c if c == "\n" or known(ord(c)) else "?" for c in text)


def _fitted(text, width):
    """Leaves out the middle of a line that is wider than `width` px."""
    return abbreviated(_drawable(text), lambda x: _text_width(x) <= width)


def _head_height(grid):
    lines = 1 + max(text.count("\n") for text in grid.columns)
    return _title_height(grid) + lines * _LINE


def _title_height(grid):
    return _GAP + (2 + grid.title.count("\n")) * _LINE


def _row_height(grid, row):
    return grid.side + max(len(cell.lines) for cell in row) * _LINE + _GAP


def _draw_grid(axes, grid, top):
    def write(x, y, lines, **style):
        for i, line in enumerate(lines):
            write_line(x, y + i * _LINE + _ASCENT, line, **style)

    def write_line(x, y, line, **style):
        axes.text(
            x,
            y,
            _drawable(line),
            fontsize=_POINTS,
            family=_FAMILY,
            va="baseline",
            parse_math=False,  # names may contain dollars
            **style,
        )

    first = _GAP + _label_width(grid)
    lefts = [first + i * (grid.side + _GAP) for i in range(len(grid.columns))]
    write(_GAP, top + _GAP, grid.title.split("\n"), weight="bold")
    for x, text in zip(lefts, grid.columns):
        write(x, top + _title_height(grid), text.split("\n"))
    y = top + _head_height(grid)
    for label, row in zip(grid.labels, grid.cells):
        write(_GAP, y, [label])
        for x, cell in zip(lefts, row):
            height, width = cell.image.shape[:2]
            scale = grid.side / max(height, width)
            right, bottom = x + scale * width, y + scale * height
            axes.imshow(cell.image, extent=(x, right, bottom, y), aspect="auto")
            if cell.frame:
                corners = [x, right, right, x], [y, y, bottom, bottom]
                axes.fill(*corners, fill=False, ec=cell.frame, lw=_FRAME)
            lines = [_fitted(line, grid.side) for line in cell.lines]
            write(x, bottom + 3, lines)
        y += _row_height(grid, row)


def curves(entries, path, *, title, useless, unit, baselines):
    """Draws the curves of a run over its epochs.

    Args:
        entries: dictionaries of `metrics.jsonl`.
        path: PNG file to write.
        title: stands above them.
        useless: contrast of an encoder that has learned nothing.
        unit: of the contrast.
        baselines: dictionary, name -> kNN accuracy, drawn as level lines.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(
        _drawable(title), weight="bold", family=_FAMILY, parse_math=False
    )
    # A method without DDM has nothing but the contrast in its loss, and no
    # divergence.
    name = "contrast" if any("contrast" in e for e in entries) else "loss"
    divergent = any("ddm_kl" in e for e in entries)
    panels = list(figure.subplots(1, 2 + divergent))
    contrast, accuracy = panels[0], panels[-1]
    contrast.axhline(
        useless,
        color="gray",
        linestyle=":",
        label=f"chance level: {useless:.2f}",
    )
    _line(contrast, entries, name)
    contrast.set(title=name, ylabel=unit)
    if divergent:
        _line(panels[1], entries, "ddm_kl", "from the weak views")
        panels[1].set(title="divergence", ylabel="nats")
    _line(accuracy, entries, "contrast_accuracy", "contrast accuracy")
    _line(accuracy, entries, "knn", "kNN accuracy")
    for (label, level), style in zip(baselines.items(), (":", "--")):
        accuracy.axhline(
            level, color="gray", linestyle=style, label=f"kNN, {label}"
        )
    accuracy.set(title="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    last = max((e["epoch"] for e in entries), default=1)
    for axes in panels:
        axes.set(xlabel="epoch", xlim=(0, 1.03 * last))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    _write(figure, path)


def _line(axes, entries, name, label=None):
    points = [(e["epoch"], e[name]) for e in entries if name in e]
    if points:
        # A line of one point is not seen.
        marker = "o" if name == "knn" or len(points) < 10 else None
        axes.plot(*zip(*points), label=label or name, marker=marker, ms=3)


def _write(figure, path):
    """Writes a figure atomically; returns it as uint8 `[H, W, 3]`."""
    draft = path + ".tmp"
    figure.savefig(draft, format="png", dpi=_DPI)
    os.replace(draft, path)
    return tf.io.decode_png(tf.io.read_file(path), channels=3).numpy()
