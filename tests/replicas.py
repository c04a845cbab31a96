"""Trains a few steps on R replicas and writes what came of it.

`python -m tests.replicas METHOD R OUTPUT.npz`: in a process of its own, since
the number of devices is fixed at the start. One replica normalises its batch in
two parts, as the two replicas do each theirs.
"""

import sys

import numpy as np
import tensorflow as tf

from clsa_tf import distribute
from tests import tiny


def main(method, replicas, output):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    kind = "split" if replicas == 1 else "local"
    config = tiny.config(method, batch_norm=kind, batch_norm_splits=2)
    strategy = distribute.make_strategy("mirrored" if replicas > 1 else "one")
    assert strategy.num_replicas_in_sync == replicas
    with strategy.scope():
        model = tiny.make(config)
    reports = tiny.fit(model, tiny.batches(config, 2))
    arrays = {
        f"report {i} {k}": v
        for i, r in enumerate(reports)
        for k, v in r.items()
    }
    for i, variable in enumerate(model.variables):
        arrays[f"variable {i} {variable.name}"] = variable.numpy()
        if replicas > 1:
            copies = [
                v.numpy() for v in strategy.experimental_local_results(variable)
            ]
            if "moving_" not in variable.name:
                for copy in copies[1:]:
                    np.testing.assert_array_equal(copy, copies[0])
    arrays["queue"] = model.queue.keys.numpy()
    arrays["pointer"] = model.queue.pointer.numpy()
    np.savez(output, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
