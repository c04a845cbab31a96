"""Measures tf.data services: `python -m benchmarks.data_service --photos=DIR`.

Compares a process that makes the views itself with one that gets them from one
or two services on the same machine, each on one core. They take turns on the
same photographs. Needs two cores. `--rounds` is as in `benchmarks/views.py`.
"""

import os
import subprocess
import sys

from absl import app, flags

from benchmarks import views as lib

FLAGS = flags.FLAGS
_FLAGFILE = flags.DEFINE_string(
    "recipe", "configs/clsa.flags", "flagfile whose views are made"
)
_COUNT = 48  # batches per turn; several times the number prefetched


def start(core):
    """Starts a service on one core; returns (process, its address)."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "clsa_tf.data_service"),
            *("--expose", "--host=localhost", "--port=0"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    # Set before the process starts threads, which inherit it.
    os.sched_setaffinity(process.pid, [core])
    return process, process.stdout.readline().split()[2].rstrip(";")


def main(argv):
    """Starts the services, measures and prints a table."""
    del argv
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    FLAGS["cores"].value = len(cores)
    started = [start(core) for core in cores]
    try:
        compare([address for _, address in started], cores)
    finally:
        for process, _ in started:
            process.terminate()
            process.wait()


def compare(addresses, cores):
    """Measures the loaders in turns and prints the report."""
    from clsa_tf.data.service_client import Services

    views = lib.views_of(_FLAGFILE.value)
    folder = FLAGS.photos
    alone = lib.pipeline(views, folder, count=_COUNT)

    def pinned(load, cores):
        def run():
            lib.pin(cores)
            return load()

        return run

    loaders = {
        "no service, 1 core": pinned(alone, cores[:1]),
        "no service, 2 cores": pinned(alone, cores),
    }
    for count in (1, 2):
        services = Services(tuple(addresses[:count]))
        load = lib.pipeline(views, folder, count=_COUNT, services=services)
        # The process that receives the batches may use both cores.
        loaders[f"{count} service(s), 1 core each"] = pinned(load, cores)
    lib.report(
        f"{_FLAGFILE.value}, tf.data services",
        lib.take_turns(loaders),
        list(loaders)[:3],
    )


if __name__ == "__main__":
    app.run(main)
