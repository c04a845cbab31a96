"""Convert bodies of TensorFlow Serving's REST API to arrays and back.

Source: tensorflow_serving/g3doc/api_rest.md and util/json_tensor.cc.
"""

import base64
import json

import numpy as np
import tensorflow as tf

from export.serving.servable import DEFAULT_SIGNATURE
from export.serving.serving_error import invalid

# Maximum number of lists and objects, each of which takes about 90 bytes.
_MAX_LISTS = 2**21


def load(body):
    """Parses a JSON object; raises `ServingError` if it is none."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    if body.count(b"[") + body.count(b"{") > _MAX_LISTS:
        raise invalid(
            f"Expected at most {_MAX_LISTS} lists and objects, received more; "
            "use gRPC."
        )
    try:
        # As TensorFlow Serving: accepts strings that are invalid UTF-8,
        # ignores all after a zero byte, and uses the first of equal keys.
        text = body.decode("utf-8-sig", "surrogateescape").partition("\0")[0]
        document = json.loads(
            text, object_pairs_hook=lambda pairs: dict(reversed(pairs))
        )
    except RecursionError:
        raise invalid("JSON Parse error: nested too deeply") from None
    except ValueError as e:  # invalid JSON or too many digits
        reason = str(e).split(";")[0]  # omits Python's advice
        raise invalid(f"JSON Parse error: {reason}"[:300]) from None
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_short(document)} Is not object")
    return document


def read_request(document, signatures):
    """Converts the body of a `:predict` request.

    Args:
        document: result of `load`.
        signatures: `SignatureDef`s by name.

    Returns:
        (name of the signature; arrays by name, with strings as `bytes`
        objects; whether the request has `instances`, so that the response has
        `predictions`).

    Raises:
        ServingError: the request does not fit a signature.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid("'signature_name' key must be a string value.")
    name = name or DEFAULT_SIGNATURE
    if name not in signatures:
        raise invalid(f"Serving signature name: {_short(name)} not found")
    infos = signatures[name].inputs
    if not infos:
        raise invalid(f"Failed to get input map for signature: {name}")
    rows = "instances" in document
    if rows == ("inputs" in document):
        raise invalid("Expecting one of 'inputs' or 'instances' keys")
    if rows:
        columns = _columns_of_rows(document["instances"], infos)
    else:
        columns = _columns(document["inputs"], infos)
    arrays = {
        key: _array(columns[key], tf.as_dtype(info.dtype), key)
        for key, info in infos.items()
    }
    return name, arrays, rows


def write_response(outputs, *, rows):
    """Returns the body of a response.

    Args:
        outputs: arrays by name.
        rows: whether to write `predictions`.

    Returns:
        bytes, JSON in ASCII, with the tokens NaN and Infinity as in TensorFlow
        Serving.

    Raises:
        ServingError: `rows` is true, and outputs have no or different numbers
            of rows.
    """
    sizes = {array.shape[:1] for array in outputs.values()}
    if rows and (len(sizes) > 1 or () in sizes):
        raise invalid("The outputs have no, or inconsistent, batch sizes")
    values = {name: _values(name, array) for name, array in outputs.items()}
    # A single output has no name.
    if len(values) == 1:
        (content,) = values.values()
    elif rows:
        content = [dict(zip(values, row)) for row in zip(*values.values())]
    else:
        content = values
    return json.dumps({"predictions" if rows else "outputs": content}).encode()


def _columns_of_rows(instances, infos):
    """Returns a list of values per input, from `instances`."""
    if not isinstance(instances, list) or not instances:
        raise invalid("Expecting 'instances' to be a list with values")
    if not _is_object(instances[0]):
        return _columns(instances, infos)
    for number, one in enumerate(instances):
        if not _is_object(one) or one.keys() != set(infos):
            raise invalid(
                f"Failed to process element: {number} of 'instances' list. "
                f"Keys must be equal to: {','.join(sorted(infos))}"
            )
    return {name: [one[name] for one in instances] for name in infos}


def _columns(inputs, infos):
    """Returns the value of each input, from `inputs`."""
    if not _is_object(inputs) and len(infos) == 1:
        return {next(iter(infos)): inputs}
    for name in infos:
        if not _is_object(inputs) or name not in inputs:
            raise invalid(f"Missing named input: {name}")
    return inputs


def _is_base64(value):
    one = isinstance(value, dict) and value.keys() == {"b64"}
    return one and isinstance(value["b64"], str)


def _is_object(value):
    return isinstance(value, dict) and not _is_base64(value)


def _array(value, dtype, name):
    """Converts nested lists to an array."""
    if dtype == tf.string:
        kinds = (str, dict)
    elif dtype.is_floating:
        kinds = (int, float)
    else:
        kinds = (int,) if dtype.is_integer else (bool,)
    try:
        array = np.array(value, object)
        leaves = array.ravel().tolist()
        for wrong in set(map(type, leaves)) - set(kinds):
            leaf = next(leaf for leaf in leaves if type(leaf) is wrong)
            text = f"{_short(leaf)} is not of expected type: {dtype.name}"
            raise ValueError(text)
        if dtype == tf.string:
            flat = list(map(_bytes, leaves))
            return np.array(flat, object).reshape(array.shape)
        if dtype.is_integer and array.size:
            if not dtype.min <= array.min() <= array.max() <= dtype.max:
                raise ValueError(f"a value is out of range for {dtype.name}")
        with np.errstate(over="ignore"):  # becomes infinite
            return array.astype(dtype.as_numpy_dtype)
    except (ValueError, OverflowError) as e:
        # In ragged lists some leaves are lists, or NumPy fails.
        raise invalid(f"Input {name}: {e}"[:300]) from None


def _bytes(leaf):
    if isinstance(leaf, str):
        return leaf.encode("utf-8", "surrogateescape")
    if not _is_base64(leaf):
        raise ValueError("an object is not formatted correctly for base64 data")
    text = "".join(leaf["b64"].split())
    bare = text.rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    if text not in (bare, padded):
        raise ValueError("base64 data has invalid padding")
    return base64.b64decode(padded, validate=True)


def _values(name, array):
    """Converts an array to nested lists for `json`."""
    if array.dtype in (np.bool_, np.float64) or array.dtype.kind in "iu":
        return array.tolist()
    flat = np.empty(array.size, object)
    if array.dtype == object:
        flat[:] = [_text(name, value) for value in array.ravel()]
    else:
        # Nine digits identify a float32.
        numbers = np.float32(array).ravel().tolist()
        text = ("%.9g " * array.size) % tuple(numbers)
        flat[:] = list(map(float, text.split()))
    return flat.reshape(array.shape).tolist()


def _text(name, value):
    """Returns a string, or base64 where TensorFlow Serving uses it."""
    try:
        if not name.endswith("_bytes"):
            return value.decode()
    except UnicodeDecodeError:
        pass  # only base64 can represent it
    return {"b64": base64.b64encode(value).decode()}


def _short(value):
    """Returns a short description of a JSON value for a message."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value[:100] if isinstance(value, str) else value)[:100]
