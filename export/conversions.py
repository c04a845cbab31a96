"""An encoder's model in the formats of `export.formats`, and back.

Each `write_…` takes a `Source` and a path, writes the file, reads it again and
returns what it computes: a function from images uint8 `[n, S, S, 3]` to a
dictionary of `embedding` and `projection`, float32 arrays.
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

# Of all files: their images are float32 (of int8: uint8) in 0..255, and the
# input's name says so.
INPUT = input_name(PIXELS)

_OPSET = 17  # of ONNX; what runtimes since 2022 know

_NEEDS_ONNX = (
    "Expected the packages tf2onnx, onnx and onnxruntime, received: {}; "
    "install them with `pip install 'clsa_tf[onnx]'`."
)


class Unavailable(Exception):
    """A format's optional packages are not there."""


class Source(typing.NamedTuple):
    """What is converted.

    Attributes:
        model: `clsa_tf.networks.functional.functional`, for images of any size.
        image_size: S, in px, for formats that fix it.
        photos: uint8 `[n, S, S, 3]`, images of the kind that it will see, for
            formats with ranges of activations; None: for no such format.
    """

    model: keras.Model
    image_size: int
    photos: typing.Optional[np.ndarray] = None


def write_keras(source, path):
    """Writes a `.keras` file, for Keras 2.15 and newer versions of Keras 2."""
    source.model.save(path)
    _spell_as_keras_2_15(path)
    return _run_keras(keras.models.load_model(path, compile=False))


def _spell_as_keras_2_15(path):
    """Rewrites what tf-keras calls otherwise than Keras 2.15 in a file.

    Keras 2.15 finds neither the package `tf_keras`, which reads the names of
    the package `keras` as its own, nor the argument `optional` of inputs.
    """

    def respell(node):
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
                config = json.loads(content, object_hook=respell)
                content = json.dumps(config).encode()
            file.writestr(info, content)


def write_weights(source, path):
    """Writes the weights alone.

    Keras composes those in a `.keras` file in memory. If the HDF5 library
    itself meets a full disk, it keeps a file that it can never close, and the
    process may crash much later, in Python's garbage collection.
    """
    draft = f"{path}.keras"
    source.model.save(draft)
    with zipfile.ZipFile(draft) as whole, open(path, "wb") as file:
        file.write(whole.read("model.weights.h5"))
    os.remove(draft)
    model = keras.models.clone_model(source.model)  # with initial weights
    model.load_weights(path)
    return _run_keras(model)


def write_float16(source, path):
    """Writes a TFLite file with weights of 16 bits, computing in float32."""
    converter = _converter(source)
    converter.target_spec.supported_types = [tf.float16]
    return _run_tflite(converter, path, to_input=np.float32)


def write_int8(source, path):
    """Writes a TFLite file with weights and activations of 8 bits."""
    # With black and white among them the input's scale is exactly 1: its bytes
    # are those of the pixels.
    extremes = np.zeros([2, *source.photos.shape[1:]], np.uint8)
    extremes[1] = 255
    seen = np.concatenate([source.photos, extremes])
    converter = _converter(source)
    converter.representative_dataset = lambda: (
        [np.float32(image[np.newaxis])] for image in seen
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.float32
    return _run_tflite(converter, path, to_input=lambda images: images)


def write_onnx(source, path):
    """Writes an ONNX file.

    Raises:
        Unavailable: a package is missing, or does not go with the others.
    """
    try:
        import onnxruntime
        import tf2onnx
    # The second is what versions raise that do not go together.
    except (ImportError, AttributeError) as e:
        raise Unavailable(_NEEDS_ONNX.format(first_line(e))) from e
    model = keras.Model(source.model.input, source.model.output)
    # What the outputs are called there; else they bear their layers' names.
    model.output_names = list(source.model.output)
    images = tf.TensorSpec([None, None, None, 3], tf.float32, INPUT)
    tf2onnx.convert.from_keras(model, [images], _OPSET, output_path=path)
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


def _converter(source):
    size = source.image_size
    images = tf.TensorSpec([1, size, size, 3], tf.float32, INPUT)
    function = tf.function(
        lambda images: source.model(images, training=False),
        input_signature=[images],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], source.model
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter


def _run_tflite(converter, path, *, to_input):
    with open(path, "wb") as file:
        file.write(converter.convert())
    with warnings.catch_warnings():
        # TensorFlow 2.21 announces that another package will have it.
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
