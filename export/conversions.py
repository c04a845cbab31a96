"""Convert an encoder into the formats of `export.formats`.

Each `write_…` function takes a `KerasEncoder` and a path, writes the file and
loads it again. It returns a function that runs the loaded file: from images
uint8 `[n, S, S, 3]` to a dictionary of `embedding` and `projection`, float32
arrays.
"""

import json
import os
import typing
import warnings
import zipfile

import numpy as np
import tensorflow as tf
from tensorflow import keras

from clsa_tf.errors import first_line
from clsa_tf.networks.functional import PIXELS, input_name

# Name of the input of all files. It contains the range of the pixels, 0..255,
# which are float32, or uint8 for int8.
INPUT = input_name(PIXELS)

_ONNX_OPSET = 17  # supported by runtimes since 2022

_NEEDS_ONNX = (
    "Cannot import the packages tf2onnx, onnx and onnxruntime: {}; install "
    "them with `pip install 'clsa_tf[onnx]'`."
)


class FormatUnavailable(Exception):
    """The optional packages of a format are missing."""


class KerasEncoder(typing.NamedTuple):
    """An encoder as a Keras model, with the data for its conversion.

    Attributes:
        model: result of `clsa_tf.networks.functional.functional`, for images
            of any size.
        image_size: S, in px, for formats with a fixed size.
        calibration_images: uint8 `[n, S, S, 3]`, typical images, from which
            int8 gets the ranges of its activations; None without int8.
    """

    model: keras.Model
    image_size: int
    calibration_images: typing.Optional[np.ndarray] = None


def write_keras(encoder, path):
    """Writes a `.keras` file, for Keras 2.15 and newer versions of Keras 2."""
    encoder.model.save(path)
    _make_compatible_with_keras_2_15(path)
    return _run_keras(keras.models.load_model(path, compile=False))


def _make_compatible_with_keras_2_15(path):
    """Replaces the names in a file of tf-keras that Keras 2.15 does not know.

    These are the package `tf_keras` and the argument `optional` of inputs.
    tf-keras also accepts the package name `keras`.
    """

    def replace_names(node):
        if node.get("class_name") == "InputLayer":
            node["config"].pop("optional", None)
        module = node.get("module")
        if isinstance(module, str) and module.startswith("tf_keras."):
            node["module"] = module[len("tf_") :]
        return node

    with zipfile.ZipFile(path) as file:
        parts = {info: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for info, content in parts.items():
            if info.filename == "config.json":
                config = json.loads(content, object_hook=replace_names)
                content = json.dumps(config).encode()
            file.writestr(info, content)


def write_weights(encoder, path):
    """Writes a `.weights.h5` file.

    The weights are extracted from a `.keras` file, which Keras builds in
    memory. If the HDF5 library wrote to a full disk, it could not close its
    file, and Python might crash later in garbage collection.
    """
    draft = f"{path}.keras"
    encoder.model.save(draft)
    with zipfile.ZipFile(draft) as whole, open(path, "wb") as file:
        file.write(whole.read("model.weights.h5"))
    os.remove(draft)
    model = keras.models.clone_model(encoder.model)  # with initial weights
    model.load_weights(path)
    return _run_keras(model)


def write_float16(encoder, path):
    """Writes a TFLite file with float16 weights, which computes in float32."""
    converter = _converter(encoder)
    converter.target_spec.supported_types = [tf.float16]
    return _run_tflite(converter, path, to_input=np.float32)


def write_int8(encoder, path):
    """Writes a TFLite file with int8 weights and activations."""
    # A black and a white image make the input's scale exactly 1, so that the
    # input takes the bytes of the pixels.
    extremes = np.zeros([2, *encoder.calibration_images.shape[1:]], np.uint8)
    extremes[1] = 255
    images = np.concatenate([encoder.calibration_images, extremes])
    converter = _converter(encoder)
    converter.representative_dataset = lambda: (
        [np.float32(image[np.newaxis])] for image in images
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.float32
    return _run_tflite(converter, path, to_input=lambda images: images)


def write_onnx(encoder, path):
    """Writes an ONNX file.

    Raises:
        FormatUnavailable: a package is missing, or the versions of the
            packages are incompatible.
    """
    try:
        import onnxruntime
        import tf2onnx
    # Incompatible versions raise AttributeError.
    except (ImportError, AttributeError) as e:
        raise FormatUnavailable(_NEEDS_ONNX.format(first_line(e))) from e
    model = keras.Model(encoder.model.input, encoder.model.output)
    # Otherwise ONNX would use the names of layers.
    model.output_names = list(encoder.model.output)
    images = tf.TensorSpec([None, None, None, 3], tf.float32, INPUT)
    tf2onnx.convert.from_keras(model, [images], _ONNX_OPSET, output_path=path)
    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(
        zip(names, session.run(names, {INPUT: np.float32(images)}))
    )


def _run_keras(model):
    def run(images):
        outputs = model(np.float32(images), training=False)
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def _converter(encoder):
    size = encoder.image_size
    images = tf.TensorSpec([1, size, size, 3], tf.float32, INPUT)
    function = tf.function(
        lambda images: encoder.model(images, training=False),
        input_signature=[images],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], encoder.model
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter


def _run_tflite(converter, path, *, to_input):
    with open(path, "wb") as file:
        file.write(converter.convert())
    with warnings.catch_warnings():
        # TensorFlow 2.21 warns that the interpreter moves to LiteRT.
        warnings.filterwarnings("ignore", "(?s).*LiteRT", UserWarning)
        interpreter = tf.lite.Interpreter(path, num_threads=os.cpu_count())
    signature = interpreter.get_signature_runner()

    def run(images):
        rows = [
            signature(**{INPUT: to_input(images[i : i + 1])})
            for i in range(len(images))
        ]
        return {
            name: np.concatenate([r[name] for r in rows]) for name in rows[0]
        }

    return run
