"""Writes the encoder of a run for Keras, TensorFlow Lite and ONNX.

    python -m export.formats --workdir=runs/photos --output=models/formats

Writes into OUTPUT, each file complete and compared with the encoder or not at
all, and what was measured into OUTPUT/formats.json. **Images are RGB in 0..255
in all of them**, as `clsa_tf.load_encoder` and Keras' loaders have them, and
their input is called `images_0_255`. (Files of earlier versions call it
`images`, and all but int8 take 0..1.)

* `encoder.keras`: the whole model, of Keras' own layers; plain Keras loads it.
  Images float32 `[N, H, W, 3]` of any size.
* `encoder.weights.h5`: its weights, for `load_weights` of such a model.
* `encoder_float16.tflite`: images float32 `[1, S, S, 3]`. The shape is fixed
  because accelerators of phones ask for that; on a processor
  `resize_tensor_input` takes more images at once. S is the run's
  `--image_size`.
* `encoder_int8.tflite`: weights and activations of 8 bits; images are the
  bytes of the pixels, uint8 `[1, S, S, 3]`, outputs are float32.
* `encoder.onnx`: as `encoder.keras`. Needs tf2onnx, onnx and onnxruntime, and
  is left out without them.

Each gives `embedding` float32 `[N, F]` and `projection` float32 `[N, D]`, unit
rows.
"""

import json
import math
import os
import shutil
import tempfile
import typing

import numpy as np
import tensorflow as tf
from absl import flags

from clsa_tf import files
from clsa_tf.cli import launch
from clsa_tf.data.open import FOLDER, open_source, open_train_source
from clsa_tf.data.pipeline import evaluation_batches
from clsa_tf.data.unreadable import Faults
from clsa_tf.errors import UserError
from clsa_tf.evaluation.features import compiled
from clsa_tf.evaluation.task import plan
from clsa_tf.networks import functional
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import progress
from clsa_tf.training import encoder_files, outcome
from clsa_tf.training.checkpoint import load_trained
from export import conversions
from export.model import card

SUMMARY = encoder_files.FORMATS

# Largest deviations from the encoder that are accepted.
# Share of the output's largest value: the same sums in another order.
ROUNDING = 1e-4
# Likewise, for weights of 11 significant bits: each is off by up to 5e-4, and
# the error of a sum grows with the square root of the layers.
HALF = 1e-2
# 1 - cosine to the encoder's output, of the worst image, with 8 bits.
QUANTISED = 0.05
# Share of the images that kNN may get wrong more often, beside what so few
# can say.
KNN_LOSS = 0.03

_CALIBRATION = 200  # photos that ranges of activations are taken from
_COMPARED = 32  # further ones that int8 is compared on


class Format(typing.NamedTuple):
    """A format that can be written.

    Attributes:
        file: its name.
        write: see `export.conversions`.
        measure: the deviation of two arrays `[n, F]`.
        bound: the largest that is accepted.
        lossy: whether the loss of kNN accuracy is measured, too.
        dtype: of its images.
    """

    file: str
    write: typing.Callable
    measure: typing.Callable
    bound: float
    lossy: bool = False
    dtype: str = "float32"


def share_of_largest(found, expected):
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def one_minus_cosine(found, expected):
    """1 - cosine of the two rows that differ most, in [0, 2]."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(1 - np.min(np.sum(found * expected, axis=1) / lengths))


FORMATS = {
    "keras": Format(
        encoder_files.KERAS_FILE,
        conversions.write_keras,
        share_of_largest,
        ROUNDING,
    ),
    "weights": Format(
        "encoder.weights.h5",
        conversions.write_weights,
        share_of_largest,
        ROUNDING,
    ),
    "tflite_float16": Format(
        "encoder_float16.tflite",
        conversions.write_float16,
        share_of_largest,
        HALF,
        lossy=True,
    ),
    "tflite_int8": Format(
        "encoder_int8.tflite",
        conversions.write_int8,
        one_minus_cosine,
        QUANTISED,
        lossy=True,
        dtype="uint8",
    ),
    "onnx": Format(
        "encoder.onnx", conversions.write_onnx, share_of_largest, ROUNDING
    ),
}


def export(workdir, output, *, formats=tuple(FORMATS), images="", knn=1000):
    """Writes the encoder of a run in other formats.

    Args:
        workdir: directory of the run.
        output: directory for the files; created when missing.
        formats: names of `FORMATS`.
        images: folder of photos for int8; empty: the run's own dataset.
        knn: labelled images, at most, that the accuracy of the TFLite files is
            measured with, as many for neighbours as for questions; 0: none.

    Returns:
        dictionary from names of files to what was measured, as in
        `formats.json`, which also keeps what earlier calls wrote.

    Raises:
        UserError: no run or no images there, a file differs from the encoder
            by more than its bound, or nothing could be written.
    """
    trained = load_trained(workdir)
    photos = compared = None
    if "tflite_int8" in formats:
        photos, compared = _photos(trained.config, images)
    os.makedirs(output, exist_ok=True)
    source = conversions.Source(
        functional.from_encoder(trained.encoder, trained.config),
        trained.config.image_size,
        photos,
    )
    lossy = any(FORMATS[name].lossy for name in formats)
    accuracy = _knn(trained, knn) if knn and lossy else None
    written = {}
    for name in formats:
        form = FORMATS[name]
        try:
            with progress.waiting(f"writing {form.file}, and comparing it"):
                found = _write(
                    form, source, trained, output, compared, accuracy
                )
        except conversions.Unavailable as e:
            print(f"left {form.file} out: {e}")
            continue
        written[form.file] = {"format": name} | found
        _note(output, written)
        print(f"wrote and compared {_line(form.file, found)}")
    if not written:
        raise UserError(
            f"Expected to write at least one of {', '.join(formats)}, received "
            "none that can be written here; install what is missing or choose "
            "other --formats."
        )
    print(f"all of it is in {output}; {SUMMARY} has what was measured")
    outcome.show(outcome.of(workdir, trained))
    return written


def _write(form, source, trained, output, compared, accuracy):
    """Writes one file aside, checks it and moves it; what was measured."""
    draft = tempfile.mkdtemp(prefix=".draft-", dir=output)
    path = os.path.join(draft, form.file)
    try:
        run = form.write(source, path)
        found = {
            "bytes": os.path.getsize(path),
            "input": {
                "name": conversions.INPUT,
                "dtype": form.dtype,
                "range": list(functional.PIXELS),
            },
            "image_size": trained.config.image_size,
            "fingerprint": card.fingerprint(trained.encoder.variables),
            **_deviation(form, run, trained, compared),
        }
        if form.lossy and accuracy:
            found |= _loss(form, run, accuracy)
        files.flush_to_disk(path)
        os.replace(path, os.path.join(output, form.file))
        files.flush_to_disk(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return found


def _deviation(form, run, trained, compared):
    images = compared
    if form.measure is share_of_largest:
        size = trained.config.image_size
        images = np.random.default_rng(0).integers(0, 256, [4, size, size, 3])
        images = np.uint8(images)
    expected = {
        "embedding": trained.encoder(images).numpy(),
        "projection": trained.encoder.project(images).numpy(),
    }
    found = run(images)
    worst = max(form.measure(found[k], expected[k]) for k in expected)
    # (NaN is not within it.)
    if not worst <= form.bound:
        raise UserError(
            f"Expected {form.file} to differ from the encoder by at most "
            f"{form.bound:g} ({_words(form.measure)}), received {worst:.2g}; "
            "it was not written: leave it out of --formats, or for int8 give "
            "--images like those that the encoder will see."
        )
    return {
        "deviation": worst,
        "bound": form.bound,
        "measure": _words(form.measure),
    }


def _words(measure):
    return measure.__name__.replace("_", " ")


class _Knn(typing.NamedTuple):
    """The run's evaluation on some of its images."""

    task: typing.Any  # KnnTask
    questions: int
    encoder: float  # its accuracy


def _knn(trained, limit):
    """Returns `_Knn`; None, after saying why, where it cannot be measured."""
    config = trained.config
    faults = Faults(max_bad_share=config.max_bad_share)
    try:
        evaluation = plan(
            config.replace(knn_bank=min(limit, config.knn_bank)),
            open_train_source(config),
        )
    except UserError as e:
        print(f"kNN accuracy is not measured: {e}")
        return None
    if evaluation.no_accuracy:
        print(f"kNN accuracy is not measured: {evaluation.no_accuracy}")
        return None
    task = evaluation.task(faults)
    if evaluation.queries:
        # Spread over all of them: their order may be by class.
        every = math.ceil(evaluation.queries.size / limit)
        task.queries = task.queries.unbatch().shard(every, 0).batch(256)
    bank, queries = task.features(compiled(trained.encoder))
    accuracy, questions = task.accuracy_of(bank, queries), len(queries[0])
    print(f"kNN accuracy, float32: {accuracy:.1%} of {questions} images")
    return _Knn(task, questions, accuracy)


def _loss(form, run, knn):
    found = knn.task.accuracy(
        lambda images: tf.constant(run(images.numpy())["embedding"])
    )
    # Two standard errors, at most, of an accuracy.
    allowed = KNN_LOSS + knn.questions**-0.5
    if knn.encoder - found > allowed:
        raise UserError(
            f"Expected {form.file} to lose at most {allowed:.1%} of kNN "
            f"accuracy, received {found:.1%} instead of {knn.encoder:.1%}; it "
            "was not written: give --images like those that the encoder will "
            "see, or leave it out of --formats."
        )
    return {
        "knn": found,
        "knn_float32": knn.encoder,
        "knn_images": knn.questions,
    }


def _photos(config, folder):
    """Images to calibrate int8 with and others to compare it on, uint8."""
    source = (
        open_source(FOLDER + folder, labels="none")
        if folder
        else open_train_source(config)
    )
    batches = evaluation_batches(
        source,
        image_size=config.image_size,
        keep=config.eval_keep,
        batch_size=32,
        faults=Faults(max_bad_share=config.max_bad_share),
        limit=_CALIBRATION + _COMPARED,
    )
    images = np.concatenate([images for images, _ in batches])
    if len(images) < 2:
        raise UserError(
            f"Expected at least 2 images to calibrate int8 in {source.name}, "
            f"received {len(images)}; name a folder of more with --images."
        )
    # A few are in the order of their names, and that is by class.
    images = np.random.default_rng(0).permutation(images)
    compared = min(_COMPARED, math.ceil(len(images) / 4))
    return images[compared:], images[:compared]


def _note(output, written):
    path = os.path.join(output, SUMMARY)
    try:
        with open(path, encoding="utf-8") as file:
            before = dict(json.load(file))
    except (OSError, ValueError, TypeError):
        before = {}
    text = json.dumps(before | written, indent=2) + "\n"
    files.write_atomically(path, text)


def _line(file, found):
    text = (
        f"{file}: {found['bytes'] / 2**20:.2f} MiB, deviation "
        f"{found['deviation']:.1e} ({found['measure']}, bound "
        f"{found['bound']:g})"
    )
    if "knn" in found:
        text += (
            f", kNN {found['knn']:.1%} (float32: {found['knn_float32']:.1%})"
        )
    return text


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path("workdir", None, "directory of the run", flag_values)
    define_path("output", None, "directory for the files", flag_values)
    flags.DEFINE_list(
        "formats",
        list(FORMATS),
        f"of {', '.join(FORMATS)}, separated by commas",
        flag_values,
    )
    define_path(
        "images",
        "",
        "folder of photos that the ranges of int8 are taken from, like those "
        f"that the encoder will see, some {_CALIBRATION} or more; empty: the "
        "dataset of the run",
        flag_values,
    )
    flags.DEFINE_integer(
        "knn_images",
        1000,
        "labelled images of the run's dataset, at most, that the accuracy of "
        "the TFLite files is measured with; 0: it is not",
        lower_bound=0,
        flag_values=flag_values,
    )
    require(flag_values, "workdir", "output")
    flags.register_validator(
        "formats",
        lambda names: names and set(names) <= set(FORMATS),
        f"names of {', '.join(FORMATS)}, separated by commas",
        flag_values,
    )


def main():
    """Reads the flags and writes."""
    values = flags.FLAGS
    tf.get_logger().setLevel("ERROR")
    export(
        values.workdir,
        values.output,
        formats=values.formats,
        images=values.images,
        knn=values.knn_images,
    )


if __name__ == "__main__":
    launch.launch(main, define_flags)
