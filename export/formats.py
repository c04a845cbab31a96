"""Export the encoder of a run to Keras, TensorFlow Lite and ONNX.

    python -m export.formats --workdir=runs/photos --output=models/formats

The command compares each file with the encoder before it moves the file to
OUTPUT. OUTPUT/formats.json contains the measurements. **All files take images
as RGB in 0..255**, as `clsa_tf.load_encoder` and the loaders of Keras do. Their
input is called `images_0_255`. (In files of earlier versions it is called
`images` and takes 0..1, except int8.)

* `encoder.keras`: the model, which plain Keras can load. Images float32
  `[N, H, W, 3]` of any size.
* `encoder.weights.h5`: the weights, for `load_weights` of this model.
* `encoder_float16.tflite`: images float32 `[1, S, S, 3]`. The shape is fixed
  because mobile accelerators require it; on a CPU `resize_tensor_input` allows
  larger batches. S is the run's `--image_size`.
* `encoder_int8.tflite`: int8 weights and activations. Images are uint8
  `[1, S, S, 3]`, outputs are float32.
* `encoder.onnx`: same inputs as `encoder.keras`. Requires tf2onnx, onnx and
  onnxruntime; left out without them.

Each file has the outputs `embedding` float32 `[N, F]` and `projection` float32
`[N, D]`, unit rows.
"""

import json
import math
import os
import typing

import numpy as np
import tensorflow as tf
from absl import flags

from clsa_tf import files, stack
from clsa_tf.cli import launch
from clsa_tf.data.evaluation_batches import evaluation_batches
from clsa_tf.data.open import FOLDER, open_source, open_train_source
from clsa_tf.data.unreadable import UnreadableImages
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

SUMMARY = files.FORMATS

# Largest accepted deviations from the encoder.
# float32, as a share of the output's largest value: rounding errors.
ROUNDING = 1e-4
# float16 weights, as a share of the output's largest value: each weight has an
# error of up to 5e-4, which grows with the square root of the layers.
HALF = 1e-2
# int8, 1 - cosine to the encoder's output for the worst image.
QUANTISED = 0.05
# Loss of kNN accuracy, in addition to two standard errors.
KNN_LOSS = 0.03

_CALIBRATION = 200  # images for the ranges of int8 activations
_COMPARED = 32  # further images for the comparison of int8


class ExportFormat(typing.NamedTuple):
    """A file format of an exported encoder.

    Attributes:
        file: name of the file.
        write: function, see `export.conversions`.
        measure: function from two arrays `[n, F]` to their deviation.
        bound: largest accepted deviation.
        lossy: whether to measure the loss of kNN accuracy, too.
        dtype: dtype of the images.
    """

    file: str
    write: typing.Callable
    measure: typing.Callable
    bound: float
    lossy: bool = False
    dtype: str = "float32"


def share_of_largest(found, expected):
    """Returns the largest difference as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def one_minus_cosine(found, expected):
    """Returns the largest 1 - cosine of two rows, in [0, 2]."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(1 - np.min(np.sum(found * expected, axis=1) / lengths))


FORMATS = {
    "keras": ExportFormat(
        encoder_files.KERAS_FILE,
        conversions.write_keras,
        share_of_largest,
        ROUNDING,
    ),
    "weights": ExportFormat(
        "encoder.weights.h5",
        conversions.write_weights,
        share_of_largest,
        ROUNDING,
    ),
    "tflite_float16": ExportFormat(
        "encoder_float16.tflite",
        conversions.write_float16,
        share_of_largest,
        HALF,
        lossy=True,
    ),
    "tflite_int8": ExportFormat(
        "encoder_int8.tflite",
        conversions.write_int8,
        one_minus_cosine,
        QUANTISED,
        lossy=True,
        dtype="uint8",
    ),
    "onnx": ExportFormat(
        "encoder.onnx", conversions.write_onnx, share_of_largest, ROUNDING
    ),
}


def export(workdir, output, *, formats=tuple(FORMATS), images="", knn=1000):
    """Writes the encoder of a run in other formats.

    Args:
        workdir: directory of the run.
        output: directory for the files; created if missing.
        formats: names out of `FORMATS`.
        images: folder of images for int8; empty: the run's dataset.
        knn: maximum number of labelled images each in the bank and the queries
            that measure the accuracy of the TFLite files; 0: not measured.

    Returns:
        dictionary from file names to measurements, as in `formats.json`, which
        also keeps the entries of earlier calls.

    Raises:
        UserError: there is no run or no image, a file differs from the encoder
            by more than its bound, or no file could be written.
    """
    trained = load_trained(workdir)
    calibration = compared = None
    if "tflite_int8" in formats:
        calibration, compared = _int8_images(trained.config, images)
    os.makedirs(output, exist_ok=True)
    encoder = conversions.KerasEncoder(
        functional.from_encoder(trained.encoder, trained.config),
        trained.config.image_size,
        calibration,
    )
    lossy = any(FORMATS[name].lossy for name in formats)
    accuracy = _knn(trained, knn) if knn and lossy else None
    written = {}
    for name in formats:
        file_format = FORMATS[name]
        try:
            with progress.waiting(f"writing and comparing {file_format.file}"):
                measured = _write(
                    file_format, encoder, trained, output, compared, accuracy
                )
        except conversions.FormatUnavailable as e:
            print(f"skipped {file_format.file}: {e}")
            continue
        written[file_format.file] = {"format": name} | measured
        _update_summary(output, written)
        print(f"wrote and compared {_describe(file_format.file, measured)}")
    if not written:
        raise UserError(
            f"Cannot write {', '.join(formats)}: the packages named above are "
            "missing; install them or choose other --formats."
        )
    print(f"all files are in {output}; {SUMMARY} contains the measurements")
    outcome.show(outcome.of(workdir, trained))
    return written


def _write(file_format, encoder, trained, output, compared, accuracy):
    """Writes, checks and publishes one file; returns its measurements."""
    with files.draft_directory(output) as draft:
        path = os.path.join(draft, file_format.file)
        run = file_format.write(encoder, path)
        measured = {
            "bytes": os.path.getsize(path),
            "input": {
                "name": conversions.INPUT,
                "dtype": file_format.dtype,
                "range": list(functional.PIXELS),
            },
            "image_size": trained.config.image_size,
            "fingerprint": card.fingerprint(trained.encoder.variables),
            "made_with": stack.versions(),
            **_deviation(file_format, run, trained, compared),
        }
        if file_format.lossy and accuracy:
            measured |= _knn_loss(file_format, run, accuracy)
        files.publish(path, os.path.join(output, file_format.file))
    return measured


def _deviation(file_format, run, trained, compared):
    """Measures the deviation from the encoder; raises `UserError` if large."""
    images = compared
    if file_format.measure is share_of_largest:
        size = trained.config.image_size
        images = np.random.default_rng(0).integers(0, 256, [4, size, size, 3])
        images = np.uint8(images)
    expected = {
        "embedding": trained.encoder(images).numpy(),
        "projection": trained.encoder.project(images).numpy(),
    }
    found = run(images)
    worst = max(file_format.measure(found[k], expected[k]) for k in expected)
    measure = file_format.measure.__name__.replace("_", " ")
    if not worst <= file_format.bound:  # NaN is an error, too
        raise UserError(
            f"Expected {file_format.file} to differ from the encoder by at "
            f"most {file_format.bound:g} ({measure}), received {worst:.2g}; "
            "the file was not written: remove it from --formats, or set "
            "--images to typical images for int8."
        )
    return {
        "deviation": worst,
        "bound": file_format.bound,
        "measure": measure,
    }


class _Knn(typing.NamedTuple):
    """The run's kNN evaluation, on some of its images."""

    task: typing.Any  # evaluation.task.Task
    queries: int
    encoder_accuracy: float


def _knn(trained, limit):
    """Returns `_Knn`, or prints why it cannot be measured and returns None."""
    config = trained.config
    unreadable = UnreadableImages(max_bad_share=config.max_bad_share)
    try:
        evaluation = plan(
            config.replace(knn_bank=min(limit, config.knn_bank)),
            open_train_source(config),
        )
    except UserError as e:
        print(f"kNN accuracy is not measured: {e}")
        return None
    if not evaluation.has_accuracy:
        print(f"kNN accuracy is not measured: {evaluation.no_accuracy}")
        return None
    task = evaluation.task(unreadable)
    if evaluation.queries:
        # Spread over all queries, which may be sorted by class.
        every = math.ceil(evaluation.queries.size / limit)
        task.queries = task.queries.unbatch().shard(every, 0).batch(256)
    bank, queries = task.features(compiled(trained.encoder))
    accuracy, count = task.accuracy_of(bank, queries), len(queries[0])
    print(f"kNN accuracy, float32: {accuracy:.1%} of {count} images")
    return _Knn(task, count, accuracy)


def _knn_loss(file_format, run, knn):
    """Measures the loss of kNN accuracy; raises `UserError` if it is large."""
    accuracy = knn.task.accuracy(
        lambda images: tf.constant(run(images.numpy())["embedding"])
    )
    # The last term is an upper bound of two standard errors.
    allowed = KNN_LOSS + knn.queries**-0.5
    if knn.encoder_accuracy - accuracy > allowed:
        raise UserError(
            f"Expected {file_format.file} to lose at most {allowed:.1%} of kNN "
            f"accuracy, received {accuracy:.1%} instead of "
            f"{knn.encoder_accuracy:.1%}; the file was not written: set "
            "--images to typical images, or remove it from --formats."
        )
    return {
        "knn": accuracy,
        "knn_float32": knn.encoder_accuracy,
        "knn_images": knn.queries,
    }


def _int8_images(config, folder):
    """Returns images for the calibration and the comparison of int8, uint8."""
    source = (
        open_source(FOLDER + folder, labels="none")
        if folder
        else open_train_source(config)
    )
    batches = evaluation_batches(
        source,
        image_size=config.image_size,
        crop_ratio=config.eval_keep,
        batch_size=32,
        unreadable=UnreadableImages(max_bad_share=config.max_bad_share),
        limit=_CALIBRATION + _COMPARED,
    )
    images = np.concatenate([images for images, _ in batches])
    if len(images) < 2:
        raise UserError(
            f"Expected at least 2 images to calibrate int8 in {source.name}, "
            f"received {len(images)}; set --images to a folder with more."
        )
    # Shuffled, because a small dataset is read in the order of its classes.
    images = np.random.default_rng(0).permutation(images)
    compared = min(_COMPARED, math.ceil(len(images) / 4))
    return images[compared:], images[:compared]


def _update_summary(output, written):
    path = os.path.join(output, SUMMARY)
    try:
        with open(path, encoding="utf-8") as file:
            earlier = dict(json.load(file))
    except (OSError, ValueError, TypeError):
        earlier = {}
    text = json.dumps(earlier | written, indent=2) + "\n"
    files.write_atomically(path, text)


def _describe(file, measured):
    """Returns one line of text."""
    text = (
        f"{file}: {measured['bytes'] / 2**20:.2f} MiB, deviation "
        f"{measured['deviation']:.1e} ({measured['measure']}, bound "
        f"{measured['bound']:g})"
    )
    if "knn" in measured:
        text += (
            f", kNN {measured['knn']:.1%} "
            f"(float32: {measured['knn_float32']:.1%})"
        )
    return text


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path("workdir", None, "directory of the run", flag_values)
    define_path("output", None, "directory for the files", flag_values)
    flags.DEFINE_list(
        "formats",
        list(FORMATS),
        f"names out of {', '.join(FORMATS)}, separated by commas",
        flag_values,
    )
    define_path(
        "images",
        "",
        f"folder of typical images, about {_CALIBRATION} or more, for the "
        "ranges of int8 activations; empty: the dataset of the run",
        flag_values,
    )
    flags.DEFINE_integer(
        "knn_images",
        1000,
        "maximum number of labelled images of the run's dataset for the kNN "
        "accuracy of the TFLite files; 0: not measured",
        lower_bound=0,
        flag_values=flag_values,
    )
    require(flag_values, "workdir", "output")
    flags.register_validator(
        "formats",
        lambda names: names and set(names) <= set(FORMATS),
        f"names out of {', '.join(FORMATS)}, separated by commas",
        flag_values,
    )


def main():
    """Reads the flags and writes the files."""
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
