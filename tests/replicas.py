"""Takes a few steps on R replicas, in each configuration to compare.

`python -m tests.replicas PHOTOS OUTPUT R METHOD:CASE[:run] ...` is a process of
its own, because the number of devices is fixed at the start. With `TF_CONFIG`
it is one of several workers with R replicas each. Each job writes checkpoints
and metrics to `OUTPUT/METHOD/CASE`. A job that ends with `:run` is a whole
`train.run` on the photographs. The others feed the training step directly,
which takes a third of the time.
"""

import hashlib
import json
import os
import pathlib
import sys
import traceback

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from clsa_tf import train
from clsa_tf.distributed.strategy import make_strategy
from clsa_tf.training import run as run_lib
from clsa_tf.training.checkpoint import Checkpoints
from tests import runs, tiny, toy

STEPS = 4
# Parts of the global batch with statistics of their own: the largest number of
# replicas.
PARTS = 4

CASES = {
    "split": dict(batch_norm="split", batch_norm_splits=PARTS),
    "accumulated": dict(
        batch_norm="split", batch_norm_splits=PARTS, accumulation_steps=2
    ),
    "local": dict(batch_norm="local"),
    "sync": dict(batch_norm="sync"),
}


# The learning rate of `tiny` moves the weights by more than the tolerance. With
# larger gradients a smaller rate suffices. SimCLR has a temperature of 0.5
# instead of 0.1: with so few images, rounding differences would otherwise
# double with every step.
SPECIAL = {
    "simclr": dict(base_lr=0.003, temperature=0.5),
    "byol": dict(base_lr=0.03),
    "cacr_mocov3": dict(base_lr=0.03),
    "toy": dict(base_lr=0.03),
}
# The toy method needs labels.
DATA = {"toy": dict(holdout=0.0, knn_epochs=0, image_size=16)}


def possible(case, replicas):
    """Whether `case` can give the same result on other replicas."""
    return {
        "split": True,
        "accumulated": 2 * replicas <= PARTS,
        "local": replicas == PARTS,  # to be compared with "split"
        "sync": True,
    }[case]


def main(photos, output, replicas, jobs):
    toy.register()
    if not any(job.endswith(":run") for job in jobs):
        # The steps are compared, not TensorFlow's rewriting of their graphs,
        # which takes a sixth of the time. Whole runs use it.
        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": True}
        )
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    make_activations_smooth()
    kind = "mirrored" if replicas > 1 else "one"
    if "TF_CONFIG" in os.environ:
        kind = "multiworker"
        use_all_cpus(replicas)
    strategy = make_strategy(kind)
    # Several strategies in one process disturb each other's collectives.
    run_lib.make_strategy = lambda *_, **__: strategy
    failed = 0
    for job in jobs:
        method, case, *whole = job.split(":")
        if not possible(case, strategy.num_replicas_in_sync):
            continue
        workdir = pathlib.Path(output, method, case)
        workdir.mkdir(parents=True, exist_ok=True)
        changes = SPECIAL.get(method, {}) | CASES[case]
        try:
            if whole:
                model = whole_run(method, changes, photos, workdir)
            else:
                model = steps(method, changes, strategy, workdir)
        except Exception:  # the tests of other jobs continue
            if kind == "multiworker":
                raise  # otherwise the other worker waits
            traceback.print_exc()
            failed = 1
            continue
        worker = strategy.extended.worker_devices[0].count("task:1")
        (workdir / f"digests-{worker}.txt").write_text(
            "\n".join(digests(strategy, model))
        )
    sys.exit(failed)


def make_activations_smooth():
    """Replaces the ReLUs of this process by SiLUs.

    Where an activation is 0 except for rounding, a ReLU cuts it off with some
    numbers of replicas and not with others.
    """
    tf.keras.layers.ReLU.call = lambda _, x: tf.nn.silu(x)


def use_all_cpus(count):
    """Makes a worker's logical CPUs replicas, as its GPUs would be.

    `MultiWorkerMirroredStrategy` uses one CPU of each worker.
    """

    def local_devices(_, resolver, worker_device):
        del resolver
        devices = [f"{worker_device}/device:CPU:{i}" for i in range(count)]
        return tuple(devices), "CPU"

    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    extended._initialize_local_devices = local_devices


def whole_run(method, changes, photos, workdir):
    runs.leave_out_pictures(workdir)
    return train.run(
        tiny.config(
            method,
            backbone="one_block",
            dataset=f"folder:{photos}",
            workdir=str(workdir),
            total_epochs=2,
            log_steps=1,
            checkpoint_steps=1,
            keep_checkpoints=9,
            **DATA.get(method, dict(labels="none")) | changes,
        )
    )


def steps(method, changes, strategy, workdir):
    """`STEPS` of Keras' `fit`, fed as the loader feeds it."""
    config = tiny.config(
        method, backbone="one_block", workdir=str(workdir), **changes
    )
    batches = list(tiny.batches(config, STEPS).as_numpy_iterator())
    with strategy.scope():
        model = tiny.make(config)
        chief = strategy.extended.should_checkpoint
        checkpoints = Checkpoints(model, str(workdir), keep=9, chief=chief)
    views = model.views(config.options)

    def of_worker(context):
        parts = [part for b in batches for part in share(b, views, context)]
        stacked = {k: np.stack([part[k] for part in parts]) for k in parts[0]}
        return tf.data.Dataset.from_tensor_slices(stacked).repeat()

    lines = []

    def keep(step, logs):
        lines.append(json.dumps({"step": step + 1} | logs))
        if step + 1 in (1, STEPS):
            checkpoints.save()

    model.fit(
        strategy.distribute_datasets_from_function(of_worker),
        steps_per_epoch=STEPS,
        verbose=0,
        callbacks=[tf.keras.callbacks.LambdaCallback(on_batch_end=keep)],
    )
    if chief:
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return model


def share(batch, views, context):
    """Returns the parts of a global batch for each replica of a worker.

    Like `training_batches`: a single worker permutes the rows of shuffled
    views, several do not. `tiny.batches` has permuted them unless the view is
    needed in both orders.
    """
    batch = dict(batch)
    alone = context.num_input_pipelines == 1
    for view in views:
        if view.shuffle:
            rows, order = batch[view.name], batch[f"{view.name}_order"]
            if view.both_orders and alone:
                batch[f"{view.name}_shuffled"] = rows[order]
            elif not view.both_orders and not alone:
                batch[view.name] = rows[np.argsort(order)]
    replicas = context.num_replicas_in_sync
    split = {k: np.split(rows, replicas) for k, rows in batch.items()}
    each = replicas // context.num_input_pipelines
    first = context.input_pipeline_id * each
    return [
        {k: parts[i] for k, parts in split.items()}
        for i in range(first, first + each)
    ]


def digests(strategy, model):
    """Returns a digest of queue and weights per replica of this process."""
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
    main(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4:])
