"""A global batch gives equal steps on any number of devices and processes."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import pillow_chain
from clsa_tf import methods
from clsa_tf.training import metrics_log
from tests import cluster, replicas, tiny

# Name -> (worker processes, replicas of each).
TOPOLOGIES = {
    "1": (1, 1),
    "2": (1, 2),
    "4": (1, 4),
    "2 workers": (2, 1),
    "2 workers of 2": (2, 2),
}
# The slowest one. Methods that are not in `QUICK` have one case there.
LARGEST = "2 workers of 2"


# The fixtures take a minute: all tests of this file in one process.
pytestmark = pytest.mark.xdist_group("distribution")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(36):  # two batches of 16 per epoch
        image = pillow_chain.photograph(40, 37, seed=i)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def train_all(jobs, topologies, photos, folder):
    """Runs all jobs of `tests.replicas` in each topology.

    One process per worker runs all of them, so that TensorFlow is imported and
    its layers are converted once. Two topologies of one process run at a time.

    Args:
        jobs: list of `"method:case"` or `"method:case:run"`.
        topologies: names of `TOPOLOGIES`.
        photos: folder of images, for jobs that are whole runs.
        folder: where to write.

    Returns:
        topology -> (directory with METHOD/CASE, log of its processes).
    """
    found, started = {}, []
    for name in topologies:
        workers, each = TOPOLOGIES[name]
        directory = folder / name.replace(" ", "-")
        found[name] = directory, pathlib.Path(f"{directory}.log.0")
        arguments = ["tests.replicas", photos, directory, each, *jobs]
        started.append(
            cluster.start(arguments, workers=workers, log=f"{directory}.log")
        )
        if workers > 1 or len(started) == 2:
            for processes in started:
                cluster.wait(processes, timeout=1200)
            started = []
    for processes in started:
        cluster.wait(processes, timeout=1200)
    return found


def state(workdir, step):
    """Returns a checkpoint's variables, except those of clock and saver."""
    reader = tf.train.load_checkpoint(f"{workdir}/checkpoints/step-{step}")
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if not name.startswith(("seconds", "_CHECKPOINTABLE", "save_counter"))
    }


def assert_same_state(got, expected, *, excluded=(), share=1e-4):
    assert got.keys() == expected.keys() and len(expected) > 30
    for name, value in expected.items():
        if not any(word in name for word in excluded):
            # Sums in another order differ; each step amplifies this a little.
            scale = np.max(np.abs(value)) if value.size else 0.0
            if "moving_mean" in name:
                variance = name.replace("moving_mean", "moving_variance")
                deviation = np.sqrt(np.max(expected[variance]))
                # After a normalisation the mean is 0 up to rounding.
                scale = deviation if scale < 1e-6 * deviation else scale
            np.testing.assert_allclose(
                got[name], value, rtol=0, atol=share * scale, err_msg=name
            )


def assert_same_reports(got, expected):
    got, expected = metrics_log.read(got), metrics_log.read(expected)
    assert [e["step"] for e in got] == [1, 2, 3, 4]
    for one, two in zip(got, expected):
        assert one.keys() == two.keys() >= {"loss", "spread", "rank"}
        for name in one.keys() - {"images_per_second"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6)


def assert_same_copies(workdir):
    """Every replica of every worker holds the same queue and weights."""
    digests = [path.read_text() for path in workdir.glob("digests-*.txt")]
    copies = [line for text in digests for line in text.splitlines()]
    assert copies and len(set(copies)) == 1


def assert_same_on_all(found, method, cases):
    """Compares the jobs of a method in all topologies with one replica.

    Losses, gradients, queue, weights and both networks' statistics. Gradients:
    the momentum of the first checkpoint is the gradient plus L2.
    """
    compared = 0
    for name, (folder, log) in found.items():
        replicas_of = TOPOLOGIES[name][0] * TOPOLOGIES[name][1]
        for case in cases:
            if not replicas.possible(case, replicas_of):
                continue
            own = folder / method / case
            assert (own / "metrics.jsonl").exists(), log.read_text()[-5000:]
            # The same parts of the batch are normalised together in all cases
            # except "sync".
            reference = found["1"][0] / method
            reference /= "sync" if case == "sync" else "split"
            # Each micro-batch moves the running statistics, which training
            # does not read.
            excluded = ("moving_",) if case == "accumulated" else ()
            for step in (1, replicas.STEPS):
                assert_same_state(
                    state(own, step), state(reference, step), excluded=excluded
                )
            assert_same_reports(own, reference)
            assert_same_copies(own)
            compared += 1
    assert compared


# Shuffled keys and a queue; statistics of the whole batch, and outputs that are
# gathered with their gradient.
QUICK = {"clsa": ["split"], "simclr": ["sync"]}


def published_case(name):
    """The published kind of batch statistics of a method."""
    kind = methods.load(name).METHOD.batch_statistics
    return {"parts": "split", "whole": "sync"}[kind]


def cases_in(topology, name):
    if topology == LARGEST and name not in QUICK:
        return [published_case(name)]
    return list(replicas.CASES)


@pytest.fixture(scope="module")
def quick(photos, tmp_path_factory):
    jobs = [f"{m}:{case}" for m, cases in QUICK.items() for case in cases]
    folder = tmp_path_factory.mktemp("quick")
    return train_all(jobs, ("1", "2"), photos, folder)


@pytest.mark.parametrize("method", QUICK)
def test_two_replicas_equal_one(method, quick):
    assert_same_on_all(quick, method, QUICK[method])


@pytest.fixture(scope="module")
def everything(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")

    def train_in(*topologies):
        jobs = [
            f"{name}:{case}"
            for name in methods.names()
            for case in cases_in(topologies[0], name)
        ]
        return train_all(jobs, topologies, photos, folder)

    others = [name for name in TOPOLOGIES if name != LARGEST]
    return train_in(*others) | train_in(LARGEST)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
def test_any_topology_equals_one_replica(method, everything):
    for topology in everything:
        found = {name: everything[name] for name in ("1", topology)}
        assert_same_on_all(found, method, cases_in(topology, method))


def one_per_kind_of_loader():
    """Returns the first method with each combination of shuffled views."""
    found = {}
    for name in methods.names():
        views = methods.load(name).METHOD.views(tiny.config(name).options)
        kind = frozenset((view.shuffle, view.both_orders) for view in views)
        found.setdefault(kind, name)
    return list(found.values())


@pytest.mark.slow
def test_whole_runs_are_equal(photos, tmp_path):
    """Here the loader makes each worker's part of the batch.

    Each method has its published kind of batch statistics.
    """
    cases = {name: published_case(name) for name in one_per_kind_of_loader()}
    assert len(cases) >= 3
    jobs = [f"{method}:{case}:run" for method, case in cases.items()]
    found = train_all(jobs, ("1", "2 workers"), photos, tmp_path)
    for method, case in cases.items():
        assert_same_on_all(found, method, [case])
