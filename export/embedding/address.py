"""Which server, and which of its models."""

import re
from typing import NamedTuple, Optional

from clsa_tf.errors import UserError

_ADDRESS = re.compile(r"(?:(grpc|https?)://)?([^/\s]*[^/\s:])(/\S*)?")
_MODEL_PATH = re.compile(
    r"(.*)/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?"
)


class Model(NamedTuple):
    """Which model of a server is meant.

    Attributes:
        name: its name there.
        version: number; None: the newest, or that of the label.
        label: of a version, such as `"stable"`; or None.
    """

    name: str
    version: Optional[int] = None
    label: Optional[str] = None


def parse(server):
    """Takes an address apart.

    Args:
        server: `host:port`, `grpc://host:port[/MODEL]` or
            `http[s]://host:port[/v1/models/MODEL[/versions/N|/labels/L]]`.

    Returns:
        (place, `Model` or None); the place is `host:port` for gRPC and a URL,
        up to `/v1`, for REST.

    Raises:
        UserError: it has none of these forms.
    """
    match = _ADDRESS.fullmatch(server)
    scheme, host, path = match.groups() if match else (None, None, None)
    path = (path or "").rstrip("/")
    if scheme in (None, "grpc"):
        if host and "/" not in path[1:]:
            return host, Model(path[1:]) if path else None
        raise _error(server)
    found = _MODEL_PATH.fullmatch(path)
    if found:
        prefix, name, version, label = found.groups()
        model = Model(name, int(version) if version else None, label)
        return f"{scheme}://{host}{prefix}", model
    if "/v1/" in f"{path}/":
        raise _error(server)
    return f"{scheme}://{host}{path}", None


def of_model(server):
    """Writes the address of a model in full.

    Args:
        server: as `parse` takes it, or `http[s]://host:port/MODEL`.

    Returns:
        the same, but `http[s]://host:port/v1/models/MODEL` for the latter.
    """
    match = _ADDRESS.fullmatch(server)
    scheme, host, path = match.groups() if match else (None, None, None)
    prefix, _, model = (path or "").rstrip("/").rpartition("/")
    if scheme in (None, "grpc") or not model or "/v1/" in f"{path}/":
        return server
    return f"{scheme}://{host}{prefix}/v1/models/{model}"


def _error(server):
    return UserError(
        "Expected a server as host:port, grpc://host:port[/MODEL] or "
        f"http://host:port[/v1/models/MODEL], received {server!r}; write it "
        "in one of these forms."
    )
