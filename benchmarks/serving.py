"""Measures serving: `python -m benchmarks.serving --model=BASE --photos=DIR`.

Compares the embedded server, and `export.embed`, with calling the SavedModel in
a loop, in turns on the same photographs. Also measures the first request, a new
version under load, and a thousand concurrent requests. It works on a copy of
BASE.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import grpc
import numpy as np
import psutil
import tensorflow as tf
from absl import app, flags
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from clsa_tf.data.sources.listing import list_images

FLAGS = flags.FLAGS
_MODEL = flags.DEFINE_string("model", None, "directory of the model's versions")
_PHOTOS = flags.DEFINE_string("photos", None, "folder of photographs")
_ONLY = flags.DEFINE_list(
    "only",
    ["latency", "throughput", "thousand", "first", "swap", "embed"],
    "measurements to run",
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each measurement")
_CLIENTS = flags.DEFINE_integer("clients", 32, "concurrent requests")
_REQUESTS = flags.DEFINE_integer("requests", 256, "requests per turn")
_BATCHING = flags.DEFINE_bool("batching", True, "enable request batching")
_POLL_SECONDS = flags.DEFINE_integer(
    "poll_seconds", 1, "interval of the server's polling for versions, in s"
)


def main(argv):
    """Runs the measurements in `--only`; prints one line each."""
    del argv
    photos = read_photos(_PHOTOS.value, _REQUESTS.value)
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.join(folder, "model")
        shutil.copytree(_MODEL.value, base)
        newest = max(filter(str.isdigit, os.listdir(base)), key=int)
        direct = Direct(os.path.join(base, newest))
        for name in _ONLY.value:
            globals()[f"measure_{name}"](base, direct, photos)


def measure_latency(base, direct, photos):
    """Latency of one photograph at a time."""
    count = min(len(photos), 50)
    ours, theirs = [], []
    with serving(base) as server:
        for _ in range(_ROUNDS.value):
            theirs.append([direct.seconds([p]) for p in photos[:count]])
            ours.append(asyncio.run(server.latencies(photos[:count])))
    both = [
        (statistics.median(a), statistics.median(b))
        for a, b in zip(ours, theirs)
    ]
    say("p50 of one request at a time, ms", both, scale=1e3)


def measure_throughput(base, direct, photos):
    """Throughput with `--clients` concurrent requests of one photograph."""
    size = _CLIENTS.value
    batches = [photos[i : i + size] for i in range(0, len(photos), size)]
    ours, theirs = [], []
    with serving(base) as server:
        for _ in range(_ROUNDS.value):
            theirs.append(len(photos) / sum(map(direct.seconds, batches)))
            start = time.perf_counter()
            asyncio.run(server.embed(photos, at_once=size))
            ours.append(len(photos) / (time.perf_counter() - start))
    say(f"photographs/s, {size} at a time", list(zip(ours, theirs)))


def measure_thousand(base, direct, photos):
    """A thousand concurrent requests, repeatedly: losses, errors, memory."""
    expected = np.concatenate([direct([p]) for p in photos])
    requests = list(itertools.islice(itertools.cycle(photos), 1000))
    worst, memory = 0.0, []
    with serving(base) as server:
        for _ in range(_ROUNDS.value):
            rows = asyncio.run(server.embed(requests, at_once=1000))
            assert len(rows) == 1000
            for i, row in enumerate(rows):
                worst = max(
                    worst, np.abs(row - expected[i % len(photos)]).max()
                )
            memory.append(server.memory() / 2**20)
    scale = np.abs(expected).max()
    print(
        f"1,000 concurrent requests, {_ROUNDS.value} times: none lost, largest "
        f"error {worst / scale:.1g} of the largest value; MiB in use "
        f"afterwards: {', '.join(f'{m:.0f}' for m in memory)}",
        flush=True,
    )


def measure_first(base, direct, photos):
    """Latency of the first request after the start, against the median."""
    pairs = []
    for _ in range(_ROUNDS.value):
        with serving(base) as server:
            times = asyncio.run(server.latencies(photos[:30]))
        pairs.append((times[0], statistics.median(times)))
    say("first request against the median, ms", pairs, scale=1e3)


def measure_swap(base, direct, photos):
    """Time from publishing a version to its first answer, under load."""
    seconds, memory, failed, answered = [], [], 0, 0
    with serving(base) as server:
        for _ in range(_ROUNDS.value):
            versions = sorted(map(int, filter(str.isdigit, os.listdir(base))))
            took, good, bad = asyncio.run(
                server.swap(base, versions[-1], photos, at_once=8)
            )
            seconds.append(took)
            memory.append(server.memory() / 2**20)
            answered, failed = answered + good, failed + bad
    print(
        f"a new version is served after {statistics.median(seconds):.1f} s "
        f"({min(seconds):.1f} to {max(seconds):.1f}), with {answered} requests "
        f"answered meanwhile, {failed} failed; polling interval "
        f"{_POLL_SECONDS.value} s; MiB in use afterwards: "
        f"{', '.join(f'{m:.0f}' for m in memory)}",
        flush=True,
    )


def measure_embed(base, direct, photos):
    """Throughput of `export.embed`, against a loop over batches in memory."""
    names = list_images(_PHOTOS.value, more_formats=False).images
    every = read_photos(_PHOTOS.value, len(names))
    batches = [every[i : i + 32] for i in range(0, len(every), 32)]
    pairs = []
    for turn in range(_ROUNDS.value):
        theirs = len(every) / sum(map(direct.seconds, batches))
        output = os.path.join(base, f".embeddings-{turn}.npz")
        said = subprocess.run(
            [
                *(sys.executable, "-m", "export.embed", f"--encoder={base}"),
                *(f"--images={_PHOTOS.value}", f"--output={output}"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        ours = float(said.split(" images/s")[0].split()[-1].replace(",", ""))
        pairs.append((ours, theirs))
    say("photographs/s of export.embed", pairs)


class Direct:
    """The SavedModel in this process."""

    def __init__(self, path):
        self._model = tf.saved_model.load(path)
        self._function = self._model.signatures["serving_default"]
        self.version = int(os.path.basename(path))

    def __call__(self, photos):
        """Embeddings float32 `[N, F]` of encoded photographs."""
        return self._function(tf.constant(photos))["embedding"].numpy()

    def seconds(self, photos):
        """Seconds of a call; each batch size is run once before."""
        if not hasattr(self, f"_seen_{len(photos)}"):
            setattr(self, f"_seen_{len(photos)}", True)
            self(photos)
        start = time.perf_counter()
        self(photos)
        return time.perf_counter() - start


class BenchmarkedServer:
    """A process of `export.server`, and requests to it."""

    def __init__(self, process, address):
        self._process = process
        self._address = address

    def memory(self):
        """Resident memory of the server process in bytes."""
        return psutil.Process(self._process.pid).memory_info().rss

    async def latencies(self, photos):
        """Seconds of each request, sent one after the other."""
        found = []
        async with self._channel() as predict:
            for photo in photos:
                start = time.perf_counter()
                await predict(request(photo))
                found.append(time.perf_counter() - start)
        return found

    async def embed(self, photos, *, at_once):
        """Embeddings of photographs, with `at_once` concurrent requests."""
        slots = asyncio.Semaphore(at_once)

        async def one(photo):
            async with slots:
                response = await predict(request(photo))
            return tf.make_ndarray(response.outputs["embedding"])[0]

        async with self._channel() as predict:
            return await asyncio.gather(*map(one, photos))

    async def swap(self, base, newest, photos, *, at_once):
        """Publishes a copy of version `newest` under load.

        Returns:
            (seconds until the new version answered, requests answered until
            then, requests failed until then).
        """
        target = os.path.join(base, str(newest + 1))
        draft = os.path.join(base, ".draft")
        shutil.copytree(os.path.join(base, str(newest)), draft)
        counts = {"good": 0, "bad": 0}
        served = asyncio.Event()

        async def client():
            for photo in itertools.cycle(photos):
                if served.is_set():
                    return
                try:
                    response = await predict(request(photo))
                except grpc.RpcError:
                    counts["bad"] += 1
                    continue
                counts["good"] += 1
                if response.model_spec.version.value > newest:
                    served.set()

        async with self._channel() as predict:
            clients = [asyncio.create_task(client()) for _ in range(at_once)]
            await asyncio.sleep(1)
            os.rename(draft, target)
            start = time.perf_counter()
            await served.wait()
            seconds = time.perf_counter() - start
            await asyncio.gather(*clients)
        return seconds, counts["good"], counts["bad"]

    @contextlib.asynccontextmanager
    async def _channel(self):
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            yield stub.Predict


@contextlib.contextmanager
def serving(base):
    """Context manager that runs a `Server`."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "export.server", "--port=-1"),
            *("--rest_api_port=0", f"--model_base_path={base}"),
            f"--file_system_poll_wait_seconds={_POLL_SECONDS.value}",
            # Each request that waits for a batch occupies a thread.
            f"--grpc_max_threads={2 * _CLIENTS.value}",
            *batching(base),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        said = process.stdout.readline()
        yield BenchmarkedServer(
            process, said.rsplit("grpc ")[1].split(",")[0].strip()
        )
    finally:
        process.terminate()
        process.wait()


def batching(base):
    """Server flags for batches of up to `--clients` requests."""
    if not _BATCHING.value:
        return []
    path = os.path.join(base, ".batching.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"max_batch_size {{ value: {_CLIENTS.value} }}\n"
            "max_enqueued_batches { value: 1000 }\n"
        )
    return ["--enable_batching", f"--batching_parameters_file={path}"]


def request(photo):
    """Makes the request for one photograph."""
    found = predict_pb2.PredictRequest()
    found.model_spec.name = "default"
    found.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([photo]))
    return found


def read_photos(folder, count):
    """Reads the first `count` images of a folder; returns their bytes."""
    names = list_images(folder, more_formats=False).images
    found = []
    for name in names[:count]:
        with open(os.path.join(folder, name), "rb") as file:
            found.append(file.read())
    return found


def say(what, pairs, *, scale=1.0):
    """Prints medians of pairs (ours, theirs), and of their ratios."""
    ours, theirs = (statistics.median(x) * scale for x in zip(*pairs))
    ratios = [a / b for a, b in pairs]
    print(
        f"{what}: {ours:.1f} against {theirs:.1f}, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f})",
        flush=True,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "photos"])
    app.run(main)
