"""Backbones by name: the registry `BACKBONES`, and those of two libraries.

A backbone is a `keras.Model` from normalised images float32 `[N, H, W, 3]` to
features float32 `[N, F]`. To add one, put its function into `BACKBONES`.
"""

import functools

from clsa_tf.networks.backbones import libraries, resnet

# Name -> function of the settings of `build` that returns the backbone.
BACKBONES = {
    name: functools.partial(resnet.resnet, name) for name in resnet.BLOCKS
}


def problem(name):
    """Says what is wrong with the name of a backbone; "" if nothing is."""
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
        name: a key of `BACKBONES`, or such as
            `"keras_applications:MobileNetV2"` or `"keras_cv:DenseNet121"`.
        width: factor on all channels; 1 for those of libraries.
        stem: one of `clsa_tf.networks.backbones.resnet.STEMS`; `"imagenet"`
            for those of libraries.
        **settings: `bn_kind`, `bn_splits`, `seed` and `precision`, see
            `clsa_tf.networks.backbones.resnet.resnet`.

    Raises:
        UserError: the backbone cannot be built with these settings.
    """
    if name in BACKBONES:
        return BACKBONES[name](width=width, stem=stem, **settings)
    return libraries.build(name, width=width, stem=stem, **settings)
