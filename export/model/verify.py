"""Loads a SavedModel and compares what it computes with recorded outputs.

    python -I export/model/verify.py python|c MODEL EXAMPLES.npz

Run as a file, in a process that knows nothing of this project: `python` loads
with `tf.saved_model.load`, `c` with TensorFlow's C API, whose loader is that
of TensorFlow Serving, and without TensorFlow's Python. Exit status 0 if all
outputs agree. `export.model.checks` writes the examples and starts it.
"""

import ctypes
import importlib.util
import json
import os
import sys

import numpy as np


def main(kind, model, examples):
    """Raises AssertionError if an output differs by more than rounding."""
    # An editable installation is found wherever Python is started.
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
            assert value.shape == expected.shape, (name, value.shape)
            scale = np.abs(expected).max() + 1e-6
            worst = np.abs(np.float32(value) - expected).max() / scale
            assert worst < case["tolerance"], (
                f"output {name} of signature {case['signature']} is off by "
                f"{worst:.2g} of its largest value"
            )


def _read(arrays, key):
    """An array, or a list of bytes, which are kept as integers."""
    if key in arrays:
        return arrays[key]
    ends = np.cumsum(arrays[f"{key}/lengths"])[:-1]
    parts = np.split(arrays[f"{key}/bytes"], ends)
    return [part.tobytes() for part in parts]


def _load_with_python(model):
    import tensorflow as tf

    # Referred to, as it owns the variables.
    loaded = tf.saved_model.load(model)

    def run(case, inputs):
        function = loaded.signatures[case["signature"]]
        outputs = function(**{k: tf.constant(v) for k, v in inputs.items()})
        assert set(outputs) == set(case["outputs"])
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


# Of tensorflow/c/tf_datatype.h.
_DTYPES = {1: np.float32, 4: np.uint8, 10: np.bool_}
_STRING = 7
_SIZE_OF_STRING = 24  # of tensorflow/core/platform/ctstring_internal.h


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class _CSession:
    """A SavedModel in a session of the C API (tensorflow/c/c_api.h).

    What it allocates is left to the end of the process.
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
        """Runs once.

        Args:
            inputs: pairs of a tensor's name and its value.
            outputs: names of tensors.

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
        # Pointers that come back as integers would be cut to 32 bits.
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
        found = []
        for name in names:
            operation, index = name.rsplit(":", 1)
            pointer = self._call(
                "TF_GraphOperationByName",
                ctypes.c_void_p,
                self._graph,
                operation.encode(),
            )
            assert pointer, f"no operation {operation} in the graph"
            found.append(_Output(pointer, int(index)))
        return (_Output * len(found))(*found)

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
