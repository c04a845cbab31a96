"""Bodies of requests to TensorFlow Serving's REST API, to arrays.

Source: tensorflow_serving/g3doc/api_rest.md and util/json_tensor.cc. Stricter
than those: keys that occur twice, input names that the signature does not
have, base64 without its padding, integers that their type cannot hold and
whatever follows the object are refused.
"""

import base64
import itertools
import json
import typing

import grpc
import numpy as np
import tensorflow as tf

from export.serving.errors import ServingError

# From here on in bytes, bodies are converted beside the event loop.
LARGE_BYTES = 2**18

_DEFAULT_SIGNATURE = tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
# Each takes some 90 bytes, and nothing else runs while they are made or freed.
_MAX_LISTS = 2**21
_MAX_RANK = 32  # NumPy's
# Values converted at a time; other threads get their turn in between.
_PART = 2**16


class JsonRequest(typing.NamedTuple):
    """What a body asks for.

    Attributes:
        signature: name of the signature.
        inputs: arrays by name; those of strings hold `bytes` as objects.
        rows: whether `instances` were sent, so that `predictions` are due.
    """

    signature: str
    inputs: typing.Dict[str, np.ndarray]
    rows: bool


def read_request(body, signatures):
    """Reads the body of a `:predict` request.

    Args:
        body: bytes, JSON in UTF-8.
        signatures: `SignatureDef` by name.

    Returns:
        `JsonRequest`.

    Raises:
        ServingError: INVALID_ARGUMENT if the body is anything else than a
            request for one of the signatures, UNIMPLEMENTED if an input's
            type has no form in JSON.
    """
    document = _load(body)
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _invalid("'signature_name' key must be a string value.")
    name = name or _DEFAULT_SIGNATURE
    if name not in signatures:
        raise _invalid(
            f"Serving signature name: {_short(name)} not found in signature def"
        )
    infos = signatures[name].inputs
    if not infos:
        raise _invalid(f"Failed to get input map for signature: {name}")
    if "instances" in document and "inputs" in document:
        raise _invalid(
            "Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist"
        )
    if "instances" in document:
        columns, rows = _columns_of_rows(document["instances"], infos), True
    elif "inputs" in document:
        columns, rows = _columns(document["inputs"], infos), False
    else:
        raise _invalid("Missing 'inputs' or 'instances' key")
    arrays = {
        key: _array(column, infos[key].dtype, key)
        for key, column in columns.items()
    }
    return JsonRequest(name, arrays, rows)


def _invalid(message):
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def _short(value):
    """A JSON value for a message."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value[:100] if isinstance(value, str) else value)[:100]


def _load(body):
    if body.count(b"[") > _MAX_LISTS:
        raise _invalid(
            f"More than {_MAX_LISTS} lists; send tensors of that size by gRPC"
        )
    # json's parser lets other threads run only when it calls Python.
    numbers = {"parse_float": _to_float, "parse_int": _to_int}
    large = numbers if len(body) > LARGE_BYTES else {}
    try:
        document = json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_unique, **large
        )
    except RecursionError:
        raise _invalid("JSON Parse error: nested too deeply") from None
    except ValueError as e:  # not UTF-8, not JSON, an endless integer
        reason = str(e).split(";")[0]  # not Python's advice
        raise _invalid(f"JSON Parse error: {reason}"[:300]) from None
    if not isinstance(document, dict):
        raise _invalid(f"JSON Value: {_short(document)} Is not object")
    return document


def _to_float(text):
    return float(text)


def _to_int(text):
    return int(text)


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _is_base64(value):
    return (
        isinstance(value, dict)
        and value.keys() == {"b64"}
        and isinstance(value["b64"], str)
    )


def _is_object(value):
    return isinstance(value, dict) and not _is_base64(value)


def _columns_of_rows(instances, infos):
    if not isinstance(instances, list):
        raise _invalid("Expecting 'instances' to be an list/array")
    if not instances:
        raise _invalid("No values in 'instances' array")
    if not _is_object(instances[0]):
        if len(infos) > 1:
            raise _invalid(
                "instances is a plain list, but expecting list of objects as "
                "multiple input tensors required as per tensorinfo_map"
            )
        return {next(iter(infos)): instances}
    for number, instance in enumerate(instances):
        if not _is_object(instance) or instance.keys() != set(infos):
            raise _invalid(
                f"Failed to process element: {number} of 'instances' list. "
                "Expecting an object whose keys are equal to: "
                + ",".join(sorted(infos))
            )
    return {name: [one[name] for one in instances] for name in infos}


def _columns(inputs, infos):
    if not _is_object(inputs):
        if len(infos) > 1:
            raise _invalid(
                "inputs is a plain value/list, but expecting an object as "
                "multiple input tensors required as per tensorinfo_map"
            )
        return {next(iter(infos)): inputs}
    for name in infos:
        if name not in inputs:
            raise _invalid(f"Missing named input: {name} in 'inputs' object.")
    for name in inputs:
        if name not in infos:
            raise _invalid(
                f"JSON object: does not have named input: {_short(name)}"
            )
    return inputs


def _array(value, dtype, name):
    """Makes an array of nested lists.

    Level by level, which is fast and never recurses.
    """
    shape, leaves = [], [value]
    while leaves and isinstance(leaves[0], list):
        lists = set(map(type, leaves)) == {list}
        if not lists or len(set(map(len, leaves))) > 1:
            raise _invalid(
                f"Input {name}: lists at level {len(shape)} have unequal sizes"
            )
        if len(shape) == _MAX_RANK:
            raise _invalid(f"Input {name}: more than {_MAX_RANK} dimensions")
        shape.append(len(leaves[0]))
        leaves = list(itertools.chain.from_iterable(leaves))
    try:
        dtype = tf.as_dtype(dtype)
        if dtype == tf.string:
            result = np.empty(len(leaves), object)
            result[:] = [_bytes(leaf, name) for leaf in leaves]
        else:
            result = _numbers(leaves, dtype, name)
    except OverflowError as e:
        raise _invalid(f"Input {name}: {e}") from None
    return result.reshape(shape)


def _bytes(leaf, name):
    try:
        if isinstance(leaf, str):
            return leaf.encode()
        if _is_base64(leaf):
            return base64.b64decode(leaf["b64"], validate=True)
    except UnicodeEncodeError:
        raise _invalid(
            f"Input {name}: the surrogate pair in string is invalid"
        ) from None
    except ValueError as e:
        raise _invalid(f"Input {name}: unable to base64 decode: {e}") from None
    raise _type_error(leaf, tf.string, name)


def _numbers(leaves, dtype, name):
    """Makes an array `[N]` of a list; booleans are no numbers."""
    if dtype.is_floating:
        allowed = {int, float}
    elif dtype.is_integer:
        allowed = {int}
    elif dtype.is_bool:
        allowed = {bool}
    else:
        raise ServingError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"Conversion of JSON values to type: {dtype.name} of input {name}",
        )
    result = np.empty(len(leaves), dtype.as_numpy_dtype)
    for start in range(0, len(leaves), _PART):
        part = leaves[start : start + _PART]
        if not allowed.issuperset(map(type, part)):
            wrong = next(leaf for leaf in part if type(leaf) not in allowed)
            raise _type_error(wrong, dtype, name)
        if dtype.is_integer and not (
            dtype.min <= min(part) and max(part) <= dtype.max
        ):
            raise _invalid(f"Input {name}: a value is no {dtype.name}")
        with np.errstate(over="ignore"):  # becomes infinite
            result[start : start + len(part)] = part
    return result


def _type_error(leaf, dtype, name):
    return _invalid(
        f"JSON Value: {_short(leaf)} of input {name} is not of expected type: "
        f"{dtype.name}"
    )
