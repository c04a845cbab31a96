"""Makes batches on another host, as for the hosts of a remote TPU.

`python -m tests.remote_host PHOTOS` starts a TensorFlow server in another
process, in place of the host. It prints which views equal those made locally.
"""

import multiprocessing
import socket
import sys

import tensorflow as tf

from clsa_tf.augment.views import View
from clsa_tf.data.open import open_source
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.unreadable import UnreadableImages

VIEWS = (View("query", 8, 0.2, 1.0), View("key", 8, 0.2, 1.0, shuffle=True))


def serve(port):
    cluster = tf.train.ClusterSpec({"worker": [f"localhost:{port}"]})
    tf.distribute.Server(cluster, job_name="worker", task_index=0).join()


def batches(photos, remote):
    """The training batches of a folder, of four images."""
    return training_batches(
        open_source(f"folder:{photos}", labels="none"),
        VIEWS,
        batch_size=4,
        seed=0,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.5, remote=remote),
    )


def main(photos):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=[port], daemon=True)
    process.start()
    tf.config.experimental_connect_to_host(f"grpc://localhost:{port}")
    with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
        # Three batches contain every photograph.
        remote_batches = list(batches(photos, remote=True).take(3))
        print({k: v.device.split("/")[1] for k, v in remote_batches[0].items()})
    local_batches = list(batches(photos, remote=False).take(3))
    for view in VIEWS:
        for one, other in zip(remote_batches, local_batches):
            same = one[view.name].numpy() == other[view.name].numpy()
            print(view.name, same.all())


if __name__ == "__main__":
    main(sys.argv[1])
