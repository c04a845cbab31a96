"""A finished run and its export, after two training steps."""

import io
import pathlib
import typing

import numpy as np
import pillow_heif
from PIL import Image

from clsa_tf import config as config_lib
from clsa_tf.networks.encoder import Encoder
from clsa_tf.training.checkpoint import Checkpoints
from export import savedmodel
from tests import tiny

SIZE = 32  # image size of the encoder in px


class Exported(typing.NamedTuple):
    """Result of `make`."""

    encoder: Encoder  # as trained
    workdir: pathlib.Path  # of the run
    base: pathlib.Path  # of the versions, named in --model_base_path
    path: str  # of version 1


def make(workdir):
    """Takes two steps, saves them and exports the encoder as version 1."""
    config = tiny.config(
        "clsa",
        backbone="resnet18",  # a value of --backbone, unlike "tiny"
        image_size=SIZE,
        eval_keep=1.0,
        workdir=str(workdir),
    )
    method = tiny.make(config)
    # Moves the running statistics away from their initial values.
    tiny.fit(method, tiny.batches(config, 2))
    Checkpoints(method, str(workdir), keep=1).save()
    (workdir / "run.flags").write_text(config_lib.to_flagfile(config))
    base = workdir / "export"
    path = savedmodel.export(str(workdir), str(base))
    return Exported(method.encoder, workdir, base, path)


def noise(count, size=SIZE, seed=0):
    """Images uint8 `[count, size, size, 3]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, [count, size, size, 3], np.uint8)


def encode(pixels, kind="PNG", **options):
    """The bytes of an image file that holds `pixels`, array or Pillow image."""
    if not isinstance(pixels, Image.Image):
        pixels = Image.fromarray(pixels)
    if kind == "HEIF":
        pillow_heif.register_heif_opener()
    file = io.BytesIO()
    pixels.save(file, kind, **options)
    return file.getvalue()
