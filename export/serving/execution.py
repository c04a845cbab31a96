"""Runs requests as one batch, so that none suffers from another."""

import concurrent.futures
import dataclasses
import re
import time
import typing

import grpc
import numpy as np

from export.serving.errors import ServingError, as_serving_error

# How messages of an exported encoder name a row.
_ROW = re.compile(r"\b(image|row) (\d+)\b")


@dataclasses.dataclass(eq=False)
class Task:
    """A request, or a piece of one.

    Attributes:
        call: `export.serving.servable.Call`.
        inputs: rows of the call's inputs, from `first` on.
        rows: how many.
        first: number of the first of them in the request.
        size: share of the request's bytes.
        deadline: when nobody waits any more, by `time.monotonic`; or None.
        queued: when it came, by the same clock.
        future: of the outputs.
    """

    call: typing.Any
    inputs: typing.Dict[str, np.ndarray]
    rows: int
    first: int
    size: int
    deadline: typing.Optional[float]
    queued: float = 0.0
    future: concurrent.futures.Future = dataclasses.field(
        default_factory=concurrent.futures.Future
    )


class Executor:
    """Joins tasks, pads and runs them, and takes the outputs apart.

    Args:
        sizes: numbers of rows that are run, ascending; (): any.
        on_event: see `export.serving.models.Models`.
    """

    def __init__(self, sizes, on_event):
        """See the class."""
        self._sizes = sizes
        self._on_event = on_event

    def execute(self, batch):
        """Runs tasks together and, if that fails, in halves.

        Args:
            batch: tasks whose calls have equal keys; each gets its outcome.
        """
        try:
            results = self._run_joined(batch)
        except ServingError as e:
            if len(batch) > 1:
                middle = len(batch) // 2
                self.execute(batch[:middle])
                self.execute(batch[middle:])
                return
            results = [self._run_alone(batch[0], e.copy())]
        except Exception as e:  # ours; the thread has to live on
            results = [as_serving_error(e)] * len(batch)
        for task, result in zip(batch, results):
            if isinstance(result, ServingError):
                task.future.set_exception(result)
            else:
                task.future.set_result(result)

    def _run_joined(self, batch):
        """The outputs of each task, or `ServingError`."""
        inputs, rows = batch[0].inputs, sum(task.rows for task in batch)
        if len(batch) > 1:
            inputs = concatenate([task.inputs for task in batch])
        padded = rows
        if batch[0].call.key is not None:
            padded = self._padded(rows)
        if padded > rows:
            inputs = resize_rows(inputs, padded)
        outputs = self._timed(batch[0].call, inputs)
        if len(batch) == 1 and padded == rows:
            return [outputs]
        if any(x.ndim == 0 or len(x) != padded for x in outputs.values()):
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Batched output tensor's 0th dimension does not equal the sum "
                "of the 0th dimension sizes of the input tensors",
            )
        ends = np.cumsum([task.rows for task in batch])
        return [
            {n: x[end - task.rows : end] for n, x in outputs.items()}
            for task, end in zip(batch, ends)
        ]

    def _run_alone(self, task, error):
        """The outcome of a task that failed, as if there were no batching."""
        try:
            if (
                task.call.key is not None
                and self._padded(task.rows) > task.rows
            ):
                # Without the padding, which the message might count.
                return self._timed(task.call, task.inputs)
        except ServingError as e:
            error = e.copy()
        except Exception as e:  # as above
            return as_serving_error(e)
        if not task.first and task.rows == task.call.rows:
            return error
        return ServingError(error.code, _renumber(error.message, task))

    def _timed(self, call, inputs):
        start = time.monotonic()
        outputs = call.run(inputs)
        self._on_event("run_seconds", {}, time.monotonic() - start)
        return outputs

    def _padded(self, rows):
        sizes = self._sizes
        return next((size for size in sizes if size >= rows), rows)


def resize_rows(inputs, count):
    """The inputs with `count` rows: theirs, from the first on, over and over.

    So that whatever a row has to be, it is.
    """
    return {
        name: value.take(np.arange(count) % len(value), axis=0)
        for name, value in inputs.items()
    }


def concatenate(parts):
    """Joins arrays by name along the first axis; parts are dicts of them."""
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _renumber(message, task):
    """The message about a piece, with rows as the client counts them."""
    if _ROW.search(message):
        return _ROW.sub(
            lambda m: f"{m.group(1)} {int(m.group(2)) + task.first}", message
        )
    last = task.first + task.rows - 1
    return f"Of the rows {task.first} to {last}: {message}"
