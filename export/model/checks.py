"""What has to hold before an exported model may be called one.

Each check raises `UserError` if it does not hold.
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
from export.model import warmup

_VERIFY = os.path.join(os.path.dirname(__file__), "verify.py")
# Another process may choose other kernels; results then differ by rounding.
_TOLERANCE = {"float32": 1e-4, "mixed_bfloat16": 0.05, "mixed_float16": 0.02}


class Example(typing.NamedTuple):
    """Inputs of a signature, and the outputs that they should give."""

    signature: str
    inputs: dict  # name -> array, or list of bytes
    outputs: dict  # name -> array


def examples(encoder, *, image_size, keep, outputs, bad_images="error"):
    """What the encoder itself makes of fixed images.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        image_size: see `export.model.served.ServedEncoder`.
        keep: likewise.
        outputs: likewise.
        bad_images: likewise.

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
            crop.central(decode(f), size=image_size, crop_ratio=keep)
            for f in files
        ]
    )

    def expected(images):
        both = {
            "embedding": encoder(images, training=False),
            "projection": encoder.project(images),
        }
        found = {name: both[name].numpy() for name in outputs}
        if bad_images == "nan":
            found["valid"] = np.ones(len(images), bool)
        return found

    floats = np.float32(noise) / np.float32(255)
    return [
        Example("serving_default", {"image_bytes": files}, expected(prepared)),
        Example("images", {"images": floats}, expected(floats)),
        Example("images_uint8", {"images": noise}, expected(noise)),
    ]


def check_clean_process(model, expected, *, precision="float32"):
    """The model loads where this project is not, and computes the same.

    Args:
        model: directory of the SavedModel.
        expected: list of `Example`.
        precision: in which the model computes.
    """
    _compare("python", model, expected, precision)


def check_c_loader(model, expected, *, precision="float32"):
    """Likewise through TensorFlow's C API, as TensorFlow Serving loads it."""
    _compare("c", model, expected, precision)


def check_graph(model, encoder):
    """The model holds the variables once, and nothing of a training.

    Args:
        model: directory of the SavedModel.
        encoder: what was exported.
    """
    graph = _meta_graph(model).graph_def
    nodes = [n for f in graph.library.function for n in f.node_def]
    trains = [n.name for n in [*nodes, *graph.node] if _trains(n)]
    if trains:
        raise UserError(
            "Expected a graph for inference, received one with "
            f"{len(trains)} nodes of a training ({trains[0]}); please report "
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
    # An index of some hundred names comes with them.
    if stored > weights + 100_000 or constants > 100_000:
        raise UserError(
            f"Expected the weights once ({weights} bytes), received "
            f"{stored} bytes of variables and {constants} of constants; "
            "please report this."
        )


def _trains(node):
    if node.op.startswith("FusedBatchNorm"):
        # True is the default, which is not stored.
        return "is_training" not in node.attr or node.attr["is_training"].b
    return node.op.endswith("Grad")


def check_warmup(model):
    """Every request that warms the model up is one that it can answer.

    TensorFlow Serving refuses to load a version with one that it cannot.

    Args:
        model: directory of the SavedModel.
    """
    signatures = _signatures(model)
    path = os.path.join(model, warmup.PATH)
    seen = set()
    try:
        for number, request in enumerate(warmup.read(path)):
            name = request.model_spec.signature_name
            _check_request(number, request, name, signatures)
            seen.add(name)
    except (ValueError, tf.errors.OpError) as e:
        raise UserError(
            f"Expected requests for a warm-up in {path}, received: {e}; "
            "please report this."
        ) from e
    if seen != set(signatures):
        raise UserError(
            f"Expected requests for {', '.join(sorted(signatures))} in {path},"
            f" received some for {', '.join(sorted(seen)) or 'none'}; please "
            "report this."
        )


def _check_request(number, request, name, signatures):
    """Raises ValueError if a signature does not take a request."""
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
    """Signature name -> `SignatureDef`, those that can be called."""
    return {
        name: signature
        for name, signature in _meta_graph(model).signature_def.items()
        if not name.startswith("__saved_model")
    }


def _compare(kind, model, expected, precision):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "examples.npz")
        _write(path, model, expected, _TOLERANCE[precision])
        # -I: nothing of ours is on the path; the model must stand alone.
        result = subprocess.run(
            [sys.executable, "-I", _VERIFY, kind, model, path],
            capture_output=True,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
    if result.returncode:
        said = result.stderr.strip().splitlines()[-1:]
        raise UserError(
            "Expected the exported model to reproduce the encoder in another "
            f"process ({kind}), received status {result.returncode}: {said}; "
            "nothing was published, please report this."
        )


def _write(path, model, expected, tolerance):
    """Writes what `verify.py` reads, without anything to unpickle."""
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
