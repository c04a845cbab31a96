"""Pretraining from Python: `clsa_tf.pretrain` is what users call.

It is the run of `python -m clsa_tf.train`, with the same settings, defaults,
files and words: settings are spelled as flags and parsed as those are.
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

# Within the run's directory: what a `tf.data.Dataset` is written to.
DATASET = "dataset"
EVAL_DATASET = "eval_dataset"  # likewise


def pretrain(data, *, workdir, flagfile="", outputs="embedding", **settings):
    """Pretrains an encoder and returns it, ready to fine-tune.

        encoder = clsa_tf.pretrain("/photos", workdir="runs/photos")
        model = keras.Sequential([encoder, keras.layers.Dense(10)])

    The same call again resumes a run that was stopped, or returns what a
    complete one has learned.

    A `tf.data.Dataset` is read once and written to `workdir` without loss (see
    `clsa_tf.data.sources.dataset_writer`); the same call again finds it there.
    Several workers need files instead, and to call this before TensorFlow
    computes anything.

    Args:
        data: a directory of images; whatever `--dataset` takes (`"cifar10"`,
            `"shapes"`, `"tfrecord:/data/train-*"`); or a finite
            `tf.data.Dataset` of single images, of (image, label) or of
            dictionaries with `"image"` and maybe `"label"`, images being
            uint8 or float in [0, 1], `[H, W, 3]`, or encoded, string `[]`.
        workdir: directory of the run: checkpoints, metrics, pictures.
        flagfile: file of settings to start from, or the name of a recipe,
            such as `"quickstart.flags"`.
        outputs: of the model, see `clsa_tf.load_encoder`.
        **settings: flags of `python -m clsa_tf.train` by their names, such as
            `method="moco"`, `total_epochs=100` or `query_crops="224:0.2:1"`;
            they override those in `flagfile`. `eval_dataset` may be all that
            `data` may be, with labels: what the kNN accuracy is measured on.

    Returns:
        functional `keras.Model`, trainable, of pixels in 0..255: what
        `clsa_tf.load_encoder(workdir, outputs=outputs)` returns.

    Raises:
        UserError: something from outside was wrong; its message says what.
        KeyboardInterrupt: after Ctrl-C (SIGINT), when the step is saved; the
            same call goes on from there.
        Stopped: likewise after SIGTERM.
        WorkerLost: another process of the same job is gone.
    """
    if outputs not in load.OUTPUTS:  # not only when all is done
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
            raise KeyboardInterrupt("the same call goes on from here") from e
        return load.load_encoder(config.workdir, outputs=outputs)


def make_config(data, *, workdir, flagfile="", **settings):
    """Returns the `clsa_tf.config.Config` of a call of `pretrain`.

    Args:
        data: see `pretrain`.
        workdir: likewise.
        flagfile: likewise.
        **settings: likewise.

    Raises:
        UserError: there is no such setting or data, or values are wrong.
    """
    if not isinstance(workdir, (str, os.PathLike)) or not os.fspath(workdir):
        raise UserError(
            f"Expected a directory as workdir, received {workdir!r}; name one."
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
    """Spells `data` as --dataset; `name`: of what is written in the workdir."""
    if isinstance(data, tf.data.Dataset):
        return TFRECORD + dataset_writer.pattern(os.path.join(workdir, name))
    if not isinstance(data, (str, os.PathLike)):
        raise UserError(
            "Expected a directory of images, a dataset as --dataset takes it "
            f"or a tf.data.Dataset, received {type(data).__name__}; arrays "
            "become one by tf.data.Dataset.from_tensor_slices."
        )
    path = expand_user(os.fspath(data))
    if os.path.isdir(path):
        prepared = os.path.exists(os.path.join(path, INFO))
        return path if prepared else FOLDER + path
    # Others may be names of datasets.
    if not isinstance(data, str) or path.startswith((".", "/", "~")):
        raise UserError(
            f"Expected a directory of images, received {path!r}, which is "
            "none; check the path."
        )
    return path


def _check_names(settings):
    """Raises `UserError` unless all names are those of flags."""
    known = config_lib.names()
    for name in settings:
        if name == "dataset":
            raise UserError(
                "Expected the dataset as the first argument, received "
                f"dataset={settings[name]!r}, too; leave that out."
            )
        if name not in known:
            near = parser.suggest(name, [*known, "flagfile"])
            raise UserError(
                f"Expected the name of a flag, received {name!r}; "
                + (f"did you mean {' or '.join(near)}? " if near else "")
                + "`python -m clsa_tf.train --help` lists them."
            )


def _spell(name, value):
    """Spells a value as a flag's."""
    if value is None:
        raise UserError(
            f"Expected a value of {name}, received None; leave {name} out."
        )
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


@contextlib.contextmanager
def _default_precision():
    """Leaves --precision to say it, whatever else the process has set."""
    before = keras.mixed_precision.global_policy()
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
