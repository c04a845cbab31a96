"""Measures training steps: `python -m benchmarks.steps`.

Measures time and memory of a step by queue size, number of crops, precision and
compiler, and the throughput of one and two worker processes. Each setting runs
in a separate process. The settings of a table take turns.
"""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS
_ONLY = flags.DEFINE_list(
    "only",
    ["queue", "crops", "precision", "accumulation", "passes", "workers"],
    "tables to make: queue (1,024 to 262,144 keys), crops (2 to 11 views), "
    "precision (float32, bfloat16, XLA), accumulation (1 and 8 micro-batches), "
    "passes (micro-batches of SimCLR), workers (1 and 2 processes)",
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of each setting")
_STEPS = flags.DEFINE_integer("steps", 6, "steps timed per turn")
_PHOTOS = flags.DEFINE_string(
    "photos", "", "folder of images for the worker processes"
)
_SETTING = flags.DEFINE_string(
    "setting", "", "one setting as JSON; for processes that this one starts"
)

# A small network on small images, so that the cost of the queue is visible.
_SMALL = {
    "backbone": "resnet18",
    "width": 0.25,
    "stem": "small",
    "batch_size": 64,
    "key_crop": "32:0.2:1",
    "query_crops": "32:0.2:1",
    "strong_crops": "32:0.2:1",
}
_LARGE = {
    "backbone": "resnet50",
    "batch_size": 16,
    "key_crop": "96:0.2:1",
    "query_crops": "96:0.2:1",
    "strong_crops": "96:0.2:1",
    "queue_size": 65_536,
}
_QUEUES = (1024, 4096, 16_384, 65_536, 262_144)
_SIZES = (64, 56, 48, 40, 32)  # px, in the proportions of the published crops


def main(argv):
    """Prints the tables in `--only`."""
    del argv
    if _SETTING.value:
        print(json.dumps(measure(json.loads(_SETTING.value))))
        return
    tables = {
        "queue": queue,
        "crops": crops,
        "precision": precision,
        "accumulation": accumulation,
        "passes": passes,
    }
    for name in _ONLY.value:
        if name == "workers":
            workers()
        else:
            table(name, tables[name]())


def queue():
    """Settings with queues of different sizes."""
    return {f"{k:,} keys": _SMALL | {"queue_size": k} for k in _QUEUES}


def crops():
    """Settings with different numbers of views.

    Each has one key and equally many weak and strong queries, except that two
    views are MoCo's, without a strong one.
    """
    common = {k: v for k, v in _SMALL.items() if "crop" not in k} | {
        "queue_size": 16_384,
        "key_crop": "64:0.2:1",
    }
    found = {"2 views": common | {"query_crops": "64:0.2:1", "method": "moco"}}
    for count in range(1, 6):
        views = ",".join(f"{size}:0.2:1" for size in _SIZES[:count])
        found[f"{1 + 2 * count} views"] = common | {
            "query_crops": views,
            "strong_crops": views,
        }
    return found


def precision():
    """Settings of one step of ResNet-50 at 96 px in different precisions."""
    return {
        "float32": _LARGE,
        "mixed_bfloat16": _LARGE | {"precision": "mixed_bfloat16"},
        "float32, XLA": _LARGE | {"jit_compile": "true"},
    }


def accumulation():
    """Settings of one batch, whole and with gradient accumulation."""
    whole = _LARGE | {"batch_size": 64}
    return {
        "64 images at once": whole,
        "8 micro-batches of 8": whole | {"accumulation_steps": 8},
    }


def passes():
    """As `accumulation`, for a method with negatives in the batch (SimCLR)."""
    whole = {
        "method": "simclr",
        "backbone": "resnet50",
        "batch_size": 64,
        "crop": "96:0.2:1",
    }
    return {
        "SimCLR, 64 images at once": whole,
        "8 micro-batches of 8": whole | {"accumulation_steps": 8},
        "256 images, 32 of 8": whole
        | {"batch_size": 256, "accumulation_steps": 32},
    }


def table(title, settings):
    """Measures settings in turns; prints medians and ratios."""
    found = {name: [] for name in settings}
    for _, name in itertools.product(range(_ROUNDS.value), settings):
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.steps",
                f"--steps={_STEPS.value}",
                f"--setting={json.dumps(settings[name])}",
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        found[name].append(json.loads(result.stdout.splitlines()[-1]))
    print(f"\n{title}: s per step (range), ratio; peak memory MiB, ratio")
    first = None
    for name, results in found.items():
        seconds = [r["seconds"] for r in results]
        memory = statistics.median(r["mebibytes"] for r in results)
        middle = statistics.median(seconds)
        first = first or (middle, memory)
        spread = f"({min(seconds):.3f}-{max(seconds):.3f})"
        print(
            f"{name:<26} {middle:7.3f} {spread} {middle / first[0]:6.2f}   "
            f"{memory:7.0f} {memory / first[1]:6.2f}",
            flush=True,
        )


def measure(setting):
    """Measures median seconds per step and peak memory in MiB of a setting."""
    import numpy as np
    import tensorflow as tf

    import clsa_tf.config
    from clsa_tf.methods.base import RunInfo
    from clsa_tf.training import auto
    from clsa_tf.training.run import make_method

    config = clsa_tf.config.parse([f"--{k}={v}" for k, v in setting.items()])
    config = config.replace(batch_norm="local")  # as the figures were measured
    config = auto.resolve(config, images=10**6, replicas=1)
    method = make_method(config, 0.01, RunInfo())
    rng = np.random.default_rng(0)
    batch = {}
    for view in method.views(config.options):
        if view.shuffle:
            rows = np.arange(config.batch_size, dtype=np.int32)
            batch[f"{view.name}_order"] = rows
        shape = [config.batch_size, view.size, view.size, 3]
        batch[view.name] = np.uint8(rng.integers(0, 256, shape))
    dataset = tf.data.Dataset.from_tensors(batch).repeat()
    times = []
    clock = tf.keras.callbacks.LambdaCallback(
        on_batch_end=lambda *_, **__: times.append(time.perf_counter())
    )
    method.fit(
        dataset, steps_per_epoch=_STEPS.value + 2, verbose=0, callbacks=[clock]
    )
    seconds = np.diff(times)[1:]  # the first step compiles
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": float(np.median(seconds)), "mebibytes": peak / 1024}


def workers():
    """Measures images/s of one process on one and two cores, and of two."""
    from tests import cluster  # to start worker processes

    cores = sorted(os.sched_getaffinity(0))[:2]
    each = [cores[:1], cores[1:]]
    settings = {
        "1 process, 1 core": ("split", [cores[:1]]),
        "1 process, 2 cores": ("split", [cores]),
        "2 processes, 1 core each": ("split", each),
        "... batch_norm=sync": ("sync", each),
    }
    found = {name: [] for name in settings}
    for _, name in itertools.product(range(_ROUNDS.value), settings):
        batch_norm, cores_of = settings[name]
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                "clsa_tf.train",
                "--flagfile=configs/quickstart.flags",
                f"--dataset=folder:{_PHOTOS.value}",
                "--labels=none",
                f"--workdir={folder}/run",
                f"--batch_norm={batch_norm}",
                "--total_epochs=2",
                "--log_steps=5",
            ]
            processes = cluster.start(
                arguments,
                workers=len(cores_of),
                log=f"{folder}/log",
            )
            for process, mine in zip(processes, cores_of):
                os.sched_setaffinity(process.pid, mine)
            status = cluster.wait(processes, timeout=1800)
            assert not any(status), open(f"{folder}/log.0").read()
            with open(f"{folder}/run/metrics.jsonl") as file:
                lines = [json.loads(line) for line in file]
        found[name].append(
            statistics.median(x["images_per_second"] for x in lines[1:])
        )
    print("\nworkers: images/s (range), ratio")
    first = None
    for name, speeds in found.items():
        middle = statistics.median(speeds)
        first = first or middle
        print(
            f"{name:<26} {middle:7.1f} ({min(speeds):.1f}-{max(speeds):.1f}) "
            f"{middle / first:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
