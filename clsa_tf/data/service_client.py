"""Reads views from other processes: tf.data services that take turns.

A service is a dispatcher with one worker (`clsa_tf/data_service.py`). With
several workers of one dispatcher, TensorFlow would read first whichever is
ready. Instead, each of W services makes every W-th part, and the services are
read in turn. So the batches equal those of a single process.
"""

import re
import socket
import threading
import time
from typing import Callable, Tuple

import grpc
import tensorflow as tf

from clsa_tf.errors import UserError, first_line

ANSWER_SECONDS = 10.0  # time limit for the first answer of a service
SILENT_SECONDS = 30.0  # a service without answers for this long is lost
_PAUSE_SECONDS = 1.0  # pause between two checks of the services
_LOOK_SECONDS = 3.0  # time limit of one check

_ADDRESS = re.compile(r"grpc://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")


def parse(text: str) -> Tuple[str, ...]:
    """Splits `--data_service` into addresses.

    Args:
        text: `"grpc://host:port"`, or several separated by commas; "" for
            none.

    Returns:
        The addresses, unchanged.

    Raises:
        UserError: an address does not have this form.
    """
    addresses = tuple(text.split(",")) if text else ()
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if not match or not 0 < int(match.group(2)) < 2**16:
            raise UserError(
                "Expected addresses grpc://host:port, separated by commas, for "
                f"--data_service, received {address!r}; copy the addresses "
                "that `python -m clsa_tf.data_service` prints."
            )
    return addresses


class Services:
    """The tf.data services that a run uses.

    Args:
        addresses: their addresses, as from `parse`; at least one.
    """

    def __init__(self, addresses: Tuple[str, ...]):
        """See the class."""
        self.addresses = addresses
        self._lost = ""
        self._alarms = []  # queues, each of one dataset
        self._watcher = None
        self._closed = threading.Event()

    def __enter__(self):
        """Returns self. Watching starts with the first dataset."""
        return self

    def __exit__(self, *_):
        """Ends all datasets with the same error as after a lost service."""
        self._closed.set()
        self._ring()

    def lost(self) -> str:
        """Returns which service is lost, and for how long; "" if none is."""
        return self._lost

    def check(self):
        """Checks that every service can make a dataset.

        Raises:
            UserError: a service did not make one within `ANSWER_SECONDS`.
        """
        for address in self.addresses:
            problem = _problem(address)
            if problem:
                raise UserError(
                    f"Expected a tf.data service at {address}, received "
                    f"{problem}; start it with `python -m clsa_tf.data_service "
                    "--expose`, or correct --data_service."
                )

    def distribute(
        self, make: Callable[[int, int], tf.data.Dataset]
    ) -> tf.data.Dataset:
        """Returns the elements that the services make, in order.

        Args:
            make: `make(k, n)` returns the endless dataset of elements k, k + n,
                k + 2n, … without Python functions. The process of the service
                builds it again, and runs it.

        Returns:
            Dataset of elements 0, 1, 2, … About ten elements of each service
            are read ahead. Its iterator fails with a
            `tf.errors.InvalidArgumentError` after a service has been silent
            for `SILENT_SECONDS` (see `lost`), and with a
            `tf.errors.NotFoundError` if a service was restarted.

        Raises:
            UserError: a service did not take its dataset.
        """
        count = len(self.addresses)
        parts = []
        for k, address in enumerate(self.addresses):
            try:
                parts.append(make(k, count).apply(_at(address)))
            except tf.errors.OpError as e:
                raise UserError(
                    f"Cannot send the dataset to the tf.data service at "
                    f"{address}: {first_line(e)}; start it with the same "
                    "version of TensorFlow as the training."
                ) from e
        # Reads ahead from all services, also at the start, while they compile
        # the views.
        in_turn = _one_after_the_other(parts).interleave(
            lambda dataset: dataset,
            cycle_length=count,
            num_parallel_calls=count,
            deterministic=True,
        )
        return self._watched(in_turn)

    def _watched(self, elements):
        """Adds an error for lost services; TensorFlow would wait forever."""
        with tf.device("CPU:0"):
            alarm = tf.queue.FIFOQueue(4, [tf.bool], shapes=[[]])
        self._watch(alarm)

        def wait(_):
            # No Python here. A thread that holds Python's lock may delete the
            # iterator, and would wait forever.
            fine = alarm.dequeue()
            # The element is put back so that the error repeats. An iterator for
            # several devices is deleted only if nothing waits for an element.
            with tf.control_dependencies([alarm.enqueue(fine)]):
                check = tf.debugging.Assert(fine, ["Lost a tf.data service."])
            with tf.control_dependencies([check]):
                return elements.take(0)

        # Interleaves the elements with a dataset that is empty but may fail.
        # With `deterministic` one of them would wait for the other.
        nothing = tf.data.Dataset.counter().flat_map(wait)
        return _one_after_the_other([elements, nothing]).interleave(
            lambda dataset: dataset,
            cycle_length=2,
            num_parallel_calls=2,
            deterministic=False,
        )

    def _watch(self, alarm):
        self._alarms.append(alarm)
        if not self._watcher:
            self._watcher = threading.Thread(target=self._look, daemon=True)
            self._watcher.start()

    def _look(self):
        silent = {}  # address -> since when, s
        while not (self._lost or self._closed.wait(_PAUSE_SECONDS)):
            now = time.monotonic()
            for address in self.addresses:
                try:
                    _answers(address, _LOOK_SECONDS)
                    silent.pop(address, None)
                except OSError:
                    if now - silent.setdefault(address, now) > SILENT_SECONDS:
                        self._lost = (
                            f"the tf.data service at {address}, silent for "
                            f"{SILENT_SECONDS:g} s"
                        )
        self._ring()

    def _ring(self):
        for alarm in self._alarms:
            alarm.enqueue(False)


def _one_after_the_other(datasets):
    """Returns the dataset whose elements are these datasets."""
    first, *rest = map(tf.data.Dataset.from_tensors, datasets)
    for dataset in rest:
        first = first.concatenate(dataset)
    return first


def _at(address):
    """Returns the transformation that runs a dataset in a service."""
    return tf.data.experimental.service.distribute(
        # The service has a single worker, which makes the whole dataset.
        processing_mode="parallel_epochs",
        service=address,
        # Views hardly compress.
        compression=None,
        max_outstanding_requests=2,
    )


def _problem(address):
    """Returns what is wrong with a service; "" if it works."""
    try:
        _connect(address, ANSWER_SECONDS)
    except OSError as e:
        return f"no connection ({e})"
    problems = [
        f"no answer within {ANSWER_SECONDS:g} s (it must be started with a "
        "--host that this machine can reach)"
    ]

    def ask():
        try:
            list(tf.data.Dataset.range(1).apply(_at(address)))
            problems[0] = ""
        except tf.errors.OpError as e:
            problems[0] = first_line(e)

    # TensorFlow retries forever. Without an answer, the thread ends with the
    # process.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return problems[0]


def _connect(address, seconds):
    """Raises `OSError` if nothing listens at the address."""
    host, port = _ADDRESS.fullmatch(address).groups()
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def _answers(address, seconds):
    """Raises `OSError` unless a server responds at the address.

    An open port is not enough, because the operating system accepts connections
    even for a frozen process.
    """
    _connect(address, seconds)
    # Opens a new connection instead of reusing an open one.
    channel = grpc.insecure_channel(
        address[len("grpc://") :],
        options=[("grpc.use_local_subchannel_pool", 1)],
    )
    try:
        grpc.channel_ready_future(channel).result(seconds)
    except grpc.FutureTimeoutError as e:
        raise TimeoutError(f"no answer within {seconds:g} s") from e
    finally:
        channel.close()
