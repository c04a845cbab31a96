"""Views made by other processes: tf.data services that take turns.

A service is a dispatcher with one worker (`clsa_tf/data_service.py`). Of
several workers behind one dispatcher whichever is ready is read first; of
several services each makes every W-th part, and they are read in turn, so that
the batches are those of a single process.
"""

import re
import socket
import threading
import time
from typing import Callable, Tuple

import grpc
import tensorflow as tf

from clsa_tf.errors import UserError, first_line

ANSWER_SECONDS = 10.0  # within which a service answers at the start
SILENT_SECONDS = 30.0  # after which one that does not answer is lost
_PAUSE_SECONDS = 1.0  # between two looks at the services
_LOOK_SECONDS = 3.0  # that one may take

_ADDRESS = re.compile(r"grpc://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")


def parse(text: str) -> Tuple[str, ...]:
    """Splits `--data_service` into addresses.

    Args:
        text: `"grpc://host:port"`, several separated by commas; "" for none.

    Returns:
        the addresses, each as it was written.

    Raises:
        UserError: one is not of that form.
    """
    addresses = tuple(text.split(",")) if text else ()
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if not match or not 0 < int(match.group(2)) < 2**16:
            raise UserError(
                "Expected --data_service=grpc://host:port, several separated "
                f"by commas, received {address!r}; write them as `python -m "
                "clsa_tf.data_service` prints them."
            )
    return addresses


class Services:
    """The tf.data services that a run uses.

    Args:
        addresses: theirs, as from `parse`; at least one.
    """

    def __init__(self, addresses: Tuple[str, ...]):
        """See the class."""
        self.addresses = addresses
        self._lost = ""
        self._alarms = []  # queues, each of one dataset
        self._watcher = None
        self._closed = threading.Event()

    def __enter__(self):
        """Does nothing: services are watched once there are datasets."""
        return self

    def __exit__(self, *_):
        """Ends all datasets, with the same error as a lost service."""
        self._closed.set()
        self._ring()

    def lost(self) -> str:
        """Says which service is gone, and since when; "" if none is."""
        return self._lost

    def check(self):
        """Has every service make a dataset.

        Raises:
            UserError: one did not within `ANSWER_SECONDS`.
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
            make: `make(k, n)` is the endless dataset of elements k, k + n,
                k + 2n, … without Python functions. It is made anew, and
                runs, in the process of the service.

        Returns:
            Dataset of elements 0, 1, 2, …; some ten of each service are here
            ahead of time. Its iterator fails with a
            `tf.errors.InvalidArgumentError` once a service has been silent
            for `SILENT_SECONDS` (`lost` then says so), and with a
            `tf.errors.NotFoundError` if one was started anew.

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
                    f"Expected the tf.data service at {address} to take the "
                    f"dataset, received: {first_line(e)}; start it with the "
                    "same version of TensorFlow as the training."
                ) from e
        # Reads ahead from all, also at the beginning, when views are compiled.
        in_turn = _one_after_the_other(parts).interleave(
            lambda dataset: dataset,
            cycle_length=count,
            num_parallel_calls=count,
            deterministic=True,
        )
        return self._watched(in_turn)

    def _watched(self, elements):
        """Adds the end that TensorFlow lacks: it waits for ever."""
        with tf.device("CPU:0"):
            alarm = tf.queue.FIFOQueue(4, [tf.bool], shapes=[[]])
        self._watch(alarm)

        def wait(_):
            # In here no Python: iterators are deleted by threads that hold its
            # lock, and would wait for ever.
            fine = alarm.dequeue()
            # Put back, for an error again and again: an iterator that feeds
            # several devices is deleted only once nobody waits for an element.
            with tf.control_dependencies([alarm.enqueue(fine)]):
                check = tf.debugging.Assert(fine, ["Lost a tf.data service."])
            with tf.control_dependencies([check]):
                return elements.take(0)

        # The elements, and beside them a dataset that has none but may fail.
        # `deterministic` would make the one wait for the other.
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
    """The dataset whose elements are these datasets."""
    first, *rest = map(tf.data.Dataset.from_tensors, datasets)
    for dataset in rest:
        first = first.concatenate(dataset)
    return first


def _at(address):
    """The transformation that moves a dataset into a service."""
    return tf.data.experimental.service.distribute(
        # The one worker makes all.
        processing_mode="parallel_epochs",
        service=address,
        # Views are noise to a compressor.
        compression=None,
        max_outstanding_requests=2,
    )


def _problem(address):
    """Says what is wrong with a service; an empty string if nothing is."""
    try:
        _connect(address, ANSWER_SECONDS)
    except OSError as e:
        return f"no connection ({e})"
    problems = [
        f"no answer within {ANSWER_SECONDS:g} s (it has to be started with a "
        "--host that is known here)"
    ]

    def ask():
        try:
            list(tf.data.Dataset.range(1).apply(_at(address)))
            problems[0] = ""
        except tf.errors.OpError as e:
            problems[0] = first_line(e)

    # TensorFlow asks until it is answered: what is not, ends with the process.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return problems[0]


def _connect(address, seconds):
    """Raises `OSError` if nothing listens there."""
    host, port = _ADDRESS.fullmatch(address).groups()
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def _answers(address, seconds):
    """Raises `OSError` unless a server is there that is not frozen.

    The operating system accepts connections for a process that is.
    """
    _connect(address, seconds)
    # A connection of its own, not one that is open already.
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
