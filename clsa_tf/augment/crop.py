"""Random resized crops, and Pillow's antialiased bilinear resize."""

import itertools
import math
from typing import NamedTuple, Tuple

import numpy as np
import tensorflow as tf

_ASPECTS = (3.0 / 4.0, 4.0 / 3.0)  # width / height
_TRIES = 10


# Uniform random numbers per box.
NUM_UNIFORMS = 2 * _TRIES + 2


def draw_box(uniform, *, height, width, min_area, max_area):
    """Draws the box of a random resized crop.

    The area is drawn uniformly, the aspect ratio log-uniformly from 3/4 to 4/3.
    The result is the first of ten draws that fits into the image. If none fits,
    it is the largest central box of an allowed aspect ratio.

    Args:
        uniform: f32[22], uniform numbers in [0, 1).
        height: height of the image in pixels, at least 1; an int or i32[].
        width: width of the image in pixels, at least 1; an int or i32[].
        min_area: smallest crop as a share of the image's area, in (0, 1].
        max_area: largest crop as a share of the area, in [min_area, 1].

    Returns:
        i32[4], (top, left, height, width) in pixels, inside the image.

    Source: torchvision, RandomResizedCrop.get_params.
    """
    size = tf.stack([height, width])  # i32[2]
    sides = tf.cast(size, tf.float32)

    share = min_area + (max_area - min_area) * uniform[:_TRIES]
    low, high = math.log(_ASPECTS[0]), math.log(_ASPECTS[1])
    aspect = tf.exp(low + (high - low) * uniform[_TRIES : 2 * _TRIES])
    area = share * sides[0] * sides[1]
    tries = tf.stack([tf.sqrt(area / aspect), tf.sqrt(area * aspect)], axis=1)
    tries = tf.cast(tf.round(tries), tf.int32)  # [10,2]
    fits = tf.reduce_all((tries > 0) & (tries <= size), axis=1)  # [10]

    # The fallback is the last row, so the first row that fits is the result.
    tries = tf.concat([tries, [_central_box(sides)]], axis=0)  # [11,2]
    first = tf.argmax(tf.concat([fits, [True]], axis=0), output_type=tf.int32)
    # Not tries[first]: XLA would compile it again for each value.
    box = tf.gather(tries, first)
    room = tf.cast(size - box, tf.float32)
    drawn = tf.cast(uniform[2 * _TRIES :] * (room + 1.0), tf.int32)
    central = (size - box) // 2
    corner = tf.where(first < _TRIES, drawn, central)
    return tf.concat([corner, box], axis=0)


def _central_box(sides):
    """Largest (height, width) of an allowed aspect ratio in f32[2] sides."""
    height, width = sides[0], sides[1]
    box = tf.minimum(
        sides, tf.stack([width / _ASPECTS[0], height * _ASPECTS[1]])
    )
    return tf.cast(tf.round(box), tf.int32)


def _resample(pixels, scale, translation, size):
    """Resamples f32 or u8 [1,L,1,C] along L with antialiasing.

    Args:
        pixels: f32 or u8 [1,L,1,C].
        scale: f32[2]; its second element is 1.
        translation: f32[2]; its second element is 0.
        size: length of the result along L.

    Returns:
        f32[1,size,1,C].
    """
    return tf.raw_ops.ScaleAndTranslate(
        images=pixels,
        size=[size, 1],
        scale=scale,
        translation=translation,
        kernel_type="triangle",
        antialias=True,
    )


class Rectangle(NamedTuple):
    """A rectangle of an image, and the square to resize it to.

    Attributes:
        image: u8[1,H,1,W*3], the layout that `resize` needs.
        size: side of the square in pixels.
        begin: i32[4], start of the rectangle in `image`.
        extent: i32[4], size of the rectangle in `image`.
        vertical: scale f32[2] and translation f32[2] of the pass along H.
        horizontal: scale f32[2] and translation f32[2] of the pass along W.
    """

    image: tf.Tensor
    size: int
    begin: tf.Tensor
    extent: tf.Tensor
    vertical: Tuple[tf.Tensor, tf.Tensor]
    horizontal: Tuple[tf.Tensor, tf.Tensor]

    def resize(self):
        """Resizes the rectangle, bilinear with antialiasing.

        The result is column-major and planar. Both passes then run along
        contiguous memory. The augmentations transpose to planes in any case, so
        undoing this layout costs nothing.

        Returns:
            u8[size,3,size]; [x,c,y] is channel c of the pixel in column x and
            row y.

        Source: Pillow, `Image.crop` then `Image.resize(BILINEAR)`. Pillow
        rounds to bytes between its two passes and this does not. Bytes differ
        by at most 1/255.
        """
        pixels = tf.slice(self.image, self.begin, self.extent)
        pixels = _resample(pixels, *self.vertical, self.size)
        pixels = tf.transpose(tf.reshape(pixels, [self.size, -1]))  # [W*3,size]
        pixels = tf.reshape(pixels, [1, -1, 1, 3 * self.size])
        pixels = _resample(pixels, *self.horizontal, self.size)
        # Rounded here, while the pixels are in the processor's cache.
        return to_bytes(tf.reshape(pixels, [self.size, 3, self.size]))


def rectangles(images, boxes, *, sizes):
    """Prepares rectangles of several images for resizing.

    All rectangles are prepared together, with few graph nodes: on small images
    one node costs as much as thousands of pixels.

    Args:
        images: list of K u8[H,W,3], of any sizes.
        boxes: f32[K,V,4] or i32[K,V,4], V rows (top, left, height, width) per
            image, in pixels, inside the image. A pixel that a box covers in
            part counts in full.
        sizes: V ints, sides of the squares in pixels.

    Returns:
        V lists of K `Rectangle`s.
    """
    count = len(images) * len(sizes)
    boxes = tf.reshape(tf.cast(boxes, tf.float32), [count, 4])
    corner, sides = boxes[:, :2], boxes[:, 2:]  # f32[count,2]
    begin = tf.floor(corner)
    end = tf.math.ceil(corner + sides)
    squares = np.tile(np.float32(sizes), len(images))[:, np.newaxis]
    scale = squares / sides
    shift = (begin - corner) * scale

    def rows(*columns):
        """Stacks scalars or [count] as columns; returns the list of rows."""
        columns = [tf.broadcast_to(x, [count]) for x in columns]
        return tf.unstack(tf.stack(columns, axis=1), num=count)

    top, left = tf.unstack(tf.cast(begin, tf.int32), num=2, axis=1)
    height, width = tf.unstack(tf.cast(end - begin, tf.int32), num=2, axis=1)
    begins = rows(0, top, 0, left * 3)
    extents = rows(1, height, 1, width * 3)
    verticals = zip(rows(scale[:, 0], 1.0), rows(shift[:, 0], 0.0))
    horizontals = zip(rows(scale[:, 1], 1.0), rows(shift[:, 1], 0.0))
    images = [tf.reshape(x, [1, tf.shape(x)[0], 1, -1]) for x in images]
    pairs = itertools.product(images, sizes)
    result = [
        Rectangle(*pair, *rest)
        for pair, *rest in zip(pairs, begins, extents, verticals, horizontals)
    ]
    return [result[v :: len(sizes)] for v in range(len(sizes))]


def to_bytes(pixels):
    """Rounds half up, as Pillow does: f32 in [0, 255] -> u8."""
    return tf.cast(pixels + 0.5, tf.uint8)


def central(image, *, size, crop_ratio):
    """The evaluation transform: resize the short side, crop the centre.

    Args:
        image: u8[H,W,3].
        size: side of the result in pixels.
        crop_ratio: share of the resized short side that the crop covers, in
            (0, 1]. With 0.875 and size 224 the short side is resized to 256.

    Returns:
        u8[size,size,3].

    Source: torchvision, `Resize(round(size / crop_ratio))` then
    `CenterCrop(size)` on Pillow images; within 1/255.
    """
    short = round(size / crop_ratio)
    shape = tf.shape(image)[:2]
    # Torchvision truncates the length of the long side.
    resized = short * shape // tf.reduce_min(shape)  # i32[2]
    scale = tf.cast(resized / shape, tf.float32)
    # Ties round to even, as in Python.
    corner = tf.round(tf.cast(resized - size, tf.float32) / 2.0)
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis],
        size=[size, size],  # only the pixels of the crop are computed
        scale=scale,
        translation=-corner,
        kernel_type="triangle",
        antialias=True,
    )[0]
    return to_bytes(pixels)
