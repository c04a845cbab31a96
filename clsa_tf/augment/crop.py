"""Crops: where they lie, and Pillow's antialiased bilinear resize."""

import math

import tensorflow as tf

from clsa_tf.augment import primitives

_ASPECTS = (3.0 / 4.0, 4.0 / 3.0)  # width / height
_TRIES = 10


def draw_box(seed, *, height, width, min_area, max_area):
    """Draws the rectangle of a random resized crop.

    The share of the area is uniform, the aspect ratio log-uniform in 3/4 ..
    4/3; the first of ten tries that fits is taken, else the largest central
    rectangle of an allowed aspect ratio.

    Args:
        seed: i32[2].
        height: of the image in pixels, at least 1; an int or i32[].
        width: likewise.
        min_area: smallest share of the image's area, in (0, 1].
        max_area: largest share, in [min_area, 1].

    Returns:
        i32[4], (top, left, height, width) in pixels, inside the image.

    Source: torchvision, RandomResizedCrop.get_params.
    """
    uniform = primitives.uniform(seed, shape=[2 * _TRIES + 2])
    size = tf.stack([height, width])  # i32[2]
    sides = tf.cast(size, tf.float32)

    share = min_area + (max_area - min_area) * uniform[:_TRIES]
    low, high = math.log(_ASPECTS[0]), math.log(_ASPECTS[1])
    aspect = tf.exp(low + (high - low) * uniform[_TRIES : 2 * _TRIES])
    area = share * sides[0] * sides[1]
    tries = tf.stack([tf.sqrt(area / aspect), tf.sqrt(area * aspect)], axis=1)
    tries = tf.cast(tf.round(tries), tf.int32)  # [10,2]
    fits = tf.reduce_all((tries > 0) & (tries <= size), axis=1)  # [10]

    # The fallback goes last, so that the first row that fits is the answer.
    tries = tf.concat([tries, [_central_box(sides)]], axis=0)  # [11,2]
    first = tf.argmax(tf.concat([fits, [True]], axis=0), output_type=tf.int32)
    box = tries[first]
    room = tf.cast(size - box, tf.float32)
    drawn = tf.cast(uniform[2 * _TRIES :] * (room + 1.0), tf.int32)
    central = (size - box) // 2
    corner = tf.where(first < _TRIES, drawn, central)
    return tf.concat([corner, box], axis=0)


def _central_box(sides):
    """Largest (height, width) within f32[2] sides of an allowed aspect."""
    height, width = sides[0], sides[1]
    box = tf.minimum(
        sides, tf.stack([width / _ASPECTS[0], height * _ASPECTS[1]])
    )
    return tf.cast(tf.round(box), tf.int32)


def _scale_and_translate(image, size, scale, translation):
    """Antialiased bilinear resampling of u8[H,W,3] to u8[size,size,3]."""
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=tf.expand_dims(image, 0),
        size=[size, size],
        scale=scale,
        translation=translation,
        kernel_type="triangle",
        antialias=True,
    )[0]
    # Pillow rounds half up; the weights are positive and sum to one.
    return tf.cast(pixels + 0.5, tf.uint8)


def resize_box(image, box, *, size):
    """Cuts a rectangle out and resizes it, bilinear with antialiasing.

    Args:
        image: u8[H,W,3].
        box: i32[4], (top, left, height, width), inside the image.
        size: side of the result in pixels.

    Returns:
        u8[size,size,3].

    Source: Pillow, `Image.crop` then `Image.resize(BILINEAR)`. Pillow rounds
    to bytes between its two passes and this does not: results differ by at
    most 1/255.
    """
    top, left, height, width = tf.unstack(box, num=4)
    crop = tf.slice(image, [top, left, 0], [height, width, 3])
    scale = size / tf.cast(box[2:], tf.float32)
    return _scale_and_translate(crop, size, scale, [0.0, 0.0])


def central(image, *, size, keep):
    """The evaluation transform: resize the short side, cut out the centre.

    Args:
        image: u8[H,W,3].
        size: side of the result in pixels.
        keep: share of the resized short side that is kept, in (0, 1]; 0.875
            resizes to 256 for 224.

    Returns:
        u8[size,size,3].

    Source: torchvision, `Resize(round(size / keep))` then `CenterCrop(size)`
    on Pillow images; within 1/255.
    """
    short = round(size / keep)
    shape = tf.shape(image)[:2]
    # Torchvision cuts the fraction of the long side off.
    resized = short * shape // tf.reduce_min(shape)  # i32[2]
    scale = tf.cast(resized / shape, tf.float32)
    # Half-way cases go to the even number, as in Python.
    corner = tf.round(tf.cast(resized - size, tf.float32) / 2.0)
    # Only the pixels of the crop are computed.
    return _scale_and_translate(image, size, scale, -corner)
