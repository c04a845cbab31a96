"""Hosts of a remote TPU read the images: no Python may be in the pipeline.

Not tried on a TPU.
"""

import subprocess
import sys

import pytest
import tensorflow as tf
from PIL import Image

from tests import exports
from tests.remote_host import batches


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(exports.noise(11, size=20)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    (folder / "damaged.jpg").write_bytes(exports.encode(image, "JPEG")[:300])
    return folder


@pytest.mark.parametrize("remote", [False, True])
def test_only_local_pipelines_contain_python(remote, photos):
    serialized = batches(photos, remote)._as_serialized_graph().numpy()
    graph = tf.compat.v1.GraphDef.FromString(serialized)
    ops = {node.op for node in graph.node}
    ops |= {n.op for f in graph.library.function for n in f.node_def}
    assert "DecodeImage" in ops or "DecodePng" in ops
    assert ("PyFunc" in ops) == (not remote)


@pytest.mark.slow
def test_a_remote_host_makes_the_same_batches(photos):
    """A damaged file is replaced there without a report.

    A TensorFlow server in another process takes the place of the host.
    """
    result = subprocess.run(
        [sys.executable, "-m", "tests.remote_host", photos],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    devices, *same = result.stdout.splitlines()
    assert "'key'" in devices and "job:worker" in devices
    assert len(same) == 6 and all(x.endswith(" True") for x in same)
