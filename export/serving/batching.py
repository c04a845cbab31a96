"""Runs requests of many clients together.

An executor that is free takes what waits, so that nobody waits for others
while there is nothing to do, and batches grow by themselves under load.
"""

import asyncio
import collections
import os
import threading
import time

import grpc

from export.serving.errors import ServingError
from export.serving.execution import Executor, Task, concatenate
from export.serving.settings import BatchingParameters


class Batcher:
    """A bounded queue and the threads that empty it, oldest request first.

    Requests of equal keys are joined along the first axis. If a batch fails,
    its halves are run again, so that only those fail that are to blame, with
    their own rows numbered. A request that is larger than a batch is run in
    pieces, and its outputs are joined.

    Args:
        parameters: `BatchingParameters`; None: each request alone and whole,
            as many at the same time as there are processors.
        max_bytes: most bytes of inputs that may wait.
        on_event: see `export.serving.models.Models`.
    """

    def __init__(self, parameters=None, *, max_bytes=2**30, on_event=None):
        """See the class."""
        self._join = parameters is not None
        self._parameters = parameters or BatchingParameters(
            num_batch_threads=max(2, os.cpu_count() or 1)
        )
        self._max_bytes = max_bytes
        self._on_event = on_event or (lambda name, labels, value: None)
        self._executor = Executor(
            self._parameters.allowed_batch_sizes, self._on_event
        )
        self._changed = threading.Condition()
        self._queues = {}  # key -> deque of tasks, none of them empty
        self._rows = self._bytes = self._running = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{i}", daemon=True)
            for i in range(self._parameters.num_batch_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_rows(self):
        """Rows that wait."""
        return self._rows

    async def run(self, call, *, timeout=None):
        """Runs a request; to be cancelled by cancelling the coroutine.

        Args:
            call: `export.serving.servable.Call`.
            timeout: seconds that its client waits; None: for ever.

        Returns:
            outputs by name.

        Raises:
            ServingError: UNAVAILABLE when the queue is full or closed,
                INVALID_ARGUMENT when the request would never fit in,
                DEADLINE_EXCEEDED, or what the run raised.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        tasks = self._split(call, deadline)
        key = self._enqueue(tasks)
        futures = [asyncio.wrap_future(task.future) for task in tasks]
        try:
            done, waiting = await asyncio.wait(
                futures,
                timeout=timeout,
                return_when=asyncio.FIRST_EXCEPTION,
            )
        finally:
            # Nobody waits for these any more, or they are done.
            for future in futures:
                future.cancel()
            self._forget(key, tasks)
        failed = [f for f in futures if f in done and f.exception()]
        if failed:
            raise failed[0].exception().copy()
        if waiting:
            raise _too_late()
        if len(futures) == 1:
            return futures[0].result()
        return concatenate([future.result() for future in futures])

    def stop(self, drain_seconds):
        """Takes nothing more, and ends when what is there is done.

        Args:
            drain_seconds: after which what still waits fails as UNAVAILABLE.
        """
        end = time.monotonic() + drain_seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._queues and not self._running, drain_seconds
            )
            left = [task for queue in self._queues.values() for task in queue]
            self._queues.clear()
            self._rows = self._bytes = 0
        for task in left:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(_unavailable("shutting down"))
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.1))

    def _split(self, call, deadline):
        most = self._parameters.max_batch_size
        if not self._join or call.key is None or call.rows <= most:
            return [Task(call, call.inputs, call.rows, 0, call.size, deadline)]
        return [
            Task(
                call,
                {n: x[first : first + most] for n, x in call.inputs.items()},
                min(most, call.rows - first),
                first,
                call.size * most // call.rows,
                deadline,
            )
            for first in range(0, call.rows, most)
        ]

    def _enqueue(self, tasks):
        call = tasks[0].call
        key = call.key if self._join else None
        key = object() if key is None else key
        with self._changed:
            self._check_room(call)
            for task in tasks:
                self._rows += task.rows
                self._bytes += task.size
                task.queued = time.monotonic()
                queue = self._queues.setdefault(key, collections.deque())
                queue.append(task)
            self._changed.notify(len(tasks))
        return key

    def _check_room(self, call):
        """Raises `ServingError` if a call is too much, now or ever.

        Source: tensorflow/core/kernels/batching_util/shared_batch_scheduler.h
        """
        parameters = self._parameters
        most = parameters.max_batch_size * parameters.max_enqueued_batches
        if call.rows > most:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Task size {call.rows} is larger than maximum input batch "
                f"size {most}",
            )
        if call.size > self._max_bytes:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Task of {call.size} bytes is larger than the queue, "
                f"{self._max_bytes} bytes",
            )
        if self._closed:
            raise _unavailable("shutting down")
        if (
            self._rows + call.rows > most
            or self._bytes + call.size > self._max_bytes
        ):
            raise _unavailable(
                "busy: the batch scheduling queue to which this task was "
                "submitted is full"
            )

    def _forget(self, key, tasks):
        for task in tasks:
            if not task.future.cancel():
                continue
            with self._changed:
                if task in self._queues.get(key, ()):
                    self._queues[key].remove(task)
                    self._left(key, task)

    def _left(self, key, task):
        self._rows -= task.rows
        self._bytes -= task.size
        if not self._queues[key]:
            del self._queues[key]
            self._tell_stop()

    def _tell_stop(self):
        if self._closed:
            self._changed.notify_all()

    def _work(self):
        while self._run_next():
            pass

    def _run_next(self):
        """Runs a batch; returns False when there will be no more."""
        with self._changed:
            key = self._wait()
            if key is None:
                return False
            batch = self._take(key)
            self._running += 1
        try:
            if batch:
                self._report(batch)
                self._executor.execute(batch)
        finally:
            with self._changed:
                self._running -= 1
                self._tell_stop()
        return True

    def _wait(self):
        """The key to go on with; None: closed and empty."""
        while True:
            key, seconds = self._choose()
            if key is not None or (self._closed and not self._queues):
                return key
            self._changed.wait(seconds)

    def _choose(self):
        """The key whose first task waits longest, among those that may go."""
        patience = self._parameters.batch_timeout_micros / 1e6
        if not self._join or self._closed:
            patience = 0.0
        now = time.monotonic()
        best, first, pause = None, now, None
        for key, queue in self._queues.items():
            came = queue[0].queued
            left = came + patience - now
            if left > 0 and not self._is_full(queue):
                pause = left if pause is None else min(pause, left)
            elif came <= first:
                best, first = key, came
        return best, pause

    def _is_full(self, queue):
        rows = 0
        for task in queue:
            rows += task.rows
            if rows >= self._parameters.max_batch_size:
                return True
        return False

    def _take(self, key):
        queue, batch, rows = self._queues[key], [], 0
        now = time.monotonic()
        while queue:
            task = queue[0]
            if batch and rows + task.rows > self._parameters.max_batch_size:
                break
            queue.popleft()
            self._left(key, task)
            if not task.future.set_running_or_notify_cancel():
                continue
            if task.deadline is not None and task.deadline < now:
                task.future.set_exception(_too_late())
                continue
            batch.append(task)
            rows += task.rows
        return batch

    def _report(self, batch):
        now = time.monotonic()
        for task in batch:
            self._on_event("queue_seconds", {}, now - task.queued)
        self._on_event("batch_rows", {}, sum(task.rows for task in batch))


def _too_late():
    return ServingError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "The request's time was over before it was done.",
    )


def _unavailable(why):
    return ServingError(
        grpc.StatusCode.UNAVAILABLE, f"The server is {why}; try again later."
    )
