"""Recorded requests to TensorFlow Serving, with its answers.

Each is a dictionary: `kind` (http, grpc), `name`, `request_b64` (for http the
bytes of one connection, one request after the other; for grpc the message of
`method`), and the answer of TensorFlow Serving 2.15.1, built from source:
`answers` (`status` and the beginning of the `body`), or `code`.

In tests/tf_serving_2.15.1.jsonl, noise replaces the photographs.
"""

import base64
import http.client
import json
import os
import pathlib
import re
import socket

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

# CLSA_TF_OBSERVED names another file, with more requests.
FILE = os.environ.get("CLSA_TF_OBSERVED") or pathlib.Path(__file__).with_name(
    "tf_serving_2.15.1.jsonl"
)
_B64 = re.compile(r'\{\s*"b64":\s*"([^"]*)"\s*\}')


def read():
    """Returns the requests, except those that are too large for the file."""
    lines = pathlib.Path(FILE).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [one for one in found if one["request_b64"] is not None]


def expected(one):
    """Returns TensorFlow Serving's answer: a code, or statuses and shapes."""
    if one["kind"] == "grpc":
        return one["code"]
    answers = [answer for answer in one["answers"] if answer["status"]]
    return [(answer["status"], shape(answer["body"])) for answer in answers]


def received(server, one):
    """Returns a `ServerProcess`'s answer, like `expected`, and its content."""
    if one["kind"] == "grpc":
        return _call(server.grpc, one)
    parts = [base64.b64decode(part) for part in one["request_b64"]]
    answers = _send(server.rest[len("http://") :], parts)
    found = [(status, shape(body)) for status, body in answers]
    return found, answers[-1][1] if answers else ""


def shape(body):
    """Returns the kind of a body: its first key, "text" or "none"."""
    name = re.match(r'\{\s*"(\w+)":', body or "")
    if name:
        return name[1]
    return "text" if body else "none"


def inputs(one):
    """Returns the signature and the arrays by name of a valid request."""
    if one["kind"] == "grpc":
        content = base64.b64decode(one["request_b64"])
        message = predict_pb2.PredictRequest.FromString(content)
        arrays = {k: _array(proto) for k, proto in message.inputs.items()}
        return message.model_spec.signature_name, arrays
    _, body = base64.b64decode(one["request_b64"][-1]).split(b"\r\n\r\n", 1)
    text = body.decode("utf-8-sig").partition("\0")[0]
    document = json.loads(text)
    images = [_decoded(found) for found in _B64.findall(text)]
    if images:
        return "serving_default", {"image_bytes": np.array(images, object)}
    pixels = document.get("instances", document.get("inputs"))
    name = document["signature_name"]
    if isinstance(pixels[0], dict):
        pixels = [row["images"] for row in pixels]
    kind = np.uint8 if name == "images_uint8" else np.float32
    return name, {"images": np.array(pixels).astype(kind)}


def outputs(one, content):
    """Returns the arrays by name of an answer."""
    if one["kind"] == "grpc":
        response = predict_pb2.PredictResponse.FromString(content)
        return {k: tf.make_ndarray(x) for k, x in response.outputs.items()}
    found = json.loads(content)
    if "outputs" in found:
        return {k: np.float32(x) for k, x in found["outputs"].items()}
    rows = found["predictions"]
    return {k: np.float32([row[k] for row in rows]) for k in rows[0]}


def _array(proto):
    """Like TensorFlow Serving, repeats missing values and drops excess."""
    count = np.prod([dim.size for dim in proto.tensor_shape.dim])
    del proto.string_val[int(count) :]
    return tf.make_ndarray(proto)


def _decoded(text):
    text = "".join(json.loads(f'"{text}"').split())
    return base64.b64decode(text + "=" * (-len(text) % 4))


def _call(address, one):
    content = base64.b64decode(one["request_b64"])
    with grpc.insecure_channel(address) as channel:
        try:
            return "OK", channel.unary_unary(one["method"])(content, timeout=60)
        except grpc.RpcError as e:
            return e.code().name, e.details()


def _send(address, parts):
    host, port = address.split(":")
    answers = []
    with socket.create_connection((host, int(port)), 60) as connection:
        for part in parts:
            try:
                connection.sendall(part)
                method = part.split(b" ")[0].decode("latin-1")
                answer = http.client.HTTPResponse(connection, method=method)
                answer.begin()
                answers.append((answer.status, answer.read().decode()))
            except (OSError, http.client.HTTPException):
                break  # it closed the connection
    return answers
