"""A view: one crop of an image and what happens to it."""

import dataclasses

import tensorflow as tf

from clsa_tf.augment import crop, strong, weak
from clsa_tf.errors import UserError


@dataclasses.dataclass(frozen=True)
class View:
    """What one crop of the image goes through.

    Attributes:
        name: key of the view in a batch, such as `"query_0"`.
        size: side of the square result, in pixels.
        min_area: smallest share of the image's area a crop covers, in (0, 1].
        max_area: largest share, in [min_area, 1].
        strong_ops: length of the sequence of strong operations that follows
            the weak chain; 0 for a weak view, 5 in CLSA.
        blur: probability of the weak chain's Gaussian blur, in [0, 1].
        shuffle: whether the rows of this view are permuted over the global
            batch (MoCo's shuffled batch normalisation, done by the loader).

    Raises:
        UserError: a size, area, count or probability is out of range.
    """

    name: str
    size: int
    min_area: float
    max_area: float
    strong_ops: int = 0
    blur: float = 0.5
    shuffle: bool = False

    def __post_init__(self):
        if self.size < 1:
            raise UserError(
                f"Expected view {self.name!r} to be at least 1 pixel wide, "
                f"received size {self.size}; choose a positive size."
            )
        if not 0 < self.min_area <= self.max_area <= 1:
            raise UserError(
                f"Expected 0 < min_area <= max_area <= 1 for view "
                f"{self.name!r}, received {self.min_area} and "
                f"{self.max_area}; give both as shares of the image's area."
            )
        if self.strong_ops < 0 or not 0 <= self.blur <= 1:
            raise UserError(
                f"Expected strong_ops of at least 0 and blur in [0, 1] for "
                f"view {self.name!r}, received {self.strong_ops} and "
                f"{self.blur}; choose others."
            )


def draw_view(seed, *, view, height, width):
    """Draws everything random about one view of one image.

    Args:
        seed: i32[2]; the crop, the weak and the strong chain each get a seed
            of their own from it.
        view: the `View`.
        height: of the image in pixels; an int or i32[].
        width: likewise.

    Returns:
        dict of `box` i32[4] (see `crop.draw_box`), `weak` (see `weak.draw`)
        and, for a strong view, `strong` (see `strong.draw`; feed it to
        `strong.describe` to label a picture).
    """
    seeds = tf.random.experimental.stateless_split(seed, 3, alg="philox")
    crop_seed, weak_seed, strong_seed = tf.unstack(seeds, num=3)
    params = {
        "box": crop.draw_box(
            crop_seed,
            height=height,
            width=width,
            min_area=view.min_area,
            max_area=view.max_area,
        ),
        "weak": weak.draw(weak_seed, blur=view.blur),
    }
    if view.strong_ops:
        params["strong"] = strong.draw(strong_seed, num_ops=view.strong_ops)
    return params


def apply_view(image, params, *, view):
    """Executes what `draw_view` drew.

    Args:
        image: u8[H,W,3].
        params: what `draw_view` returns for this view and image size.
        view: the `View`.

    Returns:
        u8[size,size,3].
    """
    image = crop.resize_box(image, params["box"], size=view.size)
    image = weak.apply(image, params["weak"])
    if view.strong_ops:
        image = strong.apply(image, params["strong"])
    return image


def make_view(image, seed, *, view):
    """One random view of one image: crop, weak chain, strong sequence if any.

    Args:
        image: u8[H,W,3], any size from 1x1.
        seed: i32[2].
        view: the `View`.

    Returns:
        u8[size,size,3].

    Source: maple-research-lab/CLSA@37df76c, Multi_FixTransform.py, up to the
    conversion to float.
    """
    height, width = tf.unstack(tf.shape(image)[:2], num=2)
    params = draw_view(seed, view=view, height=height, width=width)
    return apply_view(image, params, view=view)
