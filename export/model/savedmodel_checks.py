"""Checks of an exported SavedModel before it is published.

Each check raises `UserError` if it fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import typing

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from clsa_tf.augment import crop
from clsa_tf.data.decode import decode
from clsa_tf.errors import UserError
from export.model import warmup_requests

_VERIFY = os.path.join(os.path.dirname(__file__), "verify.py")
# Another process may choose other kernels; results then differ by rounding.
_TOLERANCE = {"float32": 1e-4, "mixed_bfloat16": 0.05, "mixed_float16": 0.02}


class Example(typing.NamedTuple):
    """Inputs of a signature and the expected outputs."""

    signature: str
    inputs: dict  # name -> array, or list of bytes
    outputs: dict  # name -> array


def examples(encoder, *, image_size, crop_ratio, outputs, bad_images="error"):
    """Computes the encoder's outputs for fixed images, on the CPU.

    The processes that check an export use the CPU, too.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        image_size: see `export.model.served.ServedEncoder`.
        crop_ratio: see `ServedEncoder`.
        outputs: see `ServedEncoder`.
        bad_images: see `ServedEncoder`.

    Returns:
        list of `Example`, at least one of each signature.
    """
    rng = np.random.default_rng(0)
    noise = np.uint8(rng.integers(0, 256, [2, image_size, image_size, 3]))
    shape = [image_size, 2 * image_size, 3]
    ramp = np.uint8(np.linspace(0, 255, np.prod(shape)).reshape(shape))
    files = [
        tf.io.encode_png(noise[0]).numpy(),
        tf.io.encode_jpeg(ramp).numpy(),
    ]
    prepared = np.stack(
        [
            crop.central(decode(file), size=image_size, crop_ratio=crop_ratio)
            for file in files
        ]
    )

    def expected(images):
        with tf.device("CPU:0"):
            both = {
                "embedding": encoder(images, training=False),
                "projection": encoder.project(images),
            }
        rows = {name: both[name].numpy() for name in outputs}
        if bad_images == "nan":
            rows["valid"] = np.ones(len(images), bool)
        return rows

    floats = np.float32(noise) / np.float32(255)
    return [
        Example("serving_default", {"image_bytes": files}, expected(prepared)),
        Example("images", {"images": floats}, expected(floats)),
        Example("images_uint8", {"images": noise}, expected(noise)),
    ]


def check_clean_process(model, expected, *, precision="float32"):
    """Checks that the model loads and computes the same without this project.

    Args:
        model: directory of the SavedModel.
        expected: list of `Example`.
        precision: compute precision of the model, key of `_TOLERANCE`.
    """
    _compare("python", model, expected, precision)


def check_c_loader(model, expected, *, precision="float32"):
    """Checks the same with TensorFlow's C API, which TensorFlow Serving uses.

    Args:
        model: see `check_clean_process`.
        expected: see `check_clean_process`.
        precision: see `check_clean_process`.
    """
    _compare("c", model, expected, precision)


def check_graph(model, encoder):
    """Checks that the model has its weights once and no training operations.

    Args:
        model: directory of the SavedModel.
        encoder: the encoder that was exported.
    """
    graph = _meta_graph(model).graph_def
    nodes = [n for f in graph.library.function for n in f.node_def]
    training = [n.name for n in [*nodes, *graph.node] if _is_training(n)]
    if training:
        raise UserError(
            f"Expected an inference graph, received one with {len(training)} "
            f"training operations (the first is {training[0]}); please report "
            "this."
        )
    weights = sum(v.numpy().nbytes for v in encoder.variables)
    constants = sum(
        len(n.attr["value"].tensor.tensor_content)
        for n in [*nodes, *graph.node]
        if n.op == "Const"
    )
    folder = os.path.join(model, "variables")
    stored = sum(os.path.getsize(f.path) for f in os.scandir(folder))
    # The checkpoint also contains an index of some hundred names.
    if stored > weights + 100_000 or constants > 100_000:
        raise UserError(
            f"Expected the weights once ({weights} bytes), received "
            f"{stored} bytes of variables and {constants} bytes of constants; "
            "please report this."
        )


def _is_training(node):
    if node.op.startswith("FusedBatchNorm"):
        # SavedModels omit attributes with their default value, here true.
        return "is_training" not in node.attr or node.attr["is_training"].b
    return node.op.endswith("Grad")


def check_warmup(model):
    """Checks that the model can answer each of its warm-up requests.

    TensorFlow Serving does not load a version whose warm-up fails.

    Args:
        model: directory of the SavedModel.
    """
    signatures = _signatures(model)
    path = os.path.join(model, warmup_requests.PATH)
    seen = set()
    try:
        for number, request in enumerate(warmup_requests.read(path)):
            name = request.model_spec.signature_name
            _check_request(number, request, name, signatures)
            seen.add(name)
    except (ValueError, tf.errors.OpError) as e:
        raise UserError(
            f"Expected warm-up requests in {path}, received: {e}; please "
            "report this."
        ) from e
    if seen != set(signatures):
        raise UserError(
            f"Expected warm-up requests for {', '.join(sorted(signatures))} in "
            f"{path}, received requests for {', '.join(sorted(seen)) or 'none'}"
            "; please report this."
        )


def _check_request(number, request, name, signatures):
    """Raises ValueError if a request does not fit its signature."""
    if name not in signatures:
        raise ValueError(f"record {number} is for the signature {name!r}")
    inputs = signatures[name].inputs
    if set(inputs) != set(request.inputs):
        raise ValueError(f"record {number} has inputs {set(request.inputs)}")
    for key, info in inputs.items():
        tensor = request.inputs[key]
        shape = tf.TensorShape(tensor.tensor_shape)
        if tensor.dtype != info.dtype or not shape.is_compatible_with(
            tf.TensorShape(info.tensor_shape)
        ):
            dtype = tf.dtypes.as_dtype(tensor.dtype).name
            raise ValueError(f"record {number}: {key} is {dtype} {shape}")


def _meta_graph(model):
    with open(os.path.join(model, "saved_model.pb"), "rb") as file:
        saved = saved_model_pb2.SavedModel.FromString(file.read())
    return saved.meta_graphs[0]


def _signatures(model):
    """Returns the callable signatures, `SignatureDef` by name."""
    return {
        name: signature
        for name, signature in _meta_graph(model).signature_def.items()
        if not name.startswith("__saved_model")
    }


def _compare(kind, model, expected, precision):
    """Runs verify.py; `kind` is its first argument."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "examples.npz")
        write_examples(path, model, expected, _TOLERANCE[precision])
        # -I keeps this project off the path: the model must be self-contained.
        result = subprocess.run(
            [sys.executable, "-I", _VERIFY, kind, model, path],
            capture_output=True,
            text=True,
            env=os.environ
            | {
                "TF_CPP_MIN_LOG_LEVEL": "2",
                # On the CPU: this process may hold the GPUs, and theirs would
                # be other arithmetic.
                "CUDA_VISIBLE_DEVICES": "-1",
            },
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise UserError(
            "Expected the exported model to reproduce the encoder's outputs in "
            f"another process ({kind}), received exit status "
            f"{result.returncode}: {lines[-1]}; nothing was published, please "
            "report this."
        )


def write_examples(path, model, expected, tolerance):
    """Writes the file that `export/model/verify.py` reads.

    Args:
        path: path of the .npz file. It contains no pickled objects.
        model: directory of the SavedModel.
        expected: list of `Example`.
        tolerance: largest difference, as a share of an output's largest value.
    """
    cases, arrays, signatures = [], {}, _signatures(model)
    for number, example in enumerate(expected):
        signature = signatures[example.signature]
        cases.append(
            {
                "signature": example.signature,
                "inputs": {k: v.name for k, v in signature.inputs.items()},
                "outputs": {
                    k: signature.outputs[k].name for k in example.outputs
                },
                "tolerance": tolerance,
            }
        )
        for name, value in example.outputs.items():
            arrays[f"{number}/outputs/{name}"] = value
        for name, value in example.inputs.items():
            key = f"{number}/inputs/{name}"
            if isinstance(value, list):
                arrays[f"{key}/lengths"] = [len(part) for part in value]
                value = np.frombuffer(b"".join(value), np.uint8)
                key = f"{key}/bytes"
            arrays[key] = value
    np.savez(path, cases=json.dumps(cases), **arrays)
