"""Write the configuration to deploy exported models on TensorFlow Serving.

    python -m export.deploy --model_base_path=models/photos --output=deploy

The command writes the configuration files of the server, and files that start
the official image with Docker Compose and on Kubernetes. Run it again with
other versions to move the labels. See export/README.md.
"""

import os
import re
import typing

from absl import flags

from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.files import draft_directory, publish
from clsa_tf.options.flags import define_path, require
from export.deployment import exported_versions
from export.deployment.deployment_checks import check_deployment
from export.deployment.rendering import IMAGES, DeploymentSettings, render
from export.serving.config_files import read_model_configs

# Name of a Kubernetes Service, a DNS label.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


class DeployResult(typing.NamedTuple):
    """Result of `deploy`.

    Attributes:
        files: names of the files that changed, sorted.
        labels: label -> version, as written to the configuration.
        waiting: label -> version of labels that cannot be moved yet, because
            the server has to load the version first; call `deploy` again after
            that.
        batching: whether the server batches requests of several clients.
    """

    files: list
    labels: dict
    waiting: dict
    batching: bool


def deploy(model_base_path, output, settings, *, stable=0, canary=0):
    """Writes a deployment, or updates the files that differ.

    Args:
        model_base_path: directory of the versions.
        output: directory to write to; created if missing.
        settings: `DeploymentSettings`.
        stable: version with the label `stable`; 0: the newest one.
        canary: version with the label `canary`; 0: none.

    Returns:
        `DeployResult`.

    Raises:
        UserError: a version is missing or incomplete, or a name or number is
            not allowed.
    """
    _check_name(settings.model_name)
    stable = stable or exported_versions.newest(model_base_path)
    if canary == stable:
        raise UserError(
            f"Expected two different versions, received --stable={stable} and "
            f"--canary={canary}; change one or omit --canary."
        )
    wanted = {"stable": stable} | ({"canary": canary} if canary else {})
    models = [
        exported_versions.read(model_base_path, version)
        for version in wanted.values()
    ]
    batching = _choose_batching(settings, models)
    _make_directory(output)
    versions, labels = _next_step(output, settings.model_name, wanted)
    files = render(
        settings,
        os.path.abspath(model_base_path),
        versions=versions,
        labels=labels,
        batching=batching,
    )
    return DeployResult(
        files=_publish(files, output),
        labels=labels,
        waiting={k: v for k, v in wanted.items() if labels.get(k) != v},
        batching=batching,
    )


def _check_name(name):
    if not _NAME.fullmatch(name):
        raise UserError(
            "Expected a model name of at most 63 lower-case letters, digits "
            "and hyphens that starts with a letter (a rule of Kubernetes), "
            f"received {name!r}; set --model_name."
        )


def _make_directory(directory):
    if os.path.isdir(directory):
        return
    try:
        os.makedirs(directory)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(
            f"Expected a directory as --output, received {directory}, which is "
            "a file or below one; choose another --output."
        ) from e
    os.chmod(directory, 0o755)  # readable for the container's user


def _choose_batching(settings, models):
    """Returns whether to batch; raises `UserError` if a model prevents it."""
    if settings.batching == "off" or (
        settings.batching == "auto"
        and not all(model.marks_bad_images for model in models)
    ):
        return False
    for model in models:
        low = exported_versions.warmup_images(model)
        high = exported_versions.max_images(model)
        if not low <= settings.max_batch_size <= high:
            raise UserError(
                f"Expected a --max_batch_size from {low}, the largest warm-up "
                f"request, to {high}, the model's limit, for {model.path}, "
                f"received {settings.max_batch_size}; change it or set "
                "--batching=off."
            )
    return True


def _next_step(output, name, wanted):
    """Returns the versions to load and the labels of the next step to `wanted`.

    A server does not move a label to a version that it has not loaded, and
    then rejects the whole models.config. Therefore one call adds the version,
    and the next call moves the label.

    Source: tensorflow_serving/model_servers/server_core.cc,
    ServerCore::UpdateModelVersionLabelMap.
    """
    path = os.path.join(output, "models.config")
    loaded, labels = set(), {}
    if os.path.exists(path):
        for model in read_model_configs(path):
            if model.name == name:
                loaded = set(model.model_version_policy.specific.versions)
                labels = dict(model.version_labels)
    moved = {
        version
        for label, version in wanted.items()
        if labels.get(label, version) != version
    }
    if moved <= loaded:
        return sorted(set(wanted.values())), wanted
    return sorted(loaded | set(wanted.values())), labels


def _publish(files, output):
    """Checks the files, then atomically replaces each one that differs."""
    changed = []
    with draft_directory(output) as draft:
        for name, text in files.items():
            with open(os.path.join(draft, name), "w", encoding="utf-8") as file:
                file.write(text)
                # Readable for the container's user, with any umask.
                os.fchmod(file.fileno(), 0o644)
        check_deployment(draft)
        for name, text in files.items():
            target = os.path.join(output, name)
            if not _contains(target, text):
                publish(os.path.join(draft, name), target)
                changed.append(name)
    return sorted(changed)


def _contains(path, text):
    try:
        with open(path, "rb") as file:
            return file.read() == text.encode()
    except FileNotFoundError:
        return False


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path(
        "model_base_path",
        None,
        "directory of the model's versions",
        flag_values,
    )
    define_path(
        "output",
        None,
        "directory to write to; servers poll its files",
        flag_values,
    )
    flags.DEFINE_string(
        "model_name",
        "",
        "name of the model for clients; empty: the last part of "
        "--model_base_path",
        flag_values,
    )
    flags.DEFINE_integer(
        "stable",
        0,
        "version with the label stable; 0: the newest one",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "canary",
        0,
        "version with the label canary; 0: none",
        lower_bound=0,
        flag_values=flag_values,
    )
    for name, minimum, text in (
        ("max_batch_size", 1, "images in the largest batch"),
        (
            "batch_timeout_micros",
            0,
            "microseconds to wait until a batch is full",
        ),
        ("clients", 1, "requests in progress at the same time"),
        ("cpus", 1, "CPU cores of the container"),
        ("memory_mb", 256, "memory of the container, in MiB"),
    ):
        default = DeploymentSettings._field_defaults[name]
        flags.DEFINE_integer(
            name, default, text, lower_bound=minimum, flag_values=flag_values
        )
    flags.DEFINE_enum(
        "accelerator", "cpu", IMAGES, "device to compute on", flag_values
    )
    flags.DEFINE_enum(
        "batching",
        "auto",
        ["auto", "on", "off"],
        "batch the requests of several clients. With models exported with "
        "--bad_images=error, a bad image fails its whole batch; auto: on only "
        "for models exported with --bad_images=nan",
        flag_values,
    )
    require(flag_values, "model_base_path", "output")


def main():
    """Reads the flags, writes the deployment and prints the result."""
    values = flags.FLAGS
    base = values.model_base_path
    settings = DeploymentSettings(
        values.model_name or os.path.basename(os.path.abspath(base)),
        **{k: getattr(values, k) for k in DeploymentSettings._field_defaults},
    )
    result = deploy(
        base,
        values.output,
        settings,
        stable=values.stable,
        canary=values.canary,
    )
    labels = ", ".join(f"{k} = {v}" for k, v in result.labels.items())
    changed = ", ".join(result.files) or "no changes"
    print(f"written and checked: {values.output} ({changed})")
    batching = "on" if result.batching else "off"
    if settings.batching == "auto" and not result.batching:
        batching += " (a bad image would fail the requests of other clients: "
        batching += "export with --bad_images=nan)"
    print(f"labels: {labels}; batching: {batching}")
    apply = f"kubectl apply --filename={values.output}/kubernetes.yaml"
    if "docker-compose.yml" in result.files:
        compose = f"docker compose --file={values.output}/docker-compose.yml"
        print(f"to (re)start it: {compose} up --detach --wait, or {apply}")
    elif result.files:
        print(f"running servers read the files; on Kubernetes after {apply}")
    for label, version in result.waiting.items():
        print(
            f"{label} = {version} is pending: servers first load version "
            f"{version}; run the same command again when /v1/models/"
            f"{settings.model_name}/versions/{version} is AVAILABLE."
        )


if __name__ == "__main__":
    launch.launch(main, define_flags)
