"""What an HTTP request is for, and its body.

Source: tensorflow_serving/model_servers/http_rest_api_util.cc. A method that
a path does not have is 405 here, 400 there.
"""

import re
import typing
import urllib.parse

import grpc
from starlette.requests import ClientDisconnect

from export.serving.errors import ServingError

_PATH = re.compile(
    r"/v1/models(?:/(?P<name>[^/:]+))?"
    r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
    r"(?:/(?P<metadata>metadata)|:(?P<verb>classify|regress|predict))?",
    re.IGNORECASE,
)
_MAX_VERSION = 2**63 - 1
CLOSE = {"connection": "close"}


class Refused(ServingError):
    """A request with a status of HTTP that gRPC has no like of.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status, message, headers=None):
        """See the class."""
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, message)
        self.status = status
        self.headers = headers


class Address(typing.NamedTuple):
    """What a path and a method ask for.

    Attributes:
        method: "predict", "classify", "regress", "metadata" or "status".
        name: of the model; "" if there is none.
        choice: which version, for the methods of `Models`.
    """

    method: str
    name: str
    choice: dict


def read_address(method, path):
    """Reads a request line.

    Args:
        method: of HTTP.
        path: as it was sent, so that %2F is part of a name.

    Returns:
        `Address`.

    Raises:
        ServingError: INVALID_ARGUMENT, no such path; or `Refused`.
    """
    match = _PATH.fullmatch(path)
    malformed = f"Malformed request: {method} {path[:200]}"
    if not match:
        raise _invalid(malformed)
    expected = "POST" if match["verb"] else "GET"
    if method != expected:
        raise Refused(
            405, f"{malformed}; send {expected}.", {"allow": expected}
        )
    return Address(
        (match["verb"] or match["metadata"] or "status").lower(),
        urllib.parse.unquote(match["name"] or ""),
        _choice(match),
    )


async def read_body(request, receive, *, max_bytes):
    """Reads the body of a request, as far as it may be.

    Args:
        request: `starlette.requests.Request`.
        receive: from `admission.Admission.request`.
        max_bytes: larger bodies are refused.

    Returns:
        bytes.

    Raises:
        ClientDisconnect: the client is gone.
        ServingError: from `receive`; or `Refused`.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(415, f"Content-Encoding {encoding[:100]!r}")
    announced = int(request.headers.get("content-length", 0))
    too_large = Refused(
        413, f"The request is larger than {max_bytes} bytes.", CLOSE
    )
    if announced > max_bytes and "expect" in request.headers:
        raise too_large
    body, size, more = bytearray(), 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        chunk, more = message["body"], message["more_body"]
        size += len(chunk)
        if max(size, announced) <= max_bytes:
            receive(len(chunk))
            body += chunk
            continue
        # Read on: many clients do not listen before they have sent.
        body.clear()
        if not more or size > 2 * max_bytes:
            raise too_large
    return body


def _invalid(message):
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def _choice(match):
    if match["version"]:
        # (Not `int` of any length, which takes its time.)
        text = match["version"].lstrip("0")[:20] or "0"
        if int(text) > _MAX_VERSION:
            raise _invalid(f"Failed to convert version: {text} to numeric.")
        return {"version": int(text)}
    if match["label"]:
        return {"label": urllib.parse.unquote(match["label"])}
    return {}
