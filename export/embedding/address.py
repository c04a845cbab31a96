"""Addresses of servers and of models on them."""

import re
from typing import NamedTuple, Optional

from clsa_tf.errors import UserError

_ADDRESS = re.compile(r"(?:(grpcs?|https?)://)?([^/\s]*[^/\s:])(/\S*)?")
_MODEL_PATH = re.compile(
    r"(.*)/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?"
)


# Begins the place of a server that is reached by gRPC over TLS.
TLS = "grpcs://"


class ModelReference(NamedTuple):
    """A model on a server.

    Attributes:
        name: the model's name on the server.
        version: number of the version; None: the newest one, or the one with
            the label.
        label: label of a version, such as `"stable"`; or None.
    """

    name: str
    version: Optional[int] = None
    label: Optional[str] = None


def parse(server):
    """Splits an address into server and model.

    Args:
        server: `host:port`, `grpc[s]://host:port[/MODEL]` or
            `http[s]://host:port[/v1/models/MODEL[/versions/N|/labels/L]]`. An
            s stands for TLS.

    Returns:
        (place, `ModelReference` or None). The place is `host:port` for gRPC,
        `grpcs://host:port` for gRPC over TLS, and the URL without `/v1` and
        all after it for REST.

    Raises:
        UserError: the address has none of these forms.
    """
    match = _ADDRESS.fullmatch(server)
    scheme, host, path = match.groups() if match else (None, None, None)
    path = (path or "").rstrip("/")
    if scheme in (None, "grpc", "grpcs"):
        if host and "/" not in path[1:]:
            place = f"{TLS}{host}" if scheme == "grpcs" else host
            return place, ModelReference(path[1:]) if path else None
        raise _error(server)
    model_path = _MODEL_PATH.fullmatch(path)
    if model_path:
        prefix, name, version, label = model_path.groups()
        model = ModelReference(name, int(version) if version else None, label)
        return f"{scheme}://{host}{prefix}", model
    if "/v1/" in f"{path}/":
        raise _error(server)
    return f"{scheme}://{host}{path}", None


def of_model(server):
    """Expands the short address of a model.

    Args:
        server: an address for `parse`, or `http[s]://host:port/MODEL`.

    Returns:
        `http[s]://host:port/v1/models/MODEL` for the latter, otherwise
        `server` unchanged.
    """
    match = _ADDRESS.fullmatch(server)
    scheme, host, path = match.groups() if match else (None, None, None)
    prefix, _, model = (path or "").rstrip("/").rpartition("/")
    if scheme in (None, "grpc", "grpcs") or not model or "/v1/" in f"{path}/":
        return server
    return f"{scheme}://{host}{prefix}/v1/models/{model}"


def _error(server):
    return UserError(
        "Expected a server as host:port, grpc://host:port[/MODEL], "
        "http://host:port[/v1/models/MODEL] or, with TLS, grpcs:// or "
        f"https://, received {server!r}; use one of these forms."
    )
