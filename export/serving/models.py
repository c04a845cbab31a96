"""The models of a server: find, load, select and unload versions."""

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
from export.serving.config_files import wanted_versions
from export.serving.serving_error import ServingError, as_serving_error, invalid

STATE = get_model_status_pb2.ModelVersionStatus
_TICK_SECONDS = 0.1  # interval of the thread
_MAX_ENDED = 20  # ended versions to remember


@dataclasses.dataclass(eq=False)
class Version:
    """A version of a model that was found."""

    number: int
    path: str
    state: int = STATE.START  # a `ModelVersionStatus.State`
    servable: object = None  # result of `open_version`, while loaded
    error: ServingError = None  # of the latest attempt to load it
    attempts: int = 0
    due: float = 0.0  # time of the next attempt, by `time.monotonic`
    users: int = 0  # running requests
    wanted: bool = True  # by the model's version policy


class Models:
    """Models whose versions a thread finds, loads and unloads. Thread-safe.

    The thread polls the base paths of the models. It unloads a version that is
    not wanted any more after the last request, once another wanted version is
    available or no version is wanted.

    Args:
        configs: list of `ModelConfig`, see `config_files.model_configs`.
        open_version: function from a SavedModel's path to an object with
            `close`; raises `ServingError`.
        on_event: function of `(kind, name, version, value)`, where kind and
            value are "loaded" and seconds, "failed" and a `ServingError`,
            "unloaded" and None, or "warning" and a text.
        poll_seconds: seconds between polls of the base paths; 0: look only at
            the start and after `reconfigure`.
        retries: further attempts to load a version after a failure.
        retry_seconds: seconds between attempts.
        allow_unavailable_labels: whether new labels may name versions that are
            not available.

    Raises:
        UserError: there are labels without `allow_unavailable_labels`, as no
            version is available at the start.

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
        self._requested, self._done = 1, 0  # rounds of the thread
        self._warnings = {}  # by name: the latest warning
        self._ended = False
        self._set_configs(configs)
        threading.Thread(target=self._run, daemon=True).start()

    def reconfigure(self, configs):
        """Replaces the list of models, completely or not at all.

        Removed models finish their requests. When it returns, there has been
        one attempt to load each new version.

        Raises:
            UserError: a label may not move to its version now.
        """
        self._set_configs(configs)
        self.wait()

    def wait(self):
        """Waits for a poll and one attempt to load each new version."""
        with self._changed:
            self._requested += 1
            requested = self._requested
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._done >= requested or self._ended
            )

    def end(self):
        """Stops polling; loaded versions stay in memory."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def pinned(self, spec):
        """Keeps the `Version` for a `ModelSpec` in memory, in a `with` block.

        Raises:
            ServingError: NOT_FOUND, the version is missing or not available;
                INVALID_ARGUMENT, the name is empty or the label unknown.
        """
        with self._changed:
            number = self._number(spec)
            available = [
                version
                for version in self._versions.get(spec.name, ())
                if version.state == STATE.AVAILABLE
                and number in (None, version.number)
            ]
            if not available:
                wanted = f"Latest({spec.name})"
                if number is not None:
                    wanted = f"Specific({spec.name}, {number})"
                raise _not_found(f"Servable not found for request: {wanted}")
            version = max(available, key=lambda version: version.number)
            version.users += 1
        try:
            yield version
        finally:
            with self._changed:
                version.users -= 1

    def signatures(self, spec):
        """Returns the signatures of the version for a `ModelSpec`.

        Returns:
            (`ModelSpec` with name and version, `SignatureDefMap`).

        Raises:
            ServingError: see `pinned`.
        """
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with self.pinned(spec) as version:
            for name, signature in version.servable.signatures.items():
                signatures.signature_def[name].CopyFrom(signature)
            spec = model_pb2.ModelSpec(name=spec.name)
            spec.version.value = version.number
        return spec, signatures

    def statuses(self, spec):
        """Returns the `GetModelStatusResponse` for a `ModelSpec`, newest first.

        Labels are ignored.

        Raises:
            ServingError: NOT_FOUND.

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
                    status.SetInParent()  # includes OK in the response
                    if version.error:
                        status.error_code = version.error.code.value[0]
                        status.error_message = version.error.message
        if not response.model_version_status:
            wanted = "any versions" if only is None else f"version {only}"
            raise _not_found(f"Could not find {wanted} of model {spec.name}")
        return response

    @property
    def configs(self):
        """The current `ModelConfig`s."""
        return list(self._configs.values())

    def unavailable(self):
        """Returns the models without an available version.

        Returns:
            dictionary from names to whether a version may still become
            available.
        """
        models = {}
        for name in list(self._configs):
            versions = [v for v in self._versions.get(name, ()) if v.wanted]
            states = {version.state for version in versions}
            if STATE.AVAILABLE not in states:
                may = states != {STATE.END} if versions else self._poll_seconds
                models[name] = bool(may)
        return models

    def list_versions(self):
        """Returns pairs of a model's name and a list of its `Version`s."""
        with self._changed:
            return [(name, list(v)) for name, v in self._versions.items()]

    def _number(self, spec):
        """Returns the version number for a `ModelSpec`; None: the newest."""
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

    def _set_configs(self, configs):
        with self._changed:
            for config in configs:
                self._check_labels(config)
            self._configs = {config.name: config for config in configs}

    def _check_labels(self, config):
        """Raises `UserError` if a label may not move to its version now.

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
                    f"Expected an available version for the label {label!r} of "
                    f"model {config.name!r}, received {number}; load it first. "
                    "(--allow_version_labels_for_unavailable_models allows any "
                    "version for new labels.)"
                )

    def _run(self):
        """Finds, loads and unloads versions until `end`, in the thread."""
        polled = time.monotonic()
        while not self._ended:
            with self._changed:
                requested, configs = self._requested, dict(self._configs)
            now = time.monotonic()
            due = self._poll_seconds and now >= polled + self._poll_seconds
            try:
                if due or requested > self._done:
                    polled = now
                    for name in configs.keys() | self._versions.keys():
                        self._find(name, configs.get(name))
                for name, versions in self._versions.items():
                    self._load(name, versions)
                    self._unload(name, versions)
            except Exception:  # the thread must not end
                logging.exception("Polling the models failed:")
            with self._changed:
                self._done = requested
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._requested > self._done or self._ended,
                    _TICK_SECONDS,
                )

    def _find(self, name, config):
        """Updates the list of a model's versions from its base path."""
        paths, numbers, warning = {}, [], ""
        try:
            if config:
                paths = _version_paths(config.base_path)
                numbers = wanted_versions(config, paths)
                warning = "" if numbers else "has no version to serve"
        except Exception as e:  # any class: depends on the file system
            numbers = None
            warning = f"cannot be read: {as_serving_error(e).message}"
        if warning and self._warnings.get(name) != warning:
            text = f"{config.base_path} {warning}"
            self._on_event("warning", name, None, text)
        self._warnings[name] = warning
        if numbers is None:
            return  # loaded versions stay
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
                    if not before or path != version.path:  # wanted again
                        version.state, version.path = STATE.START, path
                        version.attempts, version.due = 0, 0.0
            known = {version.number for version in versions}
            versions += [
                Version(number, paths[number])
                for number in numbers
                if number not in known
            ]
            ended = [v for v in versions if v.state == STATE.END]
            for version in [v for v in ended if not v.wanted][:-_MAX_ENDED]:
                versions.remove(version)

    def _load(self, name, versions):
        """Loads the versions that are due, newest first."""
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
            except Exception as e:  # the thread must not end
                self._failed(name, version, as_serving_error(e))
                continue
            with self._changed:
                version.servable, version.error = servable, None
                version.state = STATE.AVAILABLE
            seconds = time.monotonic() - start
            self._on_event("loaded", name, version.number, seconds)

    def _failed(self, name, version, error):
        attempt = f"(attempt {version.attempts} of {self._retries + 1})"
        # A new error, without the traceback, which would keep memory alive.
        error = ServingError(error.code, f"{error.message} {attempt}")
        with self._changed:
            version.error = error
            version.due = time.monotonic() + self._retry_seconds
            if version.attempts > self._retries:
                version.state = STATE.END
        self._on_event("failed", name, version.number, error)

    def _unload(self, name, versions):
        """Unloads unwanted versions unless a wanted one is still loading."""
        with self._changed:
            wanted = [v for v in versions if v.wanted]
            if wanted and not any(v.state == STATE.AVAILABLE for v in wanted):
                return
            unwanted = [v for v in versions if v.servable and not v.wanted]
            for version in unwanted:
                version.state = STATE.UNLOADING
            unused = [version for version in unwanted if not version.users]
        for version in unused:
            version.servable.close()
            version.servable, version.state = None, STATE.END
            gc.collect()
            self._on_event("unloaded", name, version.number, None)


def _version_paths(base_path):
    """Returns the paths of the versions in a directory, by number.

    Source: tensorflow_serving/sources/storage_path/
    file_system_storage_path_source.cc
    """
    # For local paths not TensorFlow's, which fails for invalid UTF-8.
    list_directory = tf.io.gfile.listdir if "://" in base_path else os.listdir
    paths = {}
    for entry in sorted(list_directory(base_path)):
        name = entry.rstrip("/")
        # At most 20 digits: `int` is slow for long texts.
        number = name.lstrip("0")[:20] or "0"
        if not (name.isascii() and name.isdigit() and int(number) < 2**63):
            continue
        path = tf.io.gfile.join(base_path, name)
        if tf.io.gfile.isdir(path):
            paths[int(number)] = path
    return paths


def _not_found(message):
    return ServingError(grpc.StatusCode.NOT_FOUND, message)
