"""Backbones by name: the registry `BACKBONES`, and backbones of two libraries.

A backbone is a `keras.Model` from normalised images float32 `[N, H, W, 3]` to
features float32 `[N, F]`. To add one, add its function to `BACKBONES`.
"""

import functools

from clsa_tf.networks.backbones import libraries, resnet

# Name -> function that takes the settings of `build` and returns the backbone.
BACKBONES = {
    name: functools.partial(resnet.resnet, name) for name in resnet.BLOCKS
}


def problem(name):
    """Returns a message if the name of a backbone is invalid, otherwise ""."""
    if name in BACKBONES or libraries.split(name):
        return libraries.problem(name) if libraries.split(name) else ""
    prefixes = " or ".join(f"{prefix}:NAME" for prefix in libraries.LIBRARIES)
    return (
        f"Expected one of {', '.join(BACKBONES)}, or {prefixes}, received "
        f"{name!r}"
    )


def build(name, *, width=1.0, stem="imagenet", **settings):
    """Builds a backbone.

    Args:
        name: a key of `BACKBONES`, or a library's backbone such as
            `"keras_applications:MobileNetV2"` or `"keras_cv:DenseNet121"`.
        width: factor on all channels; must be 1 for a library's backbone.
        stem: one of `clsa_tf.networks.backbones.resnet.STEMS`; must be
            `"imagenet"` for a library's backbone.
        **settings: `bn_kind`, `bn_splits`, `seed` and `precision`, see
            `clsa_tf.networks.backbones.resnet.resnet`.

    Raises:
        UserError: the backbone cannot be built with these settings.
    """
    if name in BACKBONES:
        return BACKBONES[name](width=width, stem=stem, **settings)
    return libraries.build(name, width=width, stem=stem, **settings)


def check_sizes(name, sizes):
    """Checks that a backbone can encode images of several sizes.

    Args:
        name: see `build`.
        sizes: iterable of int, sides of square images in px.

    Raises:
        UserError: a size is invalid for a library's backbone. Backbones in
            `BACKBONES` have to accept all sizes.
    """
    if name not in BACKBONES:
        libraries.check_sizes(name, sizes)
