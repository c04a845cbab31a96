"""Writes what TensorFlow Serving needs around exported models.

    python -m export.deploy --model_base_path=models/photos --output=deploy

Writes its settings, and files that start the official image with Docker Compose
and on Kubernetes. Run again with other labels it moves them. See
export/README.md.
"""

import os
import re
import shutil
import tempfile
import typing

from absl import flags

from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.options.flags import define_path, require
from export.deployment import published
from export.deployment.checks import check_deployment
from export.deployment.files import IMAGES, Settings, render
from export.serving.settings import read_model_configs

# A Kubernetes Service's name, which is a DNS label.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


class Written(typing.NamedTuple):
    """What `deploy` did.

    Attributes:
        files: names of the files that changed, sorted.
        labels: label -> version, as servers will have it now.
        waiting: label -> version of those that could not be moved yet, because
            a server has to load the version first; call `deploy` again then.
        batching: whether requests of several clients are computed together.
    """

    files: list
    labels: dict
    waiting: dict
    batching: bool


def deploy(model_base_path, output, settings, *, stable=0, canary=0):
    """Writes the deployment, or changes what differs of one.

    Args:
        model_base_path: directory of the versions.
        output: directory to write to; created when missing.
        settings: `Settings`.
        stable: version with that label; 0: the newest.
        canary: version with that label; 0: none.

    Returns:
        `Written`.

    Raises:
        UserError: a version is missing or incomplete, or a name or number
            cannot be used.
    """
    _check_name(settings.model_name)
    stable = stable or published.newest(model_base_path)
    if canary == stable:
        raise UserError(
            f"Expected two versions, received {stable} as stable and as canary;"
            " name another with --stable or leave --canary out."
        )
    wanted = {"stable": stable} | ({"canary": canary} if canary else {})
    models = [
        published.read(model_base_path, version) for version in wanted.values()
    ]
    batching = _choose_batching(settings, models)
    _make(output)
    versions, labels = _next_step(output, settings.model_name, wanted)
    files = render(
        settings,
        os.path.abspath(model_base_path),
        versions=versions,
        labels=labels,
        batching=batching,
    )
    return Written(
        files=_publish(files, output),
        labels=labels,
        waiting={k: v for k, v in wanted.items() if labels.get(k) != v},
        batching=batching,
    )


def _check_name(name):
    if not _NAME.fullmatch(name):
        raise UserError(
            "Expected a model name of at most 63 lower-case letters, digits and"
            " hyphens that starts with a letter (Kubernetes takes no other), "
            f"received {name!r}; set --model_name."
        )


def _make(directory):
    if os.path.isdir(directory):
        return
    try:
        os.makedirs(directory)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(
            f"Expected a directory to write to, received {directory}, where "
            "there is a file; choose another --output."
        ) from e
    os.chmod(directory, 0o755)  # the container's user has to see what is in it


def _choose_batching(settings, models):
    """Whether to batch; raises `UserError` if a model cannot bear it."""
    if settings.batching == "off" or (
        settings.batching == "auto"
        and not all(model.marks_bad_images for model in models)
    ):
        return False
    for model in models:
        least = published.warmup_images(model)
        most = published.max_images(model)
        if not least <= settings.max_batch_size <= most:
            raise UserError(
                f"Expected a --max_batch_size from {least}, the largest request"
                f" of the warm-up, to {most}, what a request may have, for "
                f"{model.path}, received {settings.max_batch_size}; change it "
                "or set --batching=off."
            )
    return True


def _next_step(output, name, wanted):
    """The versions to load and the labels, the next ones towards `wanted`.

    A server refuses to move a label to a version that it has not loaded, and
    with it everything else that is new in models.config. So a version is first
    loaded beside the others, and gets its labels the next time.

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
    """Checks the files, then replaces the ones that differ, each at once."""
    draft = tempfile.mkdtemp(prefix=".draft-", dir=output)
    changed = []
    try:
        for name, text in files.items():
            with open(os.path.join(draft, name), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                # Whatever the umask says, the container's user has to read it.
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
        check_deployment(draft)
        for name, text in files.items():
            target = os.path.join(output, name)
            if not _holds(target, text):
                os.replace(os.path.join(draft, name), target)
                changed.append(name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(changed)


def _holds(path, text):
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
        "directory to write to; a server polls what is in it",
        flag_values,
    )
    flags.DEFINE_string(
        "model_name",
        "",
        "by which clients ask for it; empty: that of --model_base_path's last "
        "part",
        flag_values,
    )
    flags.DEFINE_integer(
        "stable",
        0,
        "version with that label; 0: the newest",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "canary",
        0,
        "version with that label; 0: none",
        lower_bound=0,
        flag_values=flag_values,
    )
    for name, least, text in (
        ("max_batch_size", 1, "images in the largest batch"),
        (
            "batch_timeout_micros",
            0,
            "microseconds that a batch waits to be filled",
        ),
        ("clients", 1, "requests that are under way at the same time"),
        ("cpus", 1, "processor cores that the container gets"),
        ("memory_mb", 256, "memory that the container gets, MiB"),
    ):
        default = Settings._field_defaults[name]
        flags.DEFINE_integer(
            name, default, text, lower_bound=least, flag_values=flag_values
        )
    flags.DEFINE_enum(
        "accelerator", "cpu", IMAGES, "what to compute on", flag_values
    )
    flags.DEFINE_enum(
        "batching",
        "auto",
        ["auto", "on", "off"],
        "compute requests of several clients together; there, one bad image "
        "fails them all. auto: only models exported with --bad_images=nan, "
        "where it does not",
        flag_values,
    )
    require(flag_values, "model_base_path", "output")


def main():
    """Reads the flags, writes, and says what there is now."""
    values = flags.FLAGS
    base = values.model_base_path
    settings = Settings(
        values.model_name or os.path.basename(os.path.abspath(base)),
        **{k: getattr(values, k) for k in Settings._field_defaults},
    )
    written = deploy(
        base,
        values.output,
        settings,
        stable=values.stable,
        canary=values.canary,
    )
    labels = ", ".join(f"{k} = {v}" for k, v in written.labels.items())
    changed = ", ".join(written.files) or "nothing had to be changed"
    print(f"written and checked: {values.output} ({changed})")
    batching = "on" if written.batching else "off"
    if settings.batching == "auto" and not written.batching:
        batching += " (a bad image would fail the requests of others: export "
        batching += "with --bad_images=nan)"
    print(f"labels: {labels}; batching: {batching}")
    apply = f"kubectl apply --filename={values.output}/kubernetes.yaml"
    if "docker-compose.yml" in written.files:
        compose = f"docker compose --file={values.output}/docker-compose.yml"
        print(f"to start it (anew): {compose} up --detach --wait, or {apply}")
    elif written.files:
        print(f"a running server follows; on Kubernetes after {apply}")
    for label, version in written.waiting.items():
        print(
            f"{label} = {version} has to wait: servers load version {version} "
            "now; run the same command again when /v1/models/"
            f"{settings.model_name}/versions/{version} says AVAILABLE."
        )


if __name__ == "__main__":
    launch.launch(main, define_flags)
