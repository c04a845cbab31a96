"""One global batch, whatever the number of devices and processes."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import pillow_chain
from clsa_tf import methods
from clsa_tf.training import metrics_log
from tests import cluster, replicas

# Name -> (worker processes, replicas of each).
TOPOLOGIES = {
    "1": (1, 1),
    "2": (1, 2),
    "4": (1, 4),
    "2 workers": (2, 1),
    "2 workers of 2": (2, 2),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(36):  # two batches of 16 per epoch
        image = pillow_chain.photograph(40, 37, seed=i)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def train_all(method, topologies, photos, folder, cases=replicas.CASES):
    """Trains in each topology; returns topology -> directory of its cases."""
    found = {}
    for name in topologies:
        workers, each = TOPOLOGIES[name]
        found[name] = folder / name.replace(" ", "-")
        arguments = ["tests.replicas", method, photos, found[name], each]
        arguments.append(",".join(cases))
        log = folder / f"{found[name].name}.log"
        processes = cluster.start(arguments, workers=workers, log=log)
        for i, status in enumerate(cluster.wait(processes, timeout=600)):
            text = pathlib.Path(f"{log}.{i}").read_text()
            assert status == 0, f"{name}, worker {i}:\n{text[-5000:]}"
    return found


def state(workdir, step):
    """All that is in a checkpoint but what the clock and the saver say."""
    reader = tf.train.load_checkpoint(f"{workdir}/checkpoints/step-{step}")
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if not name.startswith(("seconds", "_CHECKPOINTABLE", "save_counter"))
    }


def assert_same_state(got, expected, *, but=()):
    assert got.keys() == expected.keys() and len(expected) > 30
    for name, value in expected.items():
        if not any(word in name for word in but):
            # Sums in another order, amplified a little by each step.
            scale = np.max(np.abs(value)) if value.size else 0.0
            if "moving_mean" in name:
                variance = name.replace("moving_mean", "moving_variance")
                deviation = np.sqrt(np.max(expected[variance]))
                # Behind a normalisation it is 0 up to rounding.
                scale = deviation if scale < 1e-6 * deviation else scale
            np.testing.assert_allclose(
                got[name], value, rtol=0, atol=1e-4 * scale, err_msg=name
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


QUICK = ("1", "2")
REST = ("4", "2 workers", "2 workers of 2")
# Those that the quick tests take to two processes: one exchanges shuffled keys,
# the other one rows with gradient. (Slow: all, such as cacr_moco, which does
# both.)
PROCESSES = {"clsa": ("split", "sync"), "simclr": ("split", "accumulated")}


def comparisons():
    """A method, topologies and cases that one test compares."""
    for method in methods.names():
        # As it is published.
        parts = methods.load(method).METHOD.batch_statistics == "parts"
        quick = (QUICK, ("split" if parts else "sync",))
        if method in PROCESSES:
            quick = ((*QUICK, "2 workers"), PROCESSES[method])
        yield pytest.param(method, *quick, id=method)
        rest = ((*QUICK, *REST), tuple(replicas.CASES))
        slow = pytest.mark.slow
        yield pytest.param(method, *rest, id=f"{method}-rest", marks=slow)


@pytest.mark.parametrize("method, topologies, cases", list(comparisons()))
def test_any_topology_equals_one_replica(
    method, topologies, cases, photos, tmp_path
):
    """Losses, gradients, queue, weights and both networks' statistics.

    Gradients: the momentum of the first checkpoint is the gradient plus L2.
    """
    found = train_all(method, topologies, photos, tmp_path, cases)
    compared = 0
    for folder in found.values():
        for case in sorted(path.name for path in folder.iterdir()):
            # The same parts of the batch are normalised together in all cases
            # but "sync".
            reference = found["1"] / ("sync" if case == "sync" else "split")
            # Each micro-batch moves the running statistics, which training
            # does not read.
            but = ("moving_",) if case == "accumulated" else ()
            for step in (1, replicas.STEPS):
                assert_same_state(
                    state(folder / case, step), state(reference, step), but=but
                )
            assert_same_reports(folder / case, reference)
            assert_same_copies(folder / case)
            compared += 1
    # Of all four cases three are possible in each topology.
    assert compared == min(len(cases), 3) * len(topologies)
