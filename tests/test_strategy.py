"""The choice of devices; test_distribution.py tests their results."""

import json
import types

import pytest
import tensorflow as tf

from clsa_tf.distributed import strategy
from clsa_tf.errors import UserError
from clsa_tf.training import config_checks
from tests import tiny

CLUSTER = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}
VARIABLES = ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_auto_is_one_device_on_this_machine():
    found = strategy.make_strategy("auto")
    assert isinstance(found, tf.distribute.OneDeviceStrategy)
    workers = strategy.Workers(found)
    assert workers.chief and workers.count == 1
    assert workers.maximum(15) == 15
    workers.check_same(anything=3)


@pytest.mark.parametrize(
    "variables, tpu, gpus, expected",
    [
        ({}, "", 1, "one"),
        ({}, "", 8, "mirrored"),
        ({}, "local", 0, "tpu"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "", 8, "multiworker"),
        # A script outside of any step, or a step of one task.
        ({"SLURM_JOB_ID": "7"}, "", 0, "one"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "", 8, "mirrored"),
        (
            {
                "TF_CONFIG": json.dumps(
                    {"cluster": CLUSTER, "task": {"type": "worker", "index": 1}}
                )
            },
            "",
            0,
            "multiworker",
        ),
    ],
)
def test_auto_follows_the_environment(
    monkeypatch, variables, tpu, gpus, expected
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: [kind] * gpus
    )
    assert strategy._suggested(tpu) == expected


@pytest.mark.parametrize(
    "name, tpu, tf_config, words",
    [
        ("two", "", "", ["'two'", "mirrored"]),
        ("mirrored", "", "", ["GPUs", "--strategy=one"]),
        ("multiworker", "", "", ["TF_CONFIG", "SLURM", "neither"]),
        ("tpu", "", "", ["a TPU called 'local'", "--tpu"]),
        ("auto", "nowhere", "", ["a TPU called 'nowhere'"]),
        ("one", "local", "", ["--strategy=tpu", "--tpu=local"]),
        ("auto", "", "{cluster", ["like {", "'{cluster'"]),
        ("auto", "", '{"cluster": {"worker": ["a:1"]}}', ['"task"']),
        (
            "multiworker",
            "",
            json.dumps(
                {"cluster": CLUSTER, "task": {"type": "worker", "index": 2}}
            ),
            ['"index": 2', "unset TF_CONFIG"],
        ),
        (
            "multiworker",
            "",
            json.dumps(
                {"cluster": CLUSTER, "task": {"type": "worker", "index": 0}}
            ),
            ["before TensorFlow computes"],
        ),
    ],
)
def test_wrong_choices_are_rejected(monkeypatch, name, tpu, tf_config, words):
    monkeypatch.setenv("TF_CONFIG", tf_config)
    tf.zeros([])  # too late for workers to connect
    with pytest.raises(UserError) as error:
        strategy.make_strategy(name, tpu=tpu)
    message = str(error.value)
    assert message.startswith("Expected") and "received" in message
    for word in words:
        assert word in message, message


class Replicas:
    """Takes the place of a strategy of `count` replicas."""

    def __init__(self, count, device="CPU"):
        self.num_replicas_in_sync = count
        self.extended = self
        self.worker_devices = [f"/device:{device}:{i}" for i in range(count)]


@pytest.mark.parametrize(
    "replicas, changes, words",
    [
        (3, {}, ["divisible", "--batch_size=", "3 replica(s)"]),
        (2, {"accumulation_steps": 3}, ["--accumulation_steps=3"]),
        (
            4,
            {"batch_norm": "split", "batch_norm_splits": 2},
            ["--batch_norm_splits", "4 replica(s)"],
        ),
        (
            1,
            {
                "batch_norm": "split",
                "batch_norm_splits": 2,
                "accumulation_steps": 4,
            },
            ["--batch_norm_splits", "--accumulation_steps=4"],
        ),
        (2, {"batch_norm": "sync", "accumulation_steps": 2}, ["micro-batch"]),
        (2, {"jit_compile": True}, ["--jit_compile", "2 CPUs"]),
    ],
)
def test_batches_that_do_not_suit_the_devices_are_rejected(
    replicas, changes, words
):
    config = tiny.config(**changes)
    with pytest.raises(UserError) as error:
        config_checks.check_batch(config, Replicas(replicas))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "replicas, device, changes",
    [
        (8, "GPU", {"jit_compile": True}),
        (4, "CPU", {"batch_norm": "split", "batch_norm_splits": 4}),
        (1, "CPU", {"batch_norm": "sync", "accumulation_steps": 2}),
    ],
)
def test_batches_that_suit_the_devices_are_accepted(replicas, device, changes):
    config_checks.check_batch(
        tiny.config(**changes), Replicas(replicas, device)
    )


@pytest.mark.parametrize(
    "data_service, local, words",
    [
        ("grpc://localhost:1", "", "no --data_service with --tpu=pod"),
        ("", "which Python reads;", "on the hosts of the TPU, received photos"),
    ],
)
def test_images_that_the_hosts_of_a_tpu_cannot_read_are_rejected(
    data_service, local, words
):
    config = tiny.config(tpu="pod", data_service=data_service)
    with pytest.raises(UserError, match=words):
        config_checks.check_remote_hosts(
            config, types.SimpleNamespace(name="photos", local=local)
        )


@pytest.mark.parametrize(
    "method, batch_norm, accepted",
    [
        ("moco", "local", False),
        ("moco", "sync", True),
        ("simclr", "local", True),
    ],
)
def test_xla_on_several_machines_is_rejected_with_exchanged_images(
    method, batch_norm, accepted, monkeypatch
):
    monkeypatch.setattr(config_checks, "num_loaders", lambda _: 2)
    config = tiny.config(method, batch_norm=batch_norm, jit_compile=True)
    if accepted:
        config_checks.check_batch(config, Replicas(8, "GPU"))
    else:
        with pytest.raises(UserError, match="--jit_compile.* 2 machines"):
            config_checks.check_batch(config, Replicas(8, "GPU"))


@pytest.mark.parametrize(
    "kind, message, lost",
    [
        (tf.errors.UnavailableError, "anything", True),
        (tf.errors.InternalError, "Collective ops is aborted by: …", True),
        (tf.errors.InternalError, "Connection reset by peer", True),
        (tf.errors.InternalError, "Blas GEMM launch failed", False),
        (tf.errors.InternalError, "failed to enable peer access", False),
        (tf.errors.InternalError, "no file grpc_websocket.so", False),
        (tf.errors.InvalidArgumentError, "Connection reset by peer", False),
    ],
)
def test_lost_workers_are_recognised_by_class_and_message(kind, message, lost):
    assert strategy.is_lost_worker(kind(None, None, message)) == lost
