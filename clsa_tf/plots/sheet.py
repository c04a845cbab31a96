"""Draws grids of captioned images, and writes figures as PNG files."""

import dataclasses
import math
import typing

import matplotlib
import numpy as np
import tensorflow as tf

matplotlib.use("Agg")  # draws to files, without a display

from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from clsa_tf.files import replacing  # noqa: E402
from clsa_tf.text import abbreviated  # noqa: E402

_DPI = 100
_POINTS = 8  # font size of `sheet`
_LINE, _ASCENT, _GAP = 14, 9, 8  # line height, ascent, margin of text; in px
_FRAME = 2.5  # points
FAMILY = "DejaVu Sans"  # comes with matplotlib
_FONTS = {
    weight: font_manager.get_font(
        font_manager.findfont(
            font_manager.FontProperties(family=FAMILY, weight=weight)
        )
    )
    for weight in ("normal", "bold")
}


class Cell(typing.NamedTuple):
    """An image of a `Grid`.

    Attributes:
        image: uint8 `[H, W, 3]`.
        lines: list of the lines of its caption; long lines are abbreviated.
        frame: colour of a frame around it; "" for none.
    """

    image: np.ndarray
    lines: list
    frame: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of captioned images, for `sheet`.

    Attributes:
        title: text above the grid.
        columns: title of each column; may contain newlines.
        labels: text to the left of each row; empty strings for none.
        cells: list of `Cell` per row; it may be shorter than `columns`.
        side: side of the square that each image is scaled to fit, in px.
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
        the picture as uint8 `[H, W, 3]`.
    """
    sizes = [_grid_size(grid) for grid in grids]
    width = max(size[0] for size in sizes)
    height = sum(size[1] for size in sizes)
    figure = Figure(figsize=(width / _DPI, height / _DPI), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # coordinates in pixels
    top = 0
    for grid, size in zip(grids, sizes):
        _draw_grid(axes, grid, top)
        top += size[1]
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return write_png(figure, path)


def _grid_size(grid):
    """Width and height of a grid in px, including margins."""
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
    for line in drawable(text).split("\n"):
        font.set_text(line)
        widths.append(font.get_width_height()[0] / 64)
    return math.ceil(max(widths))


def drawable(text):
    """Replaces characters that the font lacks; matplotlib would warn."""
    known = _FONTS["normal"].get_char_index
    return "".join(c if c == "\n" or known(ord(c)) else "?" for c in text)


def _fitted(text, width):
    """Abbreviates the middle of a line that is wider than `width` px."""
    return abbreviated(drawable(text), lambda x: _text_width(x) <= width)


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
            drawable(line),
            fontsize=_POINTS,
            family=FAMILY,
            va="baseline",
            parse_math=False,  # names may contain dollar signs
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


def write_png(figure, path):
    """Writes a figure atomically; returns the picture as uint8 `[H, W, 3]`."""
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=_DPI)
    return tf.io.decode_png(tf.io.read_file(path), channels=3).numpy()
