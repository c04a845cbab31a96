"""The models of a server: which versions are there, which answers."""

import contextlib
import dataclasses
import gc
import os
import threading
import time

import grpc
import tensorflow as tf
from absl import logging
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)

from clsa_tf.errors import UserError
from export.serving.errors import ServingError, as_serving_error, invalid
from export.serving.settings import wanted_versions

STATE = get_model_status_pb2.ModelVersionStatus
_TICK_SECONDS = 0.1  # between looks at what is due
_REMEMBERED = 20  # versions that are over


@dataclasses.dataclass(eq=False)
class Version:
    """A version, from when it was found."""

    number: int
    path: str
    state: int = STATE.START  # a `ModelVersionStatus.State`
    servable: object = None  # what `open_version` returned, while loaded
    error: ServingError = None  # of the latest attempt to load it
    attempts: int = 0
    due: float = 0.0  # when to try next, by `time.monotonic`
    users: int = 0  # requests that run it
    wanted: bool = True


class Models:
    """Follows the base paths of models, in a thread; may be used from any.

    A version is unloaded when another that is wanted is available, or none is
    wanted, and no request runs it any more.

    Args:
        configs: list of `ModelConfig`, see `settings.model_configs`.
        open_version: function of a SavedModel's path; returns an object with
            `close`, raises `ServingError`.
        on_event: function `(what, name, version, value)`: "loaded" and
            seconds, "failed" and `ServingError`, "unloaded" and None,
            "warning" and text.
        poll_seconds: between looks at the base paths; 0: look once, at the
            start and at `reconfigure`.
        retries: attempts to load a version after the first that failed.
        retry_seconds: between them.
        allow_unavailable_labels: whether new labels may name versions that are
            not available.

    Raises:
        UserError: labels without `allow_unavailable_labels`: nothing is
            available at the start.

    Source: tensorflow_serving/core/aspired_versions_manager.cc,
    availability_preserving_policy.cc, model_servers/server_core.cc
    """

    def __init__(
        self,
        configs,
        open_version,
        on_event,
        *,
        poll_seconds=1.0,
        retries=5,
        retry_seconds=60.0,
        allow_unavailable_labels=False,
    ):
        """See the class."""
        self._open = open_version
        self._on_event = on_event
        self._poll_seconds = poll_seconds
        self._retries = retries
        self._retry_seconds = retry_seconds
        self._allow_unavailable_labels = allow_unavailable_labels
        self._changed = threading.Condition()
        self._configs = {}  # by name
        self._versions = {}  # by name: list of `Version`
        self._asked, self._done = 1, 0  # rounds of the thread
        self._warned = {}  # by name: the latest warning
        self._ended = False
        self._take_over(configs)
        threading.Thread(target=self._follow, daemon=True).start()

    def reconfigure(self, configs):
        """Takes over a new list of models; all of it or nothing.

        Models that are gone finish the requests they have; new ones have been
        tried once when it returns. Raises `UserError` for a label that may not
        move to its version now.
        """
        self._take_over(configs)
        self.wait()

    def wait(self):
        """Waits until the base paths were looked at, and all tried once."""
        with self._changed:
            self._asked += 1
            asked = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= asked or self._ended)

    def end(self):
        """Follows nothing any more; what is loaded stays."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def pinned(self, spec):
        """Keeps the `Version` that a `ModelSpec` asks for in memory (`with`).

        Raises `ServingError`: NOT_FOUND, it is not there or not available;
        INVALID_ARGUMENT, no name or no such label.
        """
        with self._changed:
            number = self._number(spec)
            found = [
                version
                for version in self._versions.get(spec.name, ())
                if version.state == STATE.AVAILABLE
                and number in (None, version.number)
            ]
            if not found:
                wanted = f"Latest({spec.name})"
                if number is not None:
                    wanted = f"Specific({spec.name}, {number})"
                raise _not_found(f"Servable not found for request: {wanted}")
            version = max(found, key=lambda version: version.number)
            version.users += 1
        try:
            yield version
        finally:
            with self._changed:
                version.users -= 1

    def signatures(self, spec):
        """The full `ModelSpec` for one, and that version's `SignatureDefMap`.

        Raises `ServingError` as `pinned`.
        """
        found = get_model_metadata_pb2.SignatureDefMap()
        with self.pinned(spec) as version:
            for name, signature in version.servable.signatures.items():
                found.signature_def[name].CopyFrom(signature)
            spec = model_pb2.ModelSpec(name=spec.name)
            spec.version.value = version.number
        return spec, found

    def statuses(self, spec):
        """The `GetModelStatusResponse` for a `ModelSpec`, newest first.

        A label does not count. Raises `ServingError`: NOT_FOUND.

        Source: tensorflow_serving/model_servers/get_model_status_impl.cc
        """
        response = get_model_status_pb2.GetModelStatusResponse()
        only = spec.version.value if spec.HasField("version") else None
        with self._changed:
            versions = self._versions.get(spec.name, ())
            for version in sorted(versions, key=lambda v: -v.number):
                if only in (None, version.number):
                    status = response.model_version_status.add(
                        version=version.number, state=version.state
                    ).status
                    status.SetInParent()  # OK is said, too
                    if version.error:
                        status.error_code = version.error.code.value[0]
                        status.error_message = version.error.message
        if not response.model_version_status:
            wanted = "any versions" if only is None else f"version {only}"
            raise _not_found(f"Could not find {wanted} of model {spec.name}")
        return response

    @property
    def configs(self):
        """`ModelConfig`s that are followed."""
        return list(self._configs.values())

    def unavailable(self):
        """Names of models that cannot answer -> whether they may yet."""
        found = {}
        for name in list(self._configs):
            versions = [v for v in self._versions.get(name, ()) if v.wanted]
            states = {version.state for version in versions}
            if STATE.AVAILABLE not in states:
                may = states != {STATE.END} if versions else self._poll_seconds
                found[name] = bool(may)
        return found

    def list_versions(self):
        """Pairs of a model's name and its `Version`s, as they are now."""
        with self._changed:
            return [(name, list(v)) for name, v in self._versions.items()]

    def _number(self, spec):
        """The version that is asked for; None: the newest."""
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        if spec.HasField("version"):
            return spec.version.value
        if not spec.HasField("version_label"):
            return None
        config, label = self._configs.get(spec.name), spec.version_label
        if not config or label not in config.version_labels:
            raise invalid(f"Unrecognized servable version label: {label}")
        return config.version_labels[label]

    def _take_over(self, configs):
        with self._changed:
            for config in configs:
                self._check_labels(config)
            self._configs = {config.name: config for config in configs}

    def _check_labels(self, config):
        """Raises `UserError` if a label may not name its version now.

        Source: server_core.cc, UpdateModelVersionLabelMap.
        """
        before = self._configs.get(config.name, config).version_labels
        available = {
            version.number
            for version in self._versions.get(config.name, ())
            if version.state == STATE.AVAILABLE
        }
        for label, number in config.version_labels.items():
            moved = before.get(label, number) != number
            allowed = self._allow_unavailable_labels and not moved
            if number not in available and not allowed:
                raise UserError(
                    f"Expected the label {label!r} of model {config.name!r} on "
                    f"a version that is available, received {number}; load it "
                    "first (a label that is not in use may name any with "
                    "--allow_version_labels_for_unavailable_models)."
                )

    def _follow(self):
        """The thread."""
        polled = time.monotonic()
        while not self._ended:
            with self._changed:
                asked, configs = self._asked, dict(self._configs)
            now = time.monotonic()
            due = self._poll_seconds and now >= polled + self._poll_seconds
            try:
                if due or asked > self._done:
                    polled = now
                    for name in configs.keys() | self._versions.keys():
                        self._find(name, configs.get(name))
                for name, versions in self._versions.items():
                    self._load(name, versions)
                    self._unload(name, versions)
            except Exception:  # the thread has to live on
                logging.exception("While following the models:")
            with self._changed:
                self._done = asked
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._asked > self._done or self._ended,
                    _TICK_SECONDS,
                )

    def _find(self, name, config):
        """Looks which versions of a model are there and wanted."""
        paths, numbers, warning = {}, [], ""
        try:
            if config:
                paths = _version_paths(config.base_path)
                numbers = wanted_versions(config, paths)
                warning = "" if numbers else "has no such version"
        except Exception as e:  # of any file system
            numbers = None
            warning = f"cannot be read: {as_serving_error(e).message}"
        if warning and self._warned.get(name) != warning:
            text = f"{config.base_path} {warning}"
            self._on_event("warning", name, None, text)
        self._warned[name] = warning
        if numbers is None:
            return  # what is loaded stays
        with self._changed:
            versions = self._versions.setdefault(name, [])
            for version in versions:
                before, version.wanted = (
                    version.wanted,
                    version.number in numbers,
                )
                if version.wanted and version.servable:
                    version.state = STATE.AVAILABLE
                elif version.wanted:
                    path = paths[version.number]
                    if not before or path != version.path:  # it came back
                        version.state, version.path = STATE.START, path
                        version.attempts, version.due = 0, 0.0
            known = {version.number for version in versions}
            versions += [
                Version(number, paths[number])
                for number in numbers
                if number not in known
            ]
            over = [v for v in versions if v.state == STATE.END]
            for version in [v for v in over if not v.wanted][:-_REMEMBERED]:
                versions.remove(version)

    def _load(self, name, versions):
        """Tries what is due, newest first."""
        for version in sorted(versions, key=lambda v: -v.number):
            waits = version.state in (STATE.START, STATE.LOADING)
            if self._ended or not waits or version.due > time.monotonic():
                continue
            if not version.wanted:
                version.state = STATE.END
                continue
            version.state = STATE.LOADING
            version.attempts += 1
            start = time.monotonic()
            try:
                servable = self._open(version.path)
            except Exception as e:  # whatever it is, this thread goes on
                self._failed(name, version, as_serving_error(e))
                continue
            with self._changed:
                version.servable, version.error = servable, None
                version.state = STATE.AVAILABLE
            seconds = time.monotonic() - start
            self._on_event("loaded", name, version.number, seconds)

    def _failed(self, name, version, error):
        attempt = f"(attempt {version.attempts} of {self._retries + 1})"
        # Without its traceback, which keeps a lot in memory.
        error = ServingError(error.code, f"{error.message} {attempt}")
        with self._changed:
            version.error = error
            version.due = time.monotonic() + self._retry_seconds
            if version.attempts > self._retries:
                version.state = STATE.END
        self._on_event("failed", name, version.number, error)

    def _unload(self, name, versions):
        """Frees what is not wanted, if nothing is or something else answers."""
        with self._changed:
            wanted = [v for v in versions if v.wanted]
            if wanted and not any(v.state == STATE.AVAILABLE for v in wanted):
                return
            over = [v for v in versions if v.servable and not v.wanted]
            for version in over:
                version.state = STATE.UNLOADING
            free = [version for version in over if not version.users]
        for version in free:
            version.servable.close()
            version.servable, version.state = None, STATE.END
            gc.collect()
            self._on_event("unloaded", name, version.number, None)


def _version_paths(base_path):
    """Paths of the versions in a directory, by number.

    Source: tensorflow_serving/sources/storage_path/
    file_system_storage_path_source.cc
    """
    # TensorFlow's own stops at a name that is no text.
    listed = tf.io.gfile.listdir if "://" in base_path else os.listdir
    found = {}
    for entry in sorted(listed(base_path)):
        name = entry.rstrip("/")
        # (Not `int` of any length, which takes its time.)
        number = name.lstrip("0")[:20] or "0"
        if not (name.isascii() and name.isdigit() and int(number) < 2**63):
            continue
        path = tf.io.gfile.join(base_path, name)
        if tf.io.gfile.isdir(path):
            found[int(number)] = path
    return found


def _not_found(message):
    return ServingError(grpc.StatusCode.NOT_FOUND, message)
