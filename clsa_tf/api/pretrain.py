"""Pretraining from Python: `clsa_tf.pretrain`.

It does the same as `python -m clsa_tf.train`, with the same settings, defaults,
files and messages. Settings are formatted as flags and parsed like those.
"""

import contextlib
import os
import signal

import tensorflow as tf
from tensorflow import keras

from clsa_tf import config as config_lib
from clsa_tf.api import load
from clsa_tf.cli import parser
from clsa_tf.data.open import FOLDER, TFRECORD
from clsa_tf.data.sources import dataset_writer
from clsa_tf.data.sources.tfds import INFO
from clsa_tf.errors import Stopped, UserError
from clsa_tf.options.flags import expand_user
from clsa_tf.training import run as run_lib

# Directories within the run's directory that a `tf.data.Dataset` is written to.
DATASET = "dataset"
EVAL_DATASET = "eval_dataset"


def pretrain(data, *, workdir, flagfile="", outputs="embedding", **settings):
    """Pretrains an encoder and returns it, ready to fine-tune.

        encoder = clsa_tf.pretrain("/photos", workdir="runs/photos")
        model = keras.Sequential([encoder, keras.layers.Dense(10)])

    The same call resumes a run that was stopped. If the run is complete, it
    returns the encoder without training.

    A `tf.data.Dataset` is read once and written to `workdir` without loss (see
    `clsa_tf.data.sources.dataset_writer`); later calls use the written files.
    With several workers, pass files instead of a `tf.data.Dataset`, and call
    this function before TensorFlow computes anything.

    Args:
        data: a directory of images; any value of `--dataset` (`"cifar10"`,
            `"shapes"`, `"tfrecord:/data/train-*"`); or a finite
            `tf.data.Dataset`. Its elements are single images, (image, label),
            or dicts with `"image"` and optionally `"label"`. Images are uint8
            or float in [0, 1], `[H, W, 3]`, or encoded, string `[]`.
        workdir: directory of the run for checkpoints, metrics and pictures.
        flagfile: file of settings to start from, or the name of a recipe,
            such as `"quickstart.flags"`.
        outputs: outputs of the model, see `clsa_tf.load_encoder`.
        **settings: flags of `python -m clsa_tf.train` by their names, such as
            `method="moco"`, `total_epochs=100` or `query_crops="224:0.2:1"`.
            They override those in `flagfile`. `eval_dataset` accepts the same
            values as `data`, with labels; the kNN accuracy is measured on it.

    Returns:
        functional `keras.Model`, trainable, for pixels in 0..255; the result
        of `clsa_tf.load_encoder(workdir, outputs=outputs)`.

    Raises:
        UserError: invalid input, such as a setting, an image or a checkpoint.
        KeyboardInterrupt: after Ctrl-C (SIGINT), when the step is saved. The
            same call resumes the run.
        Stopped: after SIGTERM, when the step is saved. The same call resumes
            the run.
        WorkerLost: another process of the same job has stopped.
    """
    if outputs not in load.OUTPUTS:  # checked before training
        raise UserError(
            f"Expected outputs to be one of {', '.join(load.OUTPUTS)}, "
            f"received {outputs!r}; choose one of them."
        )
    config = make_config(data, workdir=workdir, flagfile=flagfile, **settings)
    if isinstance(data, tf.data.Dataset):
        dataset_writer.write(data, os.path.join(config.workdir, DATASET))
    evaluated = settings.get("eval_dataset")
    if isinstance(evaluated, tf.data.Dataset):
        path = os.path.join(config.workdir, EVAL_DATASET)
        dataset_writer.write(evaluated, path)
    with _default_precision():
        try:
            run_lib.run(config)
        except Stopped as e:
            if e.signal != signal.SIGINT:
                raise
            raise KeyboardInterrupt("the same call resumes the run") from e
        return load.load_encoder(config.workdir, outputs=outputs)


def make_config(data, *, workdir, flagfile="", **settings):
    """Returns the `clsa_tf.config.Config` of a call of `pretrain`.

    Args:
        data: see `pretrain`.
        workdir: see `pretrain`.
        flagfile: see `pretrain`.
        **settings: see `pretrain`.

    Raises:
        UserError: a setting or the data do not exist, or a value is invalid.
    """
    if not isinstance(workdir, (str, os.PathLike)) or not os.fspath(workdir):
        raise UserError(
            f"Expected a directory as workdir, received {workdir!r}; pass a "
            "path."
        )
    _check_names(settings)
    workdir = os.path.expanduser(os.fspath(workdir))
    evaluated = settings.get("eval_dataset", "")
    if not isinstance(evaluated, str) or evaluated:
        evaluated = _dataset(evaluated, workdir, EVAL_DATASET)
        settings = settings | {"eval_dataset": evaluated}
    flags = {
        "dataset": _dataset(data, workdir, DATASET),
        "workdir": workdir,
        **{name: _spell(name, value) for name, value in settings.items()},
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    if flagfile:
        arguments.insert(0, f"--flagfile={os.fspath(flagfile)}")
    return config_lib.parse(arguments)


def _dataset(data, workdir, name):
    """Returns the value of `--dataset` for `data`.

    Args:
        data: see `pretrain`.
        workdir: see `pretrain`.
        name: directory within `workdir` for a `tf.data.Dataset`.
    """
    if isinstance(data, tf.data.Dataset):
        return TFRECORD + dataset_writer.pattern(os.path.join(workdir, name))
    if not isinstance(data, (str, os.PathLike)):
        raise UserError(
            "Expected a directory of images, a value of --dataset or a "
            f"tf.data.Dataset, received {type(data).__name__}; convert arrays "
            "with tf.data.Dataset.from_tensor_slices."
        )
    path = expand_user(os.fspath(data))
    if os.path.isdir(path):
        prepared = os.path.exists(os.path.join(path, INFO))
        return path if prepared else FOLDER + path
    # Other text may be the name of a dataset.
    if not isinstance(data, str) or path.startswith((".", "/", "~")):
        raise UserError(
            f"Expected a directory of images, received {path!r}, which is not "
            "a directory; check the path."
        )
    return path


def _check_names(settings):
    """Raises `UserError` unless all names are names of flags."""
    known = config_lib.names()
    for name in settings:
        if name == "dataset":
            raise UserError(
                "Expected the dataset as the first argument only, received "
                f"dataset={settings[name]!r}, too; omit the second one."
            )
        if name not in known:
            near = parser.suggest(name, [*known, "flagfile"])
            raise UserError(
                f"Expected the name of a flag, received {name!r}; "
                + (f"did you mean {' or '.join(near)}? " if near else "")
                + "`python -m clsa_tf.train --help` lists them."
            )


def _spell(name, value):
    """Formats a value as text of a flag."""
    if value is None:
        raise UserError(
            f"Expected a value of {name}, received None; omit {name}."
        )
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


@contextlib.contextmanager
def _default_precision():
    """Context manager in which only `--precision` determines the precision.

    It suspends Keras' global policy and restores it and the use of TF32.
    """
    before = keras.mixed_precision.global_policy()
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
