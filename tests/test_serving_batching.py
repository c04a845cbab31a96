"""Requests of many clients in one queue."""

import asyncio
import gc
import re
import threading
import time
import weakref

import grpc
import numpy as np
import pytest

from clsa_tf.errors import UserError
from export.serving import settings
from export.serving.batching import Batcher
from export.serving.errors import ServingError
from export.serving.servable import Call
from export.serving.settings import BatchingParameters

_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Model:
    """Doubles numbers; a negative one is an error, as in a graph."""

    def __init__(self):
        self.batches = []  # sizes, in the order in which they began
        self.starts = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs):
        x = inputs["x"]
        self.batches.append(len(x))
        self.starts.release()
        assert self.gate.wait(60)
        bad = np.flatnonzero(x < 0)
        if bad.size:
            raise ServingError(_INVALID, f"row {bad[0]} is negative")
        return {"y": x * 2}

    def call(self, *values, key="k"):
        x = np.array(values, np.float32)
        return Call(self.run, key, {"x": x}, len(x), x.nbytes)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher():
    """Makes them, of one executor."""
    made = []

    def make(*, max_bytes=2**30, **values):
        values = {"max_batch_size": 8, "num_batch_threads": 1} | values
        made.append(Batcher(BatchingParameters(**values), max_bytes=max_bytes))
        return made[-1]

    yield make
    for one in made:
        one.stop(10.0)


async def _blocked(model, batcher, key="k"):
    """Keeps the only executor busy; returns its request."""
    model.gate.clear()
    task = asyncio.create_task(batcher.run(model.call(1.0, key=key)))
    while not model.batches:
        await asyncio.sleep(0.001)
    return task


async def _submit(model, batcher, *requests, **options):
    """Puts requests into the queue, in this order."""
    tasks = []
    for values in requests:
        before = batcher.queued_rows
        call = values if isinstance(values, Call) else model.call(*values)
        tasks.append(asyncio.create_task(batcher.run(call, **options)))
        while batcher.queued_rows == before and not tasks[-1].done():
            await asyncio.sleep(0)
    return tasks


def _errors(results):
    return [getattr(result, "code", None) for result in results]


def test_waiting_requests_are_run_as_one_in_their_order(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [2, 3], [4], [5, 6, 7], [8, 9, 10])
        model.gate.set()
        return await asyncio.gather(first, *rest)

    results = asyncio.run(scenario())
    assert [r["y"].tolist() for r in results] == [
        [2],
        [4, 6],
        [8],
        [10, 12, 14],
        [16, 18, 20],
    ]
    assert model.batches == [1, 6, 3]  # whole requests, 8 rows at most


def test_keys_are_not_mixed_and_the_oldest_goes_first(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        calls = [
            model.call(1, 1, key="b"),
            model.call(2, key="a"),
            model.call(3, 3, 3, key="b"),
            model.call(4, key=None),
            model.call(5, key=None),
        ]
        rest = await _submit(model, queue, *calls)
        model.gate.set()
        return await asyncio.gather(first, *rest)

    results = asyncio.run(scenario())
    assert [len(r["y"]) for r in results] == [1, 2, 1, 3, 1, 1]
    assert model.batches == [1, 5, 1, 1, 1]


def test_a_large_request_is_run_in_pieces(model, batcher):
    values = np.arange(21)
    result = asyncio.run(batcher().run(model.call(*values)))
    np.testing.assert_array_equal(result["y"], values * 2)
    assert model.batches == [8, 8, 5]


def test_the_row_of_an_error_in_a_piece_is_the_clients(model, batcher):
    values = np.arange(21)
    values[13] = -1
    with pytest.raises(ServingError, match="row 13 is negative") as caught:
        asyncio.run(batcher().run(model.call(*values)))
    assert caught.value.code == _INVALID


def test_only_the_request_that_is_to_blame_fails(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [2], [3, 4, -5], [6], [7])
        model.gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    results = asyncio.run(scenario())
    assert _errors(results) == [None, None, _INVALID, None, None]
    assert "row 2 is negative" in str(results[2])
    assert [r["y"].tolist() for r in results[3:]] == [[12], [14]]


def test_an_unexpected_error_does_not_end_the_executor(model, batcher):
    def broken(inputs):
        raise KeyError("nobody thought of this")

    async def scenario():
        queue = batcher()
        call = model.call(1)._replace(run=broken)
        with pytest.raises(ServingError, match="nobody") as caught:
            await queue.run(call)
        assert caught.value.code == grpc.StatusCode.INTERNAL
        return await queue.run(model.call(2))

    assert asyncio.run(scenario())["y"] == [4]


def test_batches_are_padded_with_rows_that_are_valid(model, batcher):
    async def scenario():
        queue = batcher(allowed_batch_sizes=(4, 8))
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [2, 3], [4, 5, 6])
        model.gate.set()
        return await asyncio.gather(first, *rest)

    results = asyncio.run(scenario())
    assert [r["y"].tolist() for r in results] == [[2], [4, 6], [8, 10, 12]]
    assert model.batches == [4, 8]


def test_an_error_is_that_of_the_request_without_padding(model, batcher):
    def last(inputs):
        bad = np.flatnonzero(inputs["x"] < 0)
        raise ServingError(_INVALID, f"row {bad[-1]} is negative")

    queue = batcher(allowed_batch_sizes=(8,))
    call = model.call(-1, 2)._replace(run=last)
    with pytest.raises(ServingError, match="row 0 is negative"):
        asyncio.run(queue.run(call))


def test_a_full_queue_refuses_at_once(model, batcher):
    async def scenario():
        queue = batcher(max_enqueued_batches=2)
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, *[[1] * 4] * 4)
        refused = await asyncio.gather(
            queue.run(model.call(1)), return_exceptions=True
        )
        model.gate.set()
        return refused, await asyncio.gather(first, *rest)

    refused, served = asyncio.run(scenario())
    assert _errors(refused) == [grpc.StatusCode.UNAVAILABLE]
    assert len(served) == 5


def test_what_would_never_fit_in_is_no_matter_of_trying_again(model, batcher):
    queue = batcher(max_enqueued_batches=2)
    with pytest.raises(ServingError, match="Task size 17 is larger") as caught:
        asyncio.run(queue.run(model.call(*range(17))))
    assert caught.value.code == _INVALID


def test_bytes_in_the_queue_are_bounded(model, batcher):
    async def scenario():
        queue = batcher(max_bytes=16)
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [1, 2, 3])
        refused = await asyncio.gather(
            queue.run(model.call(4, 5)),
            queue.run(model.call(1, 2, 3, 4, 5)),
            return_exceptions=True,
        )
        model.gate.set()
        await asyncio.gather(first, *rest)
        return refused, await queue.run(model.call(1, 2, 3, 4))

    refused, last = asyncio.run(scenario())
    assert _errors(refused) == [grpc.StatusCode.UNAVAILABLE, _INVALID]
    assert len(last["y"]) == 4


def test_a_cancelled_request_is_not_run_and_makes_room(model, batcher):
    async def scenario():
        queue = batcher(max_enqueued_batches=1)
        first = await _blocked(model, queue)
        gone, stays = await _submit(model, queue, [-1] * 5, [2] * 3)
        assert queue.queued_rows == 8
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert queue.queued_rows == 3
        more = await _submit(model, queue, [3] * 5)
        model.gate.set()
        return await asyncio.gather(first, stays, *more)

    assert len(asyncio.run(scenario())) == 3
    assert model.batches == [1, 8]


def test_a_request_that_is_too_late_is_not_run(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        late = await _submit(model, queue, [2], timeout=0.05)
        stays = await _submit(model, queue, [3])
        with pytest.raises(ServingError) as caught:
            await late[0]
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        model.gate.set()
        return await asyncio.gather(first, *stays)

    asyncio.run(scenario())
    assert model.batches == [1, 1]


def test_a_timeout_waits_for_others_but_not_longer(model, batcher):
    async def scenario():
        queue = batcher(batch_timeout_micros=300_000)
        both = await _submit(model, queue, [1], [2])
        await asyncio.gather(*both)
        await asyncio.gather(*await _submit(model, queue, [1] * 4, [2] * 4))

    asyncio.run(scenario())
    assert model.batches == [2, 8]


def test_a_full_batch_does_not_wait(model, batcher):
    async def scenario():
        queue = batcher(batch_timeout_micros=3_600_000_000)
        await asyncio.wait_for(queue.run(model.call(*range(8))), 30)

    asyncio.run(scenario())


def test_stopping_finishes_what_is_there(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [2], [3])
        stopping = asyncio.get_running_loop().run_in_executor(
            None, queue.stop, 30.0
        )
        refused = None
        while refused is None:
            try:
                await queue.run(model.call(1), timeout=0.01)
            except ServingError as e:
                if e.code == grpc.StatusCode.UNAVAILABLE:
                    refused = e
        model.gate.set()
        results = await asyncio.gather(first, *rest)
        await stopping
        return results

    assert len(asyncio.run(scenario())) == 3


def test_stopping_gives_up_what_takes_too_long(model, batcher):
    async def scenario():
        queue = batcher()
        first = await _blocked(model, queue)
        rest = await _submit(model, queue, [2], [3])
        await asyncio.to_thread(queue.stop, 0.1)
        model.gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    results = asyncio.run(scenario())
    unavailable = grpc.StatusCode.UNAVAILABLE
    assert _errors(results) == [None, unavailable, unavailable]


def test_without_batching_every_request_is_run_as_it_is(model):
    async def scenario():
        queue = Batcher()
        calls = [model.call(*range(n)) for n in (1, 2, 40, 1)]
        results = await asyncio.gather(*map(queue.run, calls))
        await asyncio.get_running_loop().run_in_executor(None, queue.stop, 9.0)
        return results

    results = asyncio.run(scenario())
    assert [len(r["y"]) for r in results] == [1, 2, 40, 1]
    assert sorted(model.batches) == [1, 1, 2, 40]


def test_many_requests_of_several_loops(model, batcher):
    queue = batcher(num_batch_threads=2, max_enqueued_batches=1000)
    failures = []

    async def client(seed):
        rng = np.random.default_rng(seed)
        calls = [
            model.call(*rng.uniform(-0.1, 9, rng.integers(1, 20)))
            for _ in range(200)
        ]
        results = await asyncio.gather(
            *map(queue.run, calls), return_exceptions=True
        )
        for call, result in zip(calls, results):
            x = call.inputs["x"]
            if (x < 0).any():
                # One that is bad, counted as the client does.
                row = re.fullmatch(r"row (\d+) is negative", str(result))
                if not row or x[int(row.group(1))] >= 0:
                    failures.append((x, result))
            elif not np.array_equal(result["y"], x * 2):
                failures.append((x, result))

    threads = [
        threading.Thread(target=lambda i=i: asyncio.run(client(i)))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert queue.queued_rows == 0


def test_arrays_are_freed_at_once(model, batcher):
    queue = batcher()

    async def scenario(*values):
        call = model.call(*values)
        alive = weakref.ref(call.inputs["x"])
        results = await asyncio.gather(queue.run(call), return_exceptions=True)
        del call, results
        return alive

    gc.disable()
    try:
        for values in ([1, 2], [1, -2], range(20), [*range(20), -1]):
            alive = asyncio.run(scenario(*values))
            end = time.time() + 30
            while alive() is not None and time.time() < end:
                time.sleep(0.01)
            assert alive() is None, values
    finally:
        gc.enable()


def test_batching_parameters_are_read(tmp_path):
    path = tmp_path / "batching_parameters.txt"
    path.write_text(
        "max_batch_size { value: 16 }\n"
        "batch_timeout_micros { value: 500 }\n"
        "max_enqueued_batches { value: 7 }\n"
        "num_batch_threads { value: 3 }\n"
        'thread_pool_name { value: "pool" }\n'
        "pad_variable_length_inputs: false\n"
        "allowed_batch_sizes: 4\nallowed_batch_sizes: 16\n"
    )
    assert settings.read_batching_parameters(path) == BatchingParameters(
        max_batch_size=16,
        batch_timeout_micros=500,
        max_enqueued_batches=7,
        num_batch_threads=3,
        allowed_batch_sizes=(4, 16),
    )
    path.write_text("")
    assert settings.read_batching_parameters(path) == BatchingParameters()


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_batch_size { value: 0 }", "max_batch_size of at least 1"),
        ("num_batch_threads { value: -1 }", "num_batch_threads"),
        ("max_enqueued_batches { value: 0 }", "max_enqueued_batches"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros"),
        ("allowed_batch_sizes: [8, 4, 32]", "ascending"),
        ("allowed_batch_sizes: [4, 4, 32]", "ascending"),
        ("allowed_batch_sizes: [0, 32]", "ascending"),
        ("allowed_batch_sizes: [4, 16]", "last equals max_batch_size, 32"),
        ("pad_variable_length_inputs: true", "pad_variable_length_inputs"),
        ("max_batch_size: 8", "text format"),
        ("max_batch { value: 8 }", "text format"),
        ("\x00", "text format"),
    ],
)
def test_wrong_batching_parameters_are_refused(text, said, tmp_path):
    path = tmp_path / "batching_parameters.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        settings.read_batching_parameters(path)


def test_a_missing_file_is_said():
    with pytest.raises(UserError, match="no-such-file"):
        settings.read_batching_parameters("/no-such-file")
    with pytest.raises(UserError, match="no-such-file"):
        settings.read_model_configs("/no-such-file")
