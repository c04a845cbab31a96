"""Exports: `python -m export.savedmodel --workdir=W --output=D`.

Writes `D/<version>/`, a SavedModel for TensorFlow Serving, complete or not at
all: it is written under a temporary name, loaded and compared in a process of
its own, and only then renamed.
"""

import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf
from absl import flags

from clsa_tf import entry
from clsa_tf.augment import crop
from clsa_tf.checkpoint import load_trained
from clsa_tf.data.decode import decode
from clsa_tf.errors import UserError
from clsa_tf.networks.encoder import unit

_VERIFY = os.path.join(os.path.dirname(__file__), "verify.py")


class ServedEncoder(tf.Module):
    """An encoder with the signatures that it is served with.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        image_size: side that encoded images are brought to, in px.
        keep: share of the short side that the centre crop keeps, in (0, 1].
    """

    def __init__(self, encoder, *, image_size, keep):
        """See the class."""
        super().__init__(name="encoder")
        self._encoder = encoder
        self._image_size = image_size
        self._keep = keep

    @tf.function
    def images(self, images):
        """Embeds images as they are.

        Args:
            images: float32 `[N, H, W, 3]` in [0, 1].

        Returns:
            `embedding` float32 `[N, F]`, the backbone's features, and
            `projection` float32 `[N, D]`, unit rows.
        """
        features = self._encoder(images, training=False)
        projection = unit(self._encoder.head(features, training=False))
        return {"embedding": features, "projection": projection}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def image_bytes(self, image_bytes):
        """Embeds encoded images: decoded, resized, centre-cropped.

        Args:
            image_bytes: string `[N]`, JPEG, PNG, BMP or GIF files of any size.

        Returns:
            as `images`.
        """

        def prepare(encoded):
            return crop.central(
                decode(encoded), size=self._image_size, keep=self._keep
            )

        size = self._image_size
        images = tf.map_fn(
            prepare,
            image_bytes,
            fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
        )
        return self.images(tf.cast(images, tf.float32) / 255.0)


def export(workdir, output, *, version=0):
    """Exports the encoder of the run in `workdir`.

    Args:
        workdir: directory of the run.
        output: directory of the versions; created when missing.
        version: number of this one, >= 1; 0: one more than the newest.

    Returns:
        path of the SavedModel, `<output>/<version>`.

    Raises:
        UserError: no run there, the version exists, or the written model does
            not reproduce the encoder.
    """
    config, encoder, _, _ = load_trained(workdir)
    tf.io.gfile.makedirs(output)
    version = version or _next_version(output)
    target = os.path.join(output, str(version))
    if os.path.exists(target):
        raise UserError(
            f"Expected a version that does not exist yet, received {target}; "
            "leave --version out or choose another."
        )
    module = ServedEncoder(
        encoder, image_size=config.image_size, keep=config.eval_keep
    )
    # Beside its target, so that the rename stays on one file system; servers
    # look at names that are numbers only.
    draft = tempfile.mkdtemp(prefix=f".draft-{version}-", dir=output)
    try:
        os.chmod(draft, 0o755)
        _save(module, draft)
        _verify(module, draft, config.image_size)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _save(module, path):
    any_size = tf.TensorSpec([None, None, None, 3], tf.float32, "images")
    tf.saved_model.save(
        module,
        path,
        signatures={
            "serving_default": module.image_bytes.get_concrete_function(),
            "images": module.images.get_concrete_function(any_size),
        },
    )


def _verify(module, path, size):
    """Raises `UserError` unless another process computes what we compute."""
    ramp = np.linspace(0, 255, size * 2 * size * 3).reshape(size, 2 * size, 3)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3))
    encoded = [
        tf.io.encode_png(np.uint8(noise)).numpy(),
        tf.io.encode_jpeg(np.uint8(ramp)).numpy(),
    ]
    images = np.float32(noise[np.newaxis] / 255.0)
    with tempfile.TemporaryDirectory() as folder:
        examples = os.path.join(folder, "examples.npz")
        np.savez(
            examples,
            # Bytes as integers: arrays of objects would have to be pickled.
            **{
                f"bytes_{i}": np.frombuffer(b, np.uint8)
                for i, b in enumerate(encoded)
            },
            images=images,
            **_named("serving_default", module.image_bytes(encoded)),
            **_named("images", module.images(images)),
        )
        # -I: nothing of ours is on the path; the model must stand alone.
        result = subprocess.run(
            [sys.executable, "-I", _VERIFY, path, examples],
            capture_output=True,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
    if result.returncode:
        raise UserError(
            "Expected the exported model to reproduce the encoder in another "
            f"process, received: {result.stderr.strip().splitlines()[-1:]}; "
            "nothing was published, please report this."
        )


def _named(signature, outputs):
    return {f"{signature}/{k}": v.numpy() for k, v in outputs.items()}


def _next_version(output):
    versions = [int(n) for n in os.listdir(output) if n.isdigit()]
    return max(versions, default=0) + 1


def define_flags():
    """Defines this command's flags."""
    flags.DEFINE_string("workdir", None, "directory of the run to export")
    flags.DEFINE_string("output", None, "directory of the model's versions")
    flags.DEFINE_integer(
        "version",
        0,
        "number of this version; 0: one more than the newest",
        lower_bound=0,
    )
    flags.mark_flags_as_required(["workdir", "output"])


def main():
    """Reads the flags and exports."""
    values = flags.FLAGS
    path = export(values.workdir, values.output, version=values.version)
    print(f"exported and verified: {path}")


if __name__ == "__main__":
    define_flags()
    entry.launch(main)
