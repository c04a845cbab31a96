"""Trains a few steps on R replicas, in each way that has to come out equal.

`python -m tests.replicas METHOD PHOTOS OUTPUT R CASES`: in a process of its
own, since the number of devices is fixed at the start; with `TF_CONFIG` it is
one of several workers of R replicas each. A directory of checkpoints and
metrics is left for each of CASES (names of `CASES`, between commas) that is
possible there.
"""

import hashlib
import os
import pathlib
import sys

import tensorflow as tf

from clsa_tf import train
from clsa_tf.distributed.strategy import make_strategy
from clsa_tf.training import run as run_lib
from tests import runs, tiny, toy

STEPS = 4
# Parts of the global batch with statistics of their own: as many as the
# largest number of replicas.
PARTS = 4

CASES = {
    "split": dict(batch_norm="split", batch_norm_splits=PARTS),
    "accumulated": dict(
        batch_norm="split", batch_norm_splits=PARTS, accumulation_steps=2
    ),
    "local": dict(batch_norm="local"),
    "sync": dict(batch_norm="sync"),
}


# The rate of `tiny` moves the weights by more than is compared. With longer
# gradients, smaller ones do, and SimCLR takes another temperature than 0.1:
# differences by rounding would double with every step on so few images.
SPECIAL = {
    "simclr": dict(labels="none", base_lr=0.003, temperature=0.5),
    "byol": dict(labels="none", base_lr=0.03),
    "cacr_mocov3": dict(labels="none", base_lr=0.03),
    "toy": dict(holdout=0.0, knn_epochs=0, image_size=16, base_lr=0.03),
}


def possible(case, replicas):
    """Whether `case` can equal the same global batch on other replicas."""
    return {
        "split": True,
        "accumulated": 2 * replicas <= PARTS,
        "local": replicas == PARTS,  # to be compared with "split"
        "sync": True,
    }[case]


def main(method, photos, output, replicas, cases):
    toy.register()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    # Smooth: where an activation is 0 but for rounding, a ReLU cuts it off with
    # some numbers of replicas and not with others.
    tf.keras.layers.ReLU.call = lambda _, x: tf.nn.silu(x)
    kind = "mirrored" if replicas > 1 else "one"
    if "TF_CONFIG" in os.environ:
        kind = "multiworker"
    strategy = make_strategy(kind)
    # Several strategies in one process disturb each other's collectives.
    run_lib.make_strategy = lambda *_, **__: strategy
    for case in cases.split(","):
        if possible(case, strategy.num_replicas_in_sync):
            workdir = pathlib.Path(output, case)
            runs.leave_out_pictures(workdir)
            model = train.run(
                tiny.config(
                    method,
                    dataset=f"folder:{photos}",
                    workdir=str(workdir),
                    total_epochs=2,
                    log_steps=1,
                    checkpoint_steps=1,
                    keep_checkpoints=9,
                    **SPECIAL.get(method, {"labels": "none"}) | CASES[case],
                )
            )
            worker = strategy.extended.worker_devices[0].count("task:1")
            (workdir / f"digests-{worker}.txt").write_text(
                "\n".join(digests(strategy, model))
            )


def digests(strategy, model):
    """A digest per replica of this process: of its queue and its weights."""
    variables = list(model.trainable_variables)
    for queue in tiny.queues(model):
        variables += queue.variables
    copies = [strategy.experimental_local_results(v) for v in variables]
    found = []
    for copy in zip(*copies):
        values = b"".join(value.numpy().tobytes() for value in copy)
        found.append(hashlib.sha256(values).hexdigest())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5])
