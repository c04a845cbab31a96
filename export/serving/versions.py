"""The versions of one model: found, loaded, replaced, unloaded."""

import dataclasses
import os
import threading
import time
import typing

import tensorflow as tf
from absl import logging
from tensorflow_serving.apis import get_model_status_pb2

from export.serving.errors import ServingError, as_serving_error
from export.serving.servable import Servable
from export.serving.warmup import warm_up

_STATUS = get_model_status_pb2.ModelVersionStatus
# Versions that are over are still told of, but not all for ever.
_REMEMBERED = 20
_LARGEST = 2**63 - 1  # version number


@dataclasses.dataclass(eq=False)
class Version:
    """A version, from when it was found.

    Attributes:
        number: its version number.
        path: of its SavedModel.
        state: a `ModelVersionStatus.State`.
        servable: `Servable`, while it is loaded.
        error: `ServingError` of the latest attempt to load it.
        attempts: how often that was tried.
        due: when it is to be tried next, by `time.monotonic`.
        users: requests that need it.
    """

    number: int
    path: str
    state: int = _STATUS.START
    servable: typing.Optional[Servable] = None
    error: typing.Optional[ServingError] = None
    attempts: int = 0
    due: float = 0.0
    users: int = 0


class Versions:
    """Follows the base path of a model, in a thread of its own.

    A version is unloaded only when another that is wanted is available, and
    no request needs it any more. As long as the path is empty or cannot be
    read, everything stays as it is; TensorFlow Serving does so with
    --servable_versions_always_present. If all that are wanted are broken, and
    none is loaded, the newest older one that is not is served.

    Source: tensorflow_serving/core/availability_preserving_policy.cc,
    aspired_versions_manager.cc

    Args:
        config: `ModelConfig`.
        warmup_rows: numbers of rows to warm up with, besides the requests.
        poll_seconds, retries, retry_seconds, warmup, intra_op, inter_op,
            on_event: see `export.serving.models.Models`.
    """

    def __init__(
        self,
        config,
        *,
        poll_seconds,
        retries,
        retry_seconds,
        warmup,
        warmup_rows,
        intra_op,
        inter_op,
        on_event,
    ):
        """See the class."""
        self.config = config
        self._poll_seconds = poll_seconds
        self._retries = retries
        self._retry_seconds = retry_seconds
        self._warm_up = warmup
        self._warmup_rows = warmup_rows
        self._threads = {"intra_op": intra_op, "inter_op": inter_op}
        self._on_event = on_event
        self._changed = threading.Condition()
        self._versions = []  # in the order in which they were found
        self._wanted = {}  # path -> number
        self._older = {}  # the same, newest first: what to serve if need be
        self._looks = self._asked = 0  # looks at the path: done, asked for
        self._ended = False
        self._said = None  # the latest warning, so as not to repeat it
        self._thread = threading.Thread(
            target=self._manage, name=f"versions-{config.name}", daemon=True
        )
        self._thread.start()

    @property
    def available(self):
        """Numbers of the versions that answer."""
        with self._changed:
            return {v.number for v in self._in(_STATUS.AVAILABLE)}

    def pin(self, number=None):
        """Keeps a version in memory until it is given to `release`.

        Args:
            number: of the one; None: the newest.

        Returns:
            `Version`, None if it is not available.
        """
        with self._changed:
            found = [
                version
                for version in self._in(_STATUS.AVAILABLE)
                if number in (None, version.number)
            ]
            if not found:
                return None
            newest = max(found, key=lambda version: version.number)
            newest.users += 1
            return newest

    def release(self, version):
        """Lets go of a version from `pin`."""
        with self._changed:
            version.users -= 1
            if not version.users and version.state == _STATUS.UNLOADING:
                self._changed.notify_all()

    def statuses(self):
        """`ModelVersionStatus` of each, newest first."""
        with self._changed:
            # The later of two with the same number, from other paths.
            latest = {version.number: version for version in self._versions}
            found = []
            for number in sorted(latest, reverse=True):
                status = _STATUS(version=number, state=latest[number].state)
                error = latest[number].error
                if error:
                    status.status.error_code = error.code.value[0]
                    status.status.error_message = error.message
                found.append(status)
            return found

    def ask(self):
        """Has the path looked at soon; returns what to `wait` for."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            return self._asked

    def wait(self, look):
        """Waits until that was done, and all that was found tried once."""
        with self._changed:
            self._changed.wait_for(lambda: self._looks >= look or self._ended)

    def end(self):
        """Unloads everything; see `join`."""
        with self._changed:
            self._ended = True
            for version in self._versions:
                if version.state == _STATUS.AVAILABLE:
                    self._enter(version, _STATUS.UNLOADING)
            self._changed.notify_all()

    def join(self, seconds=None):
        """Waits for what `end` asked for, some seconds or for ever."""
        self._thread.join(seconds)

    def _manage(self):
        polled = 0.0
        while True:
            with self._changed:
                asked, ended = self._asked, self._ended
                over = ended and not self._in(_STATUS.UNLOADING)
            if over:
                return
            due = polled + self._poll_seconds <= time.monotonic()
            if self._poll_seconds >= 0 and not ended:
                if asked > self._looks or (self._poll_seconds and due):
                    self._find()
                    polled = time.monotonic()
                self._load()
                self._fall_back()
                self._retire()
            self._unload()
            with self._changed:
                self._looks = asked
                self._changed.notify_all()
                self._changed.wait_for(self._is_needed, self._pause(polled))

    def _is_needed(self):
        return (
            self._asked > self._looks
            or any(not v.users for v in self._in(_STATUS.UNLOADING))
            or (self._ended and not self._in(_STATUS.UNLOADING))
        )

    def _pause(self, polled):
        """Seconds until there is something to do by the clock."""
        times = [v.due for v in self._in(_STATUS.LOADING)]
        if self._poll_seconds > 0:
            times.append(polled + self._poll_seconds)
        if not times or self._ended:
            return None
        return max(min(times) - time.monotonic(), 0.0)

    def _in(self, state):
        return [v for v in self._versions if v.state == state]

    def _enter(self, version, state):
        version.state = state
        self._on_event("version_state", self._labels(version), state)

    def _labels(self, version):
        return {"model": self.config.name, "version": str(version.number)}

    def _find(self):
        """Looks which versions are there and wanted.

        Source: tensorflow_serving/sources/storage_path/
        file_system_storage_path_source.cc
        """
        config, found = self.config, {}
        try:
            for entry in sorted(_names(config.base_path)):
                name = entry.rstrip("/")
                path = tf.io.gfile.join(config.base_path, name)
                if not (name.isascii() and name.isdigit()):
                    continue
                if int(name) <= _LARGEST and self._is_directory(path):
                    found[int(name)] = path
        except Exception as e:  # as in _attempt; of any file system
            return self._warn(f"cannot be read: {as_serving_error(e).message}")
        numbers = config.wanted(found)
        if not numbers:
            return self._warn("has no version that is to be served")
        self._said = None
        wanted = {found[number]: number for number in numbers}
        older = [n for n in found if n < min(numbers)]
        self._older = {found[n]: n for n in sorted(older, reverse=True)}
        with self._changed:
            known = {v.path for v in self._versions if v.path in self._wanted}
            self._wanted = wanted
            # What was gone for a while is tried again.
            for path in sorted(wanted.keys() - known, key=wanted.get):
                version = self._served(path)
                if not version:
                    version = Version(wanted[path], path)
                    self._versions.append(version)
                    self._enter(version, _STATUS.START)

    def _served(self, path):
        found = self._in(_STATUS.AVAILABLE)
        return next((v for v in found if v.path == path), None)

    def _is_directory(self, path):
        return path in self._wanted or tf.io.gfile.isdir(path)

    def _warn(self, what):
        text = (
            f"Model {self.config.name!r}: {self.config.base_path} {what}. What "
            "is loaded stays."
        )
        if text != self._said:
            logging.warning(text)
        self._said = text

    def _load(self):
        """Tries what is due, newest first."""
        now = time.monotonic()
        with self._changed:
            due = [
                version
                for version in self._in(_STATUS.START)
                + self._in(_STATUS.LOADING)
                if version.path in self._wanted and version.due <= now
            ]
        for version in sorted(due, key=lambda v: -v.number):
            if self._ended:
                return
            with self._changed:
                self._enter(version, _STATUS.LOADING)
            self._attempt(version)

    def _fall_back(self):
        """Loads an older version if all that are wanted are broken.

        TensorFlow Serving has no such thing: started so, it serves nothing.
        """
        if self.config.versions:  # no other will do
            return
        tried = {version.path for version in self._versions}
        for path, number in self._older.items():
            if self._ended or self._in(_STATUS.AVAILABLE):
                return
            if path not in tried:
                version = Version(number, path)
                with self._changed:
                    self._versions.append(version)
                    self._enter(version, _STATUS.LOADING)
                self._attempt(version)

    def _attempt(self, version):
        start = time.monotonic()
        version.attempts += 1
        try:
            servable = self._open(version.path)
        except Exception as e:  # whatever it is, this thread goes on
            return self._failed(version, as_serving_error(e))
        with self._changed:
            version.servable, version.error = servable, None
            self._enter(version, _STATUS.AVAILABLE)
            if self._ended:
                self._enter(version, _STATUS.UNLOADING)
        seconds = time.monotonic() - start
        self._on_event("load_seconds", self._labels(version), seconds)

    def _open(self, path):
        servable = Servable(path, **self._threads)
        try:
            if self._warm_up:
                warm_up(servable, path, self._warmup_rows)
        except BaseException:
            servable.close()
            raise
        return servable

    def _failed(self, version, error):
        self._on_event("load_failures", self._labels(version), 1)
        over = version.attempts > self._retries
        logging.error(
            "Model %r: version %d cannot be loaded (attempt %d of %d): %s",
            self.config.name,
            version.number,
            version.attempts,
            self._retries + 1,
            error.message,
        )
        with self._changed:
            version.error = error.copy()
            version.due = time.monotonic() + self._retry_seconds
            if over:
                self._enter(version, _STATUS.END)

    def _retire(self):
        """Marks what is not wanted, if something that is wanted answers."""
        with self._changed:
            for version in self._versions:
                if version.path in self._wanted:
                    continue
                if version.state in (_STATUS.START, _STATUS.LOADING):
                    self._enter(version, _STATUS.END)
            serving = self._in(_STATUS.AVAILABLE)
            if any(version.path in self._wanted for version in serving):
                for version in serving:
                    if version.path not in self._wanted:
                        self._enter(version, _STATUS.UNLOADING)

    def _unload(self):
        """Frees what is marked and not needed."""
        with self._changed:
            free = [v for v in self._in(_STATUS.UNLOADING) if not v.users]
        for version in free:
            version.servable.close()
            with self._changed:
                version.servable = None
                self._enter(version, _STATUS.END)
        with self._changed:
            ended = self._in(_STATUS.END)
            for version in ended[: max(len(ended) - _REMEMBERED, 0)]:
                self._versions.remove(version)


def _names(path):
    if "://" in path:
        return tf.io.gfile.listdir(path)
    return os.listdir(path)  # TensorFlow's stops at a name that is no text
