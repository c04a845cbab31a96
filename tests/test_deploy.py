"""Configuration files for TensorFlow Serving."""

import http.server
import json
import os
import pathlib
import shutil
import string
import subprocess
import threading
import typing

import grpc
import pytest
import tensorflow as tf
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clsa_tf.errors import UserError
from export.deploy import check_deployment, deploy
from export.deployment.deployment_checks import FLAGS
from export.deployment.rendering import DeploymentSettings, batch_sizes
from export.model import warmup_requests
from export.serving.config_files import (
    read_batching_parameters,
    read_model_configs,
)
from tests import runs
from tests.server import ServerProcess, predict
from tests.server import request as server_request

PHOTOS = DeploymentSettings("photos")


class Rows(tf.Module):
    """A small model with an encoder's signature."""

    def __init__(self, marks):
        super().__init__()
        self._marks = marks
        self._scale = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def image_bytes(self, image_bytes):
        lengths = tf.cast(tf.strings.length(image_bytes), tf.float32)
        rows = {"embedding": lengths[:, tf.newaxis] * self._scale}
        return rows | ({"valid": lengths > 0} if self._marks else {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Small models like those of `--bad_images=error` and `=nan`."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("error", "nan"):
        module = Rows(kind == "nan")
        path = str(folder / kind)
        tf.saved_model.save(module, path, signatures=module.image_bytes)
        card = {"limits": {"batch_images": 64}}
        (folder / kind / "model_card.json").write_text(json.dumps(card))
        warmup_requests.write(path, image_size=8)
    return folder


@pytest.fixture
def base(saved, tmp_path):
    """Five versions; in version 5 a bad image fails its whole request."""
    base = tmp_path / "models" / "photos"
    for version in range(1, 6):
        kind = "error" if version == 5 else "nan"
        shutil.copytree(saved / kind, base / str(version))
    return base


class Config(typing.NamedTuple):
    """Contents of a models.config."""

    name: str
    base_path: str
    versions: tuple
    labels: dict


def models_config(folder):
    (model,) = read_model_configs(str(folder / "models.config"))
    return Config(
        model.name,
        model.base_path,
        tuple(model.model_version_policy.specific.versions),
        dict(model.version_labels),
    )


def compose(folder):
    document = yaml.safe_load((folder / "docker-compose.yml").read_text())
    return document["services"]["serving"]


def interpolated(text):
    """Interpolates as Compose: shell variables, `$$` for a dollar sign."""
    return string.Template(text).substitute()


def kubernetes(folder):
    text = (folder / "kubernetes.yaml").read_text()
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def pod(folder):
    return kubernetes(folder)["Deployment"]["spec"]["template"]["spec"]


def arguments(folder):
    """Returns the flags of the server, which all files have to share."""
    found = compose(folder)["command"]
    (container,) = pod(folder)["containers"]
    assert container["args"] == found
    return dict(one[2:].split("=") for one in found)


def test_an_export_is_deployed_and_the_files_can_be_read(exported, tmp_path):
    output = tmp_path / "deploy"
    result = runs.call(
        runs.command(
            "export.deploy",
            f"--model_base_path={exported.base}",
            "--model_name=photos",
            f"--output={output}",
        )
    )
    assert not result.stderr
    assert "stable = 1" in result.stdout
    assert "--bad_images=nan" in result.stdout  # because batching is off
    assert f"docker compose --file={output}/docker-compose.yml up" in (
        result.stdout
    )
    model = models_config(output)
    assert (model.name, model.versions) == ("photos", (1,))
    assert (model.labels, model.base_path) == ({"stable": 1}, "/models/photos")
    assert sorted(os.listdir(output)) == [
        "batching_parameters.txt",
        "docker-compose.yml",
        "kubernetes.yaml",
        "models.config",
        "monitoring.config",
    ]
    check_deployment(str(output))


def test_batching_parameters_follow_the_clients(base, tmp_path):
    settings = DeploymentSettings(
        "photos", max_batch_size=48, clients=100, cpus=6
    )
    deploy(str(base), str(tmp_path / "d"), settings, stable=4)
    read = read_batching_parameters(
        str(tmp_path / "d" / "batching_parameters.txt")
    )
    assert read == {
        "max_batch_size": 48,
        "batch_timeout_micros": 1000,
        "max_enqueued_batches": 100,
        "num_batch_threads": 6,
        "allowed_batch_sizes": batch_sizes(48),
    }
    flags = arguments(tmp_path / "d")
    assert int(flags["grpc_max_threads"]) > 100
    assert int(flags["rest_api_num_threads"]) > 100


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 32, 33, 48, 100, 1000])
def test_less_than_a_third_of_a_batch_is_padding(largest):
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] == largest
    for images in range(1, largest + 1):
        padded = min(size for size in sizes if size >= images)
        assert 3 * (padded - images) < padded


@pytest.mark.parametrize(
    "choice, stable, canary, batching",
    [
        ("auto", 4, 0, True),
        ("auto", 5, 0, False),
        ("auto", 4, 5, False),
        ("on", 5, 0, True),
        ("off", 4, 0, False),
    ],
)
def test_auto_batches_only_if_a_bad_image_fails_no_other_request(
    base, tmp_path, choice, stable, canary, batching
):
    settings = PHOTOS._replace(batching=choice)
    written = deploy(
        str(base), str(tmp_path), settings, stable=stable, canary=canary
    )
    assert written.batching == batching
    flags = arguments(tmp_path)
    # TensorFlow Serving does not start with only the second of these flags.
    assert ("enable_batching" in flags) == batching
    assert ("batching_parameters_file" in flags) == batching
    assert (tmp_path / "batching_parameters.txt").exists()


@pytest.mark.parametrize("size", [3, 65])
def test_batch_sizes_outside_a_model_s_limits_are_rejected(
    base, tmp_path, size
):
    # 4 is the largest request of the warm-up, 64 the limit of the card.
    warmup_requests.write(str(base / "4"), image_size=8, batch_sizes=(1, 4))
    settings = PHOTOS._replace(max_batch_size=size)
    with pytest.raises(
        UserError, match=f"from 4, .* to 64, .* received {size}"
    ):
        deploy(str(base), str(tmp_path), settings, stable=4)
    deploy(str(base), str(tmp_path), settings, stable=5)


def test_flags_exist_and_include_the_necessary_ones(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS, stable=4)
    flags = arguments(tmp_path)
    assert set(flags) <= FLAGS
    assert flags["max_num_load_retries"] == "0"
    # Without it a server with labels does not start at all.
    assert flags["allow_version_labels_for_unavailable_models"] == "true"
    assert flags["enable_profiler"] == "false"
    assert flags["enable_grpc_healthcheck_service"] == "true"
    for name in ("model_config_file_poll_wait_seconds", "port"):
        assert int(flags[name]) > 0


def test_the_embedded_server_accepts_the_same_arguments(base, tmp_path):
    shutil.rmtree(base / "4" / "assets.extra")  # has other signatures
    deploy(str(base), str(tmp_path), PHOTOS, stable=4)
    config = tmp_path / "models.config"
    config.write_text(config.read_text().replace("/models/photos", str(base)))
    flags = arguments(tmp_path) | {"port": "-1", "rest_api_port": "-1"}
    with ServerProcess(
        *(
            f"--{name}={value.replace('/config', str(tmp_path))}"
            for name, value in flags.items()
        )
    ) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            assert health.Check(request, timeout=60).status == 1  # SERVING
        message = server_request({"image_bytes": [b"x"]}, model="photos")
        message.model_spec.version_label = "stable"
        assert predict(server.grpc, message)[0].version.value == 4
        assert "error" not in server.errors()


def test_compose_file_restricts_access(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS)
    service = compose(tmp_path)
    assert service["ports"] == [f"127.0.0.1:{p}:{p}" for p in (8500, 8501)]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(volume["read_only"] for volume in service["volumes"])
    assert "privileged" not in service
    assert service["deploy"]["resources"]["limits"]["memory"] == "4096m"


def test_kubernetes_file_restricts_access(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS)
    kinds = kubernetes(tmp_path)
    assert kinds["Service"]["spec"]["type"] == "ClusterIP"
    spec = pod(tmp_path)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"] == "4096Mi"
    mounts = {one["name"]: one for one in container["volumeMounts"]}
    assert mounts["models"]["readOnly"] and mounts["config"]["readOnly"]
    claim = spec["volumes"][0]["persistentVolumeClaim"]
    assert claim == {"claimName": "photos-models", "readOnly": True}
    assert kinds["PersistentVolumeClaim"]["metadata"]["name"] == "photos-models"
    selector = kinds["Deployment"]["spec"]["selector"]["matchLabels"]
    assert kinds["Service"]["spec"]["selector"] == selector
    # Pods get updates of the ConfigMap only if no single file is mounted.
    assert "subPath" not in mounts["config"]


def test_a_gpu_is_requested_only_for_accelerator_gpu(base, tmp_path):
    for accelerator, image in (("cpu", "2.15.1"), ("gpu", "2.15.1-gpu")):
        settings = PHOTOS._replace(accelerator=accelerator)
        deploy(str(base), str(tmp_path), settings)
        requested = accelerator == "gpu"
        (container,) = pod(tmp_path)["containers"]
        for found in (compose(tmp_path), container):
            assert found["image"] == f"tensorflow/serving:{image}"
        reserved = compose(tmp_path)["deploy"]["resources"]
        assert ("reservations" in reserved) == requested
        limits = container["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == requested


def test_names_that_are_yaml_keywords_stay_strings(base, tmp_path):
    for name in ("true", "null", "on"):
        deploy(str(base), str(tmp_path), PHOTOS._replace(model_name=name))
        for document in kubernetes(tmp_path).values():
            labels = document["metadata"]["labels"]
            assert labels == {"app.kubernetes.io/name": name}
        assert kubernetes(tmp_path)["Service"]["metadata"]["name"] == name
        text = (tmp_path / "docker-compose.yml").read_text()
        assert yaml.safe_load(text)["name"] == name


def test_a_path_may_contain_special_characters(base, tmp_path):
    strange = tmp_path / "a: b'\"#${HOME} \\ é" / "photos"
    shutil.copytree(base, strange)
    deploy(str(strange), str(tmp_path / "d"), PHOTOS)
    mounted = compose(tmp_path / "d")["volumes"][0]
    assert interpolated(mounted["source"]) == str(strange)
    assert mounted["target"] == "/models/photos"


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers 200 for the one available label, and otherwise 404."""

    def do_GET(self):  # noqa: N802, the name that http.server calls
        is_available = self.path == "/v1/models/photos/labels/stable/metadata"
        self.send_response(200 if is_available else 404)
        self.end_headers()

    def log_message(self, *_):
        """Logs nothing."""


def test_the_health_check_fails_unless_the_model_is_served(base, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever).start()

    def healthy(name):
        deploy(str(base), str(tmp_path), PHOTOS._replace(model_name=name))
        kind, *command = compose(tmp_path)["healthcheck"]["test"]
        assert kind == "CMD"
        port = str(server.server_port)
        command = [interpolated(x).replace("8501", port) for x in command]
        return subprocess.run(command, timeout=60, capture_output=True)

    try:
        assert healthy("photos").returncode == 0
        assert healthy("others").returncode != 0
    finally:
        server.shutdown()
        server.server_close()
    assert healthy("photos").returncode != 0


def test_moving_labels_writes_no_other_files(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS, stable=3)

    def identities():
        return {p.name: p.stat().st_ino for p in tmp_path.glob("*.*")}

    before = identities()
    again = deploy(str(base), str(tmp_path), PHOTOS, stable=3)
    assert again.files == [] and identities() == before
    moved = deploy(str(base), str(tmp_path), PHOTOS, stable=3, canary=4)
    assert moved.files == ["kubernetes.yaml", "models.config"]
    after = identities()
    assert {n for n in before if after[n] != before[n]} == set(moved.files)
    assert models_config(tmp_path).labels == {"stable": 3, "canary": 4}
    assert models_config(tmp_path).versions == (3, 4)
    text = kubernetes(tmp_path)["ConfigMap"]["data"]["models.config"]
    assert text == (tmp_path / "models.config").read_text()


def test_a_label_waits_until_its_version_is_loaded(base, tmp_path):
    """Otherwise a server would neither move the label nor load the version."""
    deploy(str(base), str(tmp_path), PHOTOS, stable=3, canary=2)
    first = deploy(str(base), str(tmp_path), PHOTOS, stable=3, canary=4)
    assert first.waiting == {"canary": 4}
    model = models_config(tmp_path)
    assert model.labels == {"stable": 3, "canary": 2}
    assert model.versions == (2, 3, 4)
    second = deploy(str(base), str(tmp_path), PHOTOS, stable=3, canary=4)
    assert second.waiting == {}
    model = models_config(tmp_path)
    assert (model.labels, model.versions) == (
        {"stable": 3, "canary": 4},
        (3, 4),
    )
    # Between loaded versions labels move at once: forwards and back.
    for stable, canary in ((4, 3), (3, 4)):
        swapped = deploy(
            str(base), str(tmp_path), PHOTOS, stable=stable, canary=canary
        )
        assert swapped.waiting == {}
        assert models_config(tmp_path).labels["stable"] == stable


def test_a_polling_reader_never_sees_an_incomplete_file(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS, stable=3, canary=4)
    seen, failed, over = set(), [], threading.Event()

    def poll():
        while not over.is_set():
            try:
                labels = models_config(tmp_path).labels
                seen.add((labels["stable"], labels["canary"]))
            except (UserError, OSError, KeyError) as e:
                failed.append(e)

    reader = threading.Thread(target=poll)
    reader.start()
    for stable, canary in 10 * ((4, 3), (3, 4)):
        deploy(str(base), str(tmp_path), PHOTOS, stable=stable, canary=canary)
    over.set()
    reader.join()
    assert not failed and seen == {(3, 4), (4, 3)}
    assert not list(tmp_path.glob(".draft*"))


def test_files_are_readable_by_everyone(base, tmp_path):
    before = os.umask(0o077)
    try:
        deploy(str(base), str(tmp_path / "new" / "d"), PHOTOS)
    finally:
        os.umask(before)
    for path in (tmp_path / "new" / "d").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "new" / "d").stat().st_mode & 0o777 == 0o755


def test_the_newest_version_is_stable_by_default(base, tmp_path):
    (base / "007").mkdir()  # not the spelling of a version
    (base / ".draft-9").mkdir()
    (base / "notes").mkdir()
    assert deploy(str(base), str(tmp_path), PHOTOS).labels == {"stable": 5}


@pytest.mark.parametrize(
    "name", ["", "Photos", "my_photos", "a/b", "a:b", "-a", "a-", "7", "a" * 64]
)
def test_names_that_cannot_be_served_are_rejected(base, tmp_path, name):
    with pytest.raises(UserError, match=f"{name!r}.*--model_name"):
        deploy(str(base), str(tmp_path), DeploymentSettings(name))
    assert not list(tmp_path.glob("*.config"))


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"stable": 9}, r" 1, 2, 3, 4, 5\), received 9;"),
        ({"stable": 3, "canary": 9}, r" 1, 2, 3, 4, 5\), received 9;"),
        ({"stable": 3, "canary": 3}, "--stable=3 and --canary=3"),
        ({"canary": 5}, "--stable=5 and --canary=5"),
    ],
)
def test_missing_versions_are_rejected(base, tmp_path, versions, message):
    with pytest.raises(UserError, match=message):
        deploy(str(base), str(tmp_path / "d"), PHOTOS, **versions)


@pytest.mark.parametrize("part", ["saved_model.pb", "variables"])
def test_an_incomplete_version_is_rejected_by_name(base, tmp_path, part):
    path = base / "5" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"{base}/5 .*{part}"):
        deploy(str(base), str(tmp_path / "d"), PHOTOS)
    deploy(str(base), str(tmp_path / "d"), PHOTOS, stable=4)


def test_models_that_cannot_be_loaded_are_rejected(base, tmp_path):
    path = base / "4" / "saved_model.pb"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"saved_model.pb.*{base}/4:"):
        deploy(str(base), str(tmp_path), PHOTOS, stable=4)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"serving_default.*{base}/4 "):
        deploy(str(base), str(tmp_path), PHOTOS, stable=4)


def test_missing_folders_are_rejected(base, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/none: No such file"):
        deploy(str(tmp_path / "none"), str(tmp_path / "d"), PHOTOS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--model_base_path.*{tmp_path}/empty"):
        deploy(str(tmp_path / "empty"), str(tmp_path / "d"), PHOTOS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--output.*{tmp_path}/file"):
        deploy(str(base), str(tmp_path / "file"), PHOTOS)


def test_invalid_settings_are_not_published(base, tmp_path):
    deploy(str(base), str(tmp_path), PHOTOS, stable=3)
    wrong = PHOTOS._replace(batch_timeout_micros=-1)
    with pytest.raises(UserError, match="batch_timeout_micros.* -1;"):
        deploy(str(base), str(tmp_path), wrong, stable=4)
    assert models_config(tmp_path).labels == {"stable": 3}
    check_deployment(str(tmp_path))


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("models.config", "name", "nome", "ModelServerConfig"),
        ("models.config", "versions: 4", "versions: 3", r"\[3\].*'stable': 4"),
        ("batching_parameters.txt", "sizes: 32", "sizes: 31", r"32.*\b31\b"),
        ("monitoring.config", "enable: true", "enable: false", "enable: true"),
        ("monitoring.config", "path", "paths", "MonitoringConfig"),
        (
            "docker-compose.yml",
            "enable_profiler",
            "enable_profile",
            "--enable_profile;",
        ),
        ("docker-compose.yml", "--enable_batching=true", "--port=1", "--port;"),
        (
            "docker-compose.yml",
            "      - --enable_batching=true\n",
            "",
            "--enable_batching.*--batching_parameters_file",
        ),
        (
            "docker-compose.yml",
            "/config/models",
            "/settings/models",
            "=/settings/models.config;",
        ),
        ("docker-compose.yml", "services:", "services: [", "YAML"),
        ("docker-compose.yml", "  serving:", "  server:", r"'serving'\)"),
        ("kubernetes.yaml", "- --port=8500", "- --ports=8500", "--ports;"),
        ("kubernetes.yaml", "versions: 4", "versions: 3", "models.config"),
        ("kubernetes.yaml", "kind: Deployment", "kind: Pod", r"'Deployment'\)"),
    ],
)
def test_invalid_files_are_found(base, tmp_path, name, old, new, message):
    deploy(str(base), str(tmp_path), PHOTOS, stable=4)
    path = pathlib.Path(tmp_path / name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        check_deployment(str(tmp_path))
    assert f"{path}" in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=name):
        check_deployment(str(tmp_path))
