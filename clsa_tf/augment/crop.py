"""Crops: where they lie, and Pillow's antialiased bilinear resize."""

import math

import tensorflow as tf

_ASPECTS = (3.0 / 4.0, 4.0 / 3.0)  # width / height
_TRIES = 10


# Uniform numbers that a box is drawn from.
NEEDS = 2 * _TRIES + 2


def draw_box(uniform, *, height, width, min_area, max_area):
    """Draws the rectangle of a random resized crop.

    The share of the area is uniform, the aspect ratio log-uniform in 3/4 ..
    4/3; the first of ten tries that fits is taken, else the largest central
    rectangle of an allowed aspect ratio.

    Args:
        uniform: f32[22], uniform numbers in [0, 1).
        height: of the image in pixels, at least 1; an int or i32[].
        width: likewise.
        min_area: smallest share of the image's area, in (0, 1].
        max_area: largest share, in [min_area, 1].

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

    # The fallback goes last, so that the first row that fits is the answer.
    tries = tf.concat([tries, [_central_box(sides)]], axis=0)  # [11,2]
    first = tf.argmax(tf.concat([fits, [True]], axis=0), output_type=tf.int32)
    # Not tries[first]: XLA would compile anew for each value.
    box = tf.gather(tries, first)
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


def _pass(pixels, scale, translation, size):
    """Resamples f32 or u8 [1,L,1,C] along L, antialiased: f32[1,size,1,C]."""
    return tf.raw_ops.ScaleAndTranslate(
        images=pixels,
        size=[size, 1],
        scale=scale,  # [2], the second one 1
        translation=translation,  # [2], the second one 0
        kernel_type="triangle",
        antialias=True,
    )


def resize_boxes(image, boxes, *, sizes):
    """Cuts rectangles out and resizes them, bilinear with antialiasing.

    The results are stored column by column. They fall out that way when both
    passes run along contiguous memory, and the augmentations, which transpose
    to planes anyway, turn them back for nothing. Per rectangle there are as
    few graph nodes as possible: on small images each costs as much as
    thousands of pixels.

    Args:
        image: u8[H,W,3].
        boxes: f32[V,4] or i32[V,4], rows (top, left, height, width) in pixels,
            inside the image. Pixels that a box covers in part count in full
            at its edge.
        sizes: V ints, sides of the results in pixels.

    Returns:
        V tensors f32[size,size,3] for `to_bytes`, of which [x,y] is the pixel
        in column x of row y.

    Source: Pillow, `Image.crop` then `Image.resize(BILINEAR)`. Pillow rounds
    to bytes between its two passes and this does not: bytes differ by at most
    1/255.
    """
    count = len(sizes)
    boxes = tf.cast(boxes, tf.float32)
    corner, sides = boxes[:, :2], boxes[:, 2:]  # f32[V,2]
    begin = tf.floor(corner)
    end = tf.math.ceil(corner + sides)
    scale = tf.constant(sizes, tf.float32)[:, tf.newaxis] / sides
    shift = (begin - corner) * scale

    def columns(*parts):
        """Puts scalars or [V] side by side, and returns the V rows."""
        parts = [tf.broadcast_to(x, [count]) for x in parts]
        return tf.unstack(tf.stack(parts, axis=1), num=count)

    top, left = tf.unstack(tf.cast(begin, tf.int32), num=2, axis=1)
    height, width = tf.unstack(tf.cast(end - begin, tf.int32), num=2, axis=1)
    image = tf.reshape(image, [1, tf.shape(image)[0], 1, -1])  # [1,H,1,W*3]
    rows = zip(
        sizes,
        columns(0, top, 0, left * 3),
        columns(1, height, 1, width * 3),
        columns(scale[:, 0], 1.0),
        columns(shift[:, 0], 0.0),
        columns(1, width, 1, 3 * tf.constant(sizes)),
        columns(scale[:, 1], 1.0),
        columns(shift[:, 1], 0.0),
    )
    results = []
    for size, start, extent, down, move_down, shape, across, move in rows:
        pixels = tf.slice(image, start, extent)
        pixels = _pass(pixels, down, move_down, size)
        pixels = tf.reshape(pixels, [size, -1, 3])
        pixels = tf.transpose(pixels, [1, 0, 2])  # [width,size,3]
        pixels = _pass(tf.reshape(pixels, shape), across, move, size)
        results.append(tf.reshape(pixels, [size, size, 3]))
    return results


def to_bytes(pixels):
    """Rounds half up, as Pillow does: f32 in [0, 255] -> u8."""
    return tf.cast(pixels + 0.5, tf.uint8)


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
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis],
        size=[size, size],  # only the pixels of the crop are computed
        scale=scale,
        translation=-corner,
        kernel_type="triangle",
        antialias=True,
    )[0]
    return to_bytes(pixels)
