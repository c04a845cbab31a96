"""Compare the outputs of a SavedModel with recorded outputs.

    python -I export/model/verify.py python|c MODEL EXAMPLES.npz

This file runs as a script, in a process that cannot import this project.
`python` loads the model with `tf.saved_model.load`. `c` loads it with
TensorFlow's C API, which has the loader of TensorFlow Serving, and does not
import TensorFlow's Python package. The exit status is 0 if all outputs agree.
`export.model.savedmodel_checks` writes the examples and starts the script.
"""

import ctypes
import importlib.util
import json
import os
import sys

import numpy as np


class VerificationError(Exception):
    """An output is missing or differs from the recorded one."""


def main(kind, model, examples):
    """Compares all outputs.

    Args:
        kind: loader, `"python"` or `"c"`.
        model: directory of the SavedModel.
        examples: path of the .npz file with inputs, outputs and tolerances.

    Raises:
        VerificationError: an output differs by more than the tolerance.
    """
    # -I does not hide an editable installation.
    sys.modules["clsa_tf"] = sys.modules["export"] = None
    load = {"python": _load_with_python, "c": _load_with_c}[kind]
    arrays = np.load(examples, allow_pickle=False)
    cases = json.loads(str(arrays["cases"]))
    run = load(model)
    for number, case in enumerate(cases):
        inputs = {
            name: _read(arrays, f"{number}/inputs/{name}")
            for name in case["inputs"]
        }
        outputs = run(case, inputs)
        for name, value in outputs.items():
            expected = np.float32(arrays[f"{number}/outputs/{name}"])
            _check_output(case, name, np.float32(value), expected)


def _check_output(case, name, value, expected):
    """Raises `VerificationError` if `value` differs from `expected`."""
    output = f"output {name} of signature {case['signature']}"
    if value.shape != expected.shape:
        raise VerificationError(
            f"{output} has shape {value.shape} instead of {expected.shape}"
        )
    scale = np.abs(expected).max() + 1e-6
    difference = np.abs(value - expected).max() / scale
    if not difference < case["tolerance"]:  # NaN is an error, too
        raise VerificationError(
            f"{output} differs by {difference:.2g} of its largest value"
        )


def _read(arrays, key):
    """Reads an array, or a list of bytes, which are stored as uint8."""
    if key in arrays:
        return arrays[key]
    ends = np.cumsum(arrays[f"{key}/lengths"])[:-1]
    parts = np.split(arrays[f"{key}/bytes"], ends)
    return [part.tobytes() for part in parts]


def _load_with_python(model):
    import tensorflow as tf

    # `run` keeps a reference to it, because it owns the variables.
    loaded = tf.saved_model.load(model)

    def run(case, inputs):
        function = loaded.signatures[case["signature"]]
        outputs = function(**{k: tf.constant(v) for k, v in inputs.items()})
        if set(outputs) != set(case["outputs"]):
            raise VerificationError(
                f"signature {case['signature']} has the outputs "
                f"{', '.join(sorted(outputs))} instead of "
                f"{', '.join(sorted(case['outputs']))}"
            )
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def _load_with_c(model):
    session = _CSession(model)

    def run(case, inputs):
        values = session.run(
            [(case["inputs"][name], value) for name, value in inputs.items()],
            list(case["outputs"].values()),
        )
        return dict(zip(case["outputs"], values))

    return run


# Source: tensorflow/c/tf_datatype.h.
_DTYPES = {1: np.float32, 4: np.uint8, 10: np.bool_}
_STRING = 7
# Source: tensorflow/core/platform/ctstring_internal.h.
_SIZE_OF_STRING = 24


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class _CSession:
    """A SavedModel in a session of the C API (tensorflow/c/c_api.h).

    It never frees its memory; the process ends soon after.
    """

    def __init__(self, model):
        folder = importlib.util.find_spec("tensorflow").origin
        path = os.path.join(os.path.dirname(folder), "libtensorflow_cc.so.2")
        self._lib = ctypes.CDLL(path)
        self._status = self._call("TF_NewStatus", ctypes.c_void_p)
        options = self._call("TF_NewSessionOptions", ctypes.c_void_p)
        self._graph = self._call("TF_NewGraph", ctypes.c_void_p)
        tags = (ctypes.c_char_p * 1)(b"serve")
        self._session = self._call(
            "TF_LoadSessionFromSavedModel",
            ctypes.c_void_p,
            options,
            None,
            os.fsencode(model),
            tags,
            1,
            self._graph,
            None,
            self._status,
        )
        self._check()

    def run(self, inputs, outputs):
        """Runs the graph once.

        Args:
            inputs: list of pairs of a tensor's name and its value.
            outputs: list of tensor names.

        Returns:
            list of arrays.
        """
        names = [name for name, _ in inputs]
        values = [self._tensor(value) for _, value in inputs]
        results = (ctypes.c_void_p * len(outputs))()
        self._call(
            "TF_SessionRun",
            None,
            self._session,
            None,
            self._outputs(names),
            (ctypes.c_void_p * len(values))(*values),
            len(values),
            self._outputs(outputs),
            results,
            len(outputs),
            None,
            0,
            None,
            self._status,
        )
        self._check()
        return [self._array(tensor) for tensor in results]

    def _call(self, name, result, *arguments):
        function = getattr(self._lib, name)
        function.restype = result
        # ctypes would truncate pointers given as integers to 32 bits.
        return function(
            *(
                ctypes.c_void_p(x) if isinstance(x, int) and x > 2**31 else x
                for x in arguments
            )
        )

    def _check(self):
        if self._call("TF_GetCode", ctypes.c_int, self._status):
            message = self._call("TF_Message", ctypes.c_char_p, self._status)
            raise RuntimeError(message.decode())

    def _outputs(self, names):
        outputs = []
        for name in names:
            operation, index = name.rsplit(":", 1)
            pointer = self._call(
                "TF_GraphOperationByName",
                ctypes.c_void_p,
                self._graph,
                operation.encode(),
            )
            if not pointer:
                raise LookupError(f"no operation {operation} in the graph")
            outputs.append(_Output(pointer, int(index)))
        return (_Output * len(outputs))(*outputs)

    def _tensor(self, value):
        if isinstance(value, list):
            return self._strings(value)
        value = np.ascontiguousarray(value)
        dtype = {t: n for n, t in _DTYPES.items()}[value.dtype.type]
        tensor, data = self._allocate(dtype, value.shape, value.nbytes)
        ctypes.memmove(data, value.ctypes.data, value.nbytes)
        return tensor

    def _strings(self, values):
        size = len(values) * _SIZE_OF_STRING
        tensor, data = self._allocate(_STRING, [len(values)], size)
        for i, value in enumerate(values):
            place = ctypes.c_void_p(data + i * _SIZE_OF_STRING)
            self._call("TF_StringInit", None, place)
            length = ctypes.c_size_t(len(value))
            self._call("TF_StringCopy", None, place, value, length)
        return tensor

    def _allocate(self, dtype, shape, size):
        tensor = self._call(
            "TF_AllocateTensor",
            ctypes.c_void_p,
            dtype,
            (ctypes.c_int64 * len(shape))(*shape),
            len(shape),
            ctypes.c_size_t(size),
        )
        return tensor, self._call("TF_TensorData", ctypes.c_void_p, tensor)

    def _array(self, tensor):
        dtype = _DTYPES[self._call("TF_TensorType", ctypes.c_int, tensor)]
        rank = self._call("TF_NumDims", ctypes.c_int, tensor)
        shape = [
            self._call("TF_Dim", ctypes.c_int64, tensor, axis)
            for axis in range(rank)
        ]
        size = self._call("TF_TensorByteSize", ctypes.c_size_t, tensor)
        data = self._call("TF_TensorData", ctypes.c_void_p, tensor)
        return np.frombuffer(ctypes.string_at(data, size), dtype).reshape(shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
