"""Draws one image of the dataset `shapes` (see `dataset.py`).

Outlines are defined in the square [-1, 1] x [-1, 1], y pointing down, for the
orientation "up". They are filled at four times the final size, then reduced.
Patterns and background are computed at the final size.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
SUPERSAMPLE = 4
SHAPES = (
    "arrow", "comb", "crescent", "drop", "fir",
    "house", "key", "rainbow", "stairs", "tee",
)  # fmt: skip
COLORS = ("red", "green", "cyan", "purple")
ORIENTATIONS = ("up", "right", "down", "left")
TEXTURES = ("solid", "stripes", "dots", "checks", "gradient")

_HUES = (0, 100, 180, 275)  # degrees, in the order of COLORS
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_SPLITS = ("train", "test")


class Factors(NamedTuple):
    """Labels: indices into SHAPES, COLORS, ORIENTATIONS and TEXTURES."""

    shape: int
    color: int
    orientation: int
    texture: int


def _arc(center, radius, start, stop):
    """Returns points of an arc from start to stop, both included.

    Angles are in degrees; 0 is right, 90 is down.
    """
    angles = np.radians(np.linspace(start, stop, 33))
    x, y = np.cos(angles), np.sin(angles)
    return [(center[0] + radius * a, center[1] + radius * b)
            for a, b in zip(x, y)]  # fmt: skip


def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Each outline is a list of (ink, polygon). Ink 0 cuts a hole.
_OUTLINES = {
    "arrow": [
        (1, [(0, -1), (0.85, 0), (0.33, 0), (0.33, 1), (-0.33, 1), (-0.33, 0),
             (-0.85, 0)]),
    ],
    "comb": [
        (1, _box(-1, 0.35, 1, 0.95)),
        (1, _box(-1, -0.95, -0.6, 0.5)),
        (1, _box(-0.2, -0.95, 0.2, 0.5)),
        (1, _box(0.6, -0.95, 1, 0.5)),
    ],
    "crescent": [
        (1, _arc((0, 0.2), 1, 0, 360)),
        (0, _arc((0, -0.42), 0.82, 0, 360)),
    ],
    "drop": [
        (1, [(0, -1), *_arc((0, 0.28), 0.72, -34, 214)]),
    ],
    "fir": [
        (1, [(0, -1), (0.6, -0.4), (0.25, -0.4), (0.8, 0.15), (0.35, 0.15),
             (0.95, 0.7), (-0.95, 0.7), (-0.35, 0.15), (-0.8, 0.15),
             (-0.25, -0.4), (-0.6, -0.4)]),
        (1, _box(-0.15, 0.6, 0.15, 1)),
    ],
    "house": [
        (1, [(0, -1), (1, -0.2), (-1, -0.2)]),
        (1, _box(-0.85, -0.25, 0.85, 1)),
        (0, _box(-0.6, 0, -0.15, 0.4)),
        (0, _box(0.15, 0, 0.6, 0.4)),
        (0, _box(-0.2, 0.6, 0.2, 1.1)),
    ],
    "key": [
        (1, _arc((0, -0.47), 0.53, 0, 360)),
        (1, _box(-0.17, -0.1, 0.17, 1)),
        (1, _box(0, 0.68, 0.62, 1)),
        (1, _box(0, 0.2, 0.5, 0.48)),
        (0, _arc((0, -0.47), 0.23, 0, 360)),
    ],
    "rainbow": [
        (1, [*_arc((0, 0.5), 1, 180, 360)]),
        (0, [*_arc((0, 0.5), 0.8, 180, 360)]),
        (1, [*_arc((0, 0.5), 0.6, 180, 360)]),
        (0, [*_arc((0, 0.5), 0.4, 180, 360)]),
        (1, [*_arc((0, 0.5), 0.2, 180, 360)]),
    ],
    "stairs": [
        (1, [(-1, 1), (-1, 0.5), (-0.5, 0.5), (-0.5, 0), (0, 0), (0, -0.5),
             (0.5, -0.5), (0.5, -1), (1, -1), (1, -0.55), (-0.55, 1)]),
    ],
    "tee": [
        (1, _box(-0.9, -0.9, 0.9, -0.32)),
        (1, _box(-0.3, -0.5, 0.3, 1)),
    ],
}  # fmt: skip


def shape_mask(shape, *, center, size, angle, aspect=1.0, shear=0.0):
    """Returns the share of each pixel that a shape covers.

    `shape` is an index into SHAPES. `center` (x, y) and `size` are fractions of
    the side. The square of the outline is `size` wide and high. It is
    stretched (x is multiplied by the root of `aspect`, y is divided by it),
    sheared (x += shear * y) and rotated by `angle` degrees clockwise, all
    about `center`. The result is [SIDE, SIDE] float32 in [0, 1].
    """
    scale = SIDE * SUPERSAMPLE
    canvas = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(canvas)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    stretch = math.sqrt(aspect)
    warp = (
        np.array([[cos, -sin], [sin, cos]])
        @ np.array([[1, shear], [0, 1]])
        @ np.diag([stretch, 1 / stretch])
        * (size * scale / 2)
    )
    offset = np.asarray(center) * scale - 0.5  # pixel centres are integers
    for ink, polygon in _OUTLINES[SHAPES[shape]]:
        points = np.asarray(polygon) @ warp.T + offset  # [points, 2]
        draw.polygon(points.ravel().tolist(), fill=255 * ink)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255


def _pattern(texture, rng, center):
    """Returns the weight of the second fill colour, [SIDE, SIDE] in [0, 1].

    Patterns have a random angle, so they do not reveal the shape's orientation.
    """
    turn = rng.uniform(0, 2 * math.pi)
    period = rng.uniform(0.85, 1.25)
    phase = rng.uniform(0, 2 * math.pi, 2)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    x, y = x - center[0] * SIDE, y - center[1] * SIDE
    u = x * math.cos(turn) + y * math.sin(turn)
    v = y * math.cos(turn) - x * math.sin(turn)

    def wave(t, pixels, shift):
        return np.sin(2 * math.pi * t / (pixels * period) + shift)

    name = TEXTURES[texture]
    if name == "stripes":
        edge = 2.5 * wave(u, 8, phase[0])
    elif name == "dots":
        edge = 3 * (wave(u, 8, phase[0]) + wave(v, 8, phase[1]) - 0.6)
    elif name == "checks":
        edge = 5 * wave(u, 13, phase[0]) * wave(v, 13, phase[1])
    elif name == "gradient":
        edge = u / 16
    else:
        return np.zeros((SIDE, SIDE), np.float32)
    return np.clip(edge * 0.5 + 0.5, 0, 1)


def _color(hue, saturation, luma):
    """Returns RGB, [3] float32 in [0, 1], with exactly this luma.

    The hue is in degrees.
    """
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    pure = 1 - np.clip(np.minimum(k, 4 - k), 0, 1)
    brightness = float(pure @ _LUMA)
    if luma < brightness:
        full = pure * (luma / brightness)
    else:
        full = 1 - (1 - pure) * (1 - luma) / (1 - brightness)
    return (saturation * full + (1 - saturation) * luma).astype(np.float32)


def _background(rng, luma):
    """Returns a dull background with faint clutter, [SIDE, SIDE, 3] float32."""
    grid = rng.uniform(-1, 1, (3, 3)) * rng.choice((0.06, 0.12, 0.18))
    soft = Image.fromarray(grid.astype(np.float32))
    soft = np.asarray(soft.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    canvas = Image.new("L", (SIDE * SUPERSAMPLE,) * 2, 128)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 8)):
        x, y = rng.uniform(0, SIDE * SUPERSAMPLE, 2)
        ink = 128 + int(rng.choice((-1, 1)) * rng.uniform(14, 26))
        if rng.random() < 0.5:
            r = rng.uniform(1.0, 2.2) * SUPERSAMPLE
            draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        else:
            t = rng.uniform(0, 2 * math.pi)
            r = rng.uniform(5, 11) * SUPERSAMPLE
            end = (x + r * math.cos(t), y + r * math.sin(t))
            draw.line((x, y, *end), fill=ink, width=6)
    clutter = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255
    shade = soft + clutter - 128 / 255
    tint = _color(rng.choice((40, 220)), rng.uniform(0, 0.1), luma)
    return tint + shade[..., None]  # [SIDE, SIDE, 3]


def draw_factors(split, index):
    """Returns the labels of one example, as `Factors`.

    Shapes take turns; the other labels are random. `split` is "train" or
    "test"; `index` counts from 0.
    """
    rng = np.random.default_rng((_SPLITS.index(split), index, 0))
    return Factors(
        shape=index % len(SHAPES),
        color=int(rng.integers(len(COLORS))),
        orientation=int(rng.integers(len(ORIENTATIONS))),
        texture=int(rng.integers(len(TEXTURES))),
    )


def render(split, index, factors):
    """Draws one image, [SIDE, SIDE, 3] uint8 (RGB).

    `factors` determine the labelled properties. Position, size, jitter,
    polarity and background are a pure function of (split, index) and do not
    depend on the factors.
    """
    rng = np.random.default_rng((_SPLITS.index(split), index, 1))
    size = rng.uniform(0.45, 0.7)
    reach = size / 2 - 0.05
    center = rng.uniform(reach, 1 - reach, 2)
    angle = 90 * factors.orientation + rng.uniform(-20, 20)
    aspect = math.exp(rng.uniform(-0.25, 0.25))
    shear = rng.uniform(-0.1, 0.1)
    hue = _HUES[factors.color] + rng.uniform(-9, 9)
    polarity = rng.choice((-1, 1))  # the shape is darker or lighter
    ground = 0.5 - polarity * rng.uniform(0, 0.14)
    contrast = polarity * rng.uniform(0.28, 0.36)
    saturation = rng.uniform(0.15, 0.35)
    first = _color(hue, saturation, ground + contrast)
    second = _color(hue, saturation, ground + 0.7 * contrast)
    backdrop = _background(rng, ground)
    mask = shape_mask(
        factors.shape,
        center=center,
        size=size,
        angle=angle,
        aspect=aspect,
        shear=shear,
    )[..., None]  # [SIDE, SIDE, 1]
    mix = _pattern(factors.texture, rng, center)[..., None]
    fill = first + mix * (second - first)  # [SIDE, SIDE, 3]
    image = backdrop + mask * (fill - backdrop)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
