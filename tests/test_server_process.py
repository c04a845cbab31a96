"""A real server process: its start, changes, stop and flags."""

import concurrent.futures
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import requests
from absl import flags
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import prediction_service_pb2_grpc

from clsa_tf.errors import UserError
from export import server as server_lib
from tests import runs
from tests.server import (
    ServerProcess,
    command,
    models_config,
    outcome,
    predict,
    request,
    write_toy,
)

TOY = "/v1/models/toy"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Base path of a model with one version."""
    base = tmp_path_factory.mktemp("toys")
    write_toy(base / "1")
    return base


def wait_for(seconds):
    return request({"seconds": np.float32([seconds])}, model="toy")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_requests_finish(toys, number):
    with ServerProcess(
        "--model_name=toy",
        f"--model_base_path={toys}",
        "--enable_grpc_healthcheck_service",
    ) as process:
        session = requests.Session()  # stays connected
        assert session.get(f"{process.rest}/metrics").status_code == 200
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = pool.submit(predict, process.grpc, wait_for(3.0))
            by_rest = pool.submit(
                requests.post,
                f"{process.rest}{TOY}:predict",
                json={"instances": [2.5]},
                timeout=60,
            )
            time.sleep(1.0)  # they are running
            with grpc.insecure_channel(process.grpc) as channel:
                # A client that watches does not delay the stop.
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest()
                )
                assert next(watch).status == 1  # SERVING
                process.send(number)
                assert next(watch).status == 2  # NOT_SERVING
            while is_open(process.grpc) or is_open(process.rest[7:]):
                time.sleep(0.05)
            assert not pending.done() and not by_rest.done()
            assert pending.result()[1]["seconds"] == 3.0
            assert by_rest.result().json() == {"predictions": [2.5]}
        assert process.wait() == 0
        assert process.errors() == ""


def is_open(address):
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), 10).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.slow
def test_a_stop_does_not_wait_for_ever(toys):
    with ServerProcess(
        "--model_name=toy", f"--model_base_path={toys}", "--drain_seconds=0.5"
    ) as process:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = pool.submit(outcome, process, wait_for(20.0))
            time.sleep(0.5)
            start = time.monotonic()
            assert process.end() == 0
            assert time.monotonic() - start < 15
            assert pending.result() == "UNAVAILABLE"


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(toys):
    with ServerProcess(
        "--model_name=toy", f"--model_base_path={toys}"
    ) as process:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = pool.submit(outcome, process, wait_for(20.0))
            time.sleep(0.5)
            process.send(signal.SIGTERM)
            time.sleep(0.5)
            assert process.is_alive()
            process.send(signal.SIGTERM)
            assert process.wait() == 128 + signal.SIGTERM
            assert pending.result() == "UNAVAILABLE"


@pytest.mark.slow
def test_too_many_connections_are_rejected(toys):
    with ServerProcess(
        "--model_name=toy",
        f"--model_base_path={toys}",
        "--max_concurrent_requests=4",
    ) as process:

        def ask(_):
            url = f"{process.rest}{TOY}:predict"
            return requests.post(url, json={"instances": [0.5]}, timeout=60)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = [answer.status_code for answer in pool.map(ask, range(16))]
        assert set(found) == {200, 503}
        assert ask(0).status_code == 200


@pytest.mark.slow
def test_a_thousand_concurrent_requests_are_answered(toys):
    """With batching and few threads."""
    with (
        ServerProcess(
            "--model_name=toy", f"--model_base_path={toys}", "--enable_batching"
        ) as process,
        grpc.insecure_channel(process.grpc) as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        calls = [
            stub.Predict.future(wait_for(i / 1e6), timeout=120)
            for i in range(1000)
        ]
        for i, call in enumerate(calls):
            found = call.result().outputs["seconds"].float_val
            assert found == [np.float32(i / 1e6)]


@pytest.mark.slow
def test_a_version_added_later_is_served(toys, tmp_path):
    with subprocess.Popen(
        command(f"--model_base_path={tmp_path / 'base'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=runs.environment(),
    ) as process:
        line = ""
        while f"default, such as {tmp_path / 'base'}/1" not in line:
            line = process.stderr.readline()
            assert line
        shutil.copytree(toys / "1", tmp_path / "3")
        (tmp_path / "base").mkdir()
        (tmp_path / "3").rename(tmp_path / "base" / "3")
        assert "serving default version 3" in process.stdout.readline()
        process.terminate()
        assert process.wait(60) == 0


def test_a_new_version_takes_over_without_a_failure(toys, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(toys, base)
    with ServerProcess(
        "--model_name=toy", f"--model_base_path={base}"
    ) as process:
        over = threading.Event()

        def ask():
            versions = []
            while not over.is_set():
                spec, _ = predict(process.grpc, wait_for(0.02))
                versions.append(spec.version.value)
            return versions

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(ask) for _ in range(4)]
            shutil.copytree(toys / "1", tmp_path / "2")
            (tmp_path / "2").rename(base / "2")
            process.wait_for_error("loaded version 2 of toy")
            process.wait_for_error("unloaded version 1 of toy")
            over.set()
            for future in pending:  # raises errors
                found = future.result()
                assert found == sorted(found)
                assert found[0] == 1 and found[-1] == 2


def test_a_server_without_models_that_does_not_poll_ends(tmp_path):
    result = runs.call(
        command(
            f"--model_base_path={tmp_path}", "--file_system_poll_wait_seconds=0"
        ),
        status=1,
    )
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("error: ")
    assert f"'default': {tmp_path} " in line
    assert "--file_system_poll_wait_seconds" in line


@pytest.mark.slow
def test_changes_of_the_file_of_models_take_effect(toys, tmp_path):
    config = tmp_path / "models.config"
    config.write_text(models_config(one=(toys, "")))
    with ServerProcess(
        f"--model_config_file={config}",
        "--model_config_file_poll_wait_seconds=1",
    ) as process:
        config.write_text("this is no configuration")
        process.wait_for_error(f"{config} ")
        config.write_text(models_config(one=(toys, ""), two=(toys, "")))
        assert process.next_served()[0] == "two"
        for name in ("one", "two"):
            message = request({"seconds": np.float32([0.0])}, model=name)
            assert predict(process.grpc, message)[0].name == name


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"garbage")
    flags = (f"--model_base_path={tmp_path}", "--max_num_load_retries=0")
    lines = runs.call(command(*flags), status=1).stderr.splitlines()
    assert any("'default': version 1 " in line for line in lines[:-1])
    assert f"'default': {tmp_path} " in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_in_use_is_an_error(toys, flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = runs.call(
            command(f"--model_base_path={toys}", f"--{flag}={port}"), status=1
        )
    (line,) = result.stderr.splitlines()
    assert f"127.0.0.1:{port}:" in line and "--rest_api_port" in line


def read(*arguments):
    values = flags.FlagValues()
    server_lib.define_flags(values)
    values(["server", *arguments])
    return server_lib.read_flags(values)


@pytest.mark.parametrize(
    "arguments, value",
    [
        ([], "--model_base_path or --model_config_file"),
        (["--model_base_path=/a", "--enable_profiler"], "--noenable_profiler"),
        (
            ["--model_base_path=/a", "--model_config_file=/b"],
            "one of --model_base_path and --model_config_file",
        ),
        (["--model_config_file=/nothing/here"], "/nothing/here"),
        (["--model_base_path=/a", "--model_name=a/b"], "'a/b'"),
        (
            [
                "--model_base_path=/a",
                "--batching_parameters_file=/b",
            ],
            "--noenable_batching",
        ),
        (
            ["--model_base_path=/a", "--port=0", "--rest_api_port=0"],
            "--port and --rest_api_port",
        ),
        (["--model_base_path=/a", "--port=81", "--rest_api_port=81"], " 81 "),
    ],
)
def test_contradictory_flags_are_rejected(arguments, value):
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert value in str(caught.value)


@pytest.mark.parametrize("flag", ["--port=65536", "--grpc_max_threads=0"])
def test_impossible_numbers_are_rejected(flag):
    with pytest.raises(flags.IllegalFlagValueError):
        read("--model_base_path=/a", flag)


def test_the_path_of_a_single_version_is_rejected(toys, tmp_path):
    with pytest.raises(UserError) as caught:
        read(f"--model_base_path={toys}/1/")
    text = str(caught.value)
    assert f"{toys}/1," in text and text.endswith(f" {toys}.")
    config = models_config(toy=(toys / "1", ""))
    (tmp_path / "models.config").write_text(config)
    with pytest.raises(UserError, match=f"'toy'.*{toys}/1,"):
        read(f"--model_config_file={tmp_path}/models.config")
    shutil.copytree(toys / "1", tmp_path / "exported")
    with pytest.raises(UserError, match=f" {tmp_path}/exported/1 "):
        read(f"--model_base_path={tmp_path}/exported")
    assert read(f"--model_base_path={toys}")[0][0].base_path == str(toys)


def test_flags_become_settings(tmp_path):
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/m" }')
    configs, batching, paths = read(
        "--model_base_path=/a/b",
        "--model_name=photos",
        f"--monitoring_config_file={monitoring}",
    )
    assert [(c.name, c.base_path) for c in configs] == [("photos", "/a/b")]
    assert batching is None and paths == ["/metrics", "/m"]
    monitoring.write_text("prometheus_config { enable: true }")
    found = read(
        "--model_base_path=/a",
        "--enable_batching",
        f"--monitoring_config_file={monitoring}",
    )
    assert found[1]["max_batch_size"] == 1000
    assert found[2] == ["/metrics", "/monitoring/prometheus/metrics"]
    monitoring.write_text("prometheus { }")
    with pytest.raises(UserError, match="MonitoringConfig"):
        read("--model_base_path=/a", f"--monitoring_config_file={monitoring}")


def test_missing_packages_are_named():
    code = (
        "import sys, runpy; sys.modules['uvicorn'] = None; "
        "runpy.run_module('export.server', run_name='__main__')"
    )
    error = runs.call([sys.executable, "-c", code], status=1).stderr
    assert "uvicorn" in error and "pip install 'clsa_tf[serve]'" in error
    assert "Traceback" not in error
