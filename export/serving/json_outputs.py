"""Bodies of answers of TensorFlow Serving's REST API, from arrays.

Source: tensorflow_serving/g3doc/api_rest.md and util/json_tensor.cc.
"""

import base64
import json

import grpc
import numpy as np

from export.serving.errors import ServingError


def write_response(outputs, *, rows):
    """Writes the body of an answer.

    Args:
        outputs: arrays by name.
        rows: `JsonRequest.rows`.

    Returns:
        bytes, JSON in ASCII; with the tokens NaN and Infinity, as TensorFlow
        Serving writes them and Python reads them.

    Raises:
        ServingError: INVALID_ARGUMENT if rows are due and an output has none
            or another number of them.
    """
    if rows:
        for name, array in outputs.items():
            if not array.ndim:
                raise _invalid(f"Tensor name: {name} has no shape information")
        if len({len(array) for array in outputs.values()}) > 1:
            raise _invalid("The outputs have inconsistent batch sizes")
    # Without their names if there is only one.
    values = {name: _values(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        (found,) = values.values()
    elif rows:
        found = [dict(zip(values, row)) for row in zip(*values.values())]
    else:
        found = values
    return json.dumps({"predictions" if rows else "outputs": found}).encode()


def _values(name, array):
    """Nested lists of what `json` writes."""
    if array.dtype in (np.bool_, np.float64) or array.dtype.kind in "iu":
        return array.tolist()
    flat = np.empty(array.size, object)
    if array.dtype == object:
        encoded = name.endswith("_bytes")
        flat[:] = [_text(value, encoded) for value in array.ravel()]
    else:
        flat[:] = _nine_digits(np.float32(array).ravel())
    return flat.reshape(array.shape).tolist()


def _text(value, encoded):
    """A string, or its base64 where TensorFlow Serving would write that."""
    try:
        if not encoded:
            return value.decode()
    except UnicodeDecodeError:
        pass  # no other way to keep it
    return {"b64": base64.b64encode(value).decode()}


def _nine_digits(values):
    """Floats without the noise of float64: 0.200000003, for float32 0.2.

    Nine digits tell all float32 apart.
    """
    text = ("%.9g " * len(values)) % tuple(values.tolist())
    return list(map(float, text.split()))


def _invalid(message):
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)
