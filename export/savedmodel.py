"""Export the encoder of a run as a SavedModel for TensorFlow Serving.

    python -m export.savedmodel --workdir=runs/photos --output=models/photos

The command writes OUTPUT/VERSION. The version appears complete or not at all:
it is written under a temporary name, checked and then renamed.
"""

import json
import os

import tensorflow as tf
from absl import flags

from clsa_tf import config
from clsa_tf.cli import launch
from clsa_tf.data.open import FOLDER
from clsa_tf.errors import UserError
from clsa_tf.files import MODEL_CARD, draft_directory, publish
from clsa_tf.networks.precision import PRECISIONS
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import progress, shell
from clsa_tf.training import outcome
from clsa_tf.training.checkpoint import load_trained
from export.model import (
    card,
    savedmodel_checks,
    served,
    untrusted,
    warmup_requests,
)


def export(
    workdir,
    output,
    *,
    version=0,
    image_size=0,
    precision="float32",
    outputs=served.OUTPUTS,
    bad_images="error",
    limits=untrusted.DEFAULT,
    warmup_batch_sizes=warmup_requests.BATCH_SIZES,
    license_="not stated",
):
    """Exports the encoder of the run in `workdir`.

    Args:
        workdir: directory of the run.
        output: directory of the versions; created if missing.
        version: number of the new version, >= 1; 0: the newest one plus 1.
        image_size: side of encoded images after preprocessing, in px; 0: the
            size of the run's evaluation.
        precision: compute precision of the backbone, see
            `clsa_tf.networks.precision`.
        outputs: names out of `export.model.served.OUTPUTS` to return.
        bad_images: see `export.model.served.ServedEncoder`.
        limits: `export.model.untrusted.Limits`.
        warmup_batch_sizes: images in each warm-up request; each in
            1..`limits.batch_images`.
        license_: licence of the weights, for the model card.

    Returns:
        path of the SavedModel, `<output>/<version>`.

    Raises:
        UserError: `workdir` has no run, the version exists, or a check failed.
    """
    limit = limits.batch_images
    if not all(1 <= size <= limit for size in warmup_batch_sizes):
        raise UserError(
            f"Expected --warmup_batch_sizes from 1 to {limit}, the images of "
            f"the largest request, received {list(warmup_batch_sizes)}; change "
            "them or --max_batch_images."
        )
    trained = load_trained(workdir, precision=precision)
    options = {
        "image_size": image_size or trained.config.image_size,
        "crop_ratio": trained.config.eval_keep,
        "outputs": list(outputs),
        "bad_images": bad_images,
    }
    module = served.ServedEncoder(trained.encoder, limits=limits, **options)
    served_as = {
        "image_size": options["image_size"],
        "keep": options["crop_ratio"],  # the card's name of the crop ratio
        "outputs": options["outputs"],
        "bad_images": bad_images,
        "precision": precision,
        "limits": limits._asdict(),
    }
    described = card.describe(workdir, trained, served_as, license_=license_)
    target = _new_version(output, version)
    with draft_directory(output) as draft:
        os.chmod(draft, 0o755)  # readable for a server's user
        tf.saved_model.save(module, draft, signatures=module.signatures)
        warmup_requests.write(
            draft,
            image_size=options["image_size"],
            batch_sizes=warmup_batch_sizes,
        )
        card.write(described, draft)
        _check(draft, trained.encoder, options, precision)
        _publish(draft, target)
    return target


def _check(path, encoder, options, precision):
    expected = savedmodel_checks.examples(encoder, **options)
    savedmodel_checks.check_graph(path, encoder)
    savedmodel_checks.check_warmup(path)
    savedmodel_checks.check_clean_process(path, expected, precision=precision)
    savedmodel_checks.check_c_loader(path, expected, precision=precision)


def _new_version(output, version):
    """Returns the path of a version to write; creates its parent directory."""
    if "://" in output:
        raise UserError(
            f"Expected a local directory as --output, received {output}: "
            "a version must appear by an atomic rename; export to a local "
            "directory and copy the version, saved_model.pb last."
        )
    os.makedirs(output, exist_ok=True)
    if not version:
        taken = [int(n) for n in os.listdir(output) if n.isdecimal()]
        version = max(taken, default=0) + 1
    target = os.path.join(output, str(version))
    if os.path.lexists(target):
        raise UserError(_exists(target))
    return target


def _publish(draft, target):
    """Renames the finished model to its place."""
    try:
        publish(draft, target)
    except OSError as e:
        if os.path.lexists(target):  # created by another export
            raise UserError(_exists(target)) from e
        raise


def _exists(target):
    return (
        f"Expected a version that does not exist yet, received {target}; omit "
        "--version or choose another."
    )


def _next_steps(workdir, output, path):
    """Returns the commands to run next, as lines of text."""
    dataset = config.load(workdir).dataset
    images = "/photos"
    if dataset.startswith(FOLDER):
        images = dataset[len(FOLDER) :]
    base = os.path.abspath(output)  # servers require absolute paths
    serve = shell.of_module(
        "export.server",
        model_name="encoder",
        model_base_path=base,
        port=8500,
        rest_api_port=8501,
    )
    ask = shell.of_module(
        "export.client", server="localhost:8500", model="encoder"
    )
    ask += " photo.jpg"
    embed = shell.of_module(
        "export.embed",
        encoder=path,
        images=images,
        output="embeddings.npz",
    )
    return "\n".join(
        [
            "to serve the model, query the server, embed a folder of images "
            "or load the encoder in Python, type",
            f"  {serve}",
            f"  {ask}",
            f"  {embed}",
            f"  clsa_tf.load_encoder({path!r})",
        ]
    )


def define_flags(flag_values):
    """Defines this command's flags."""
    define_path("workdir", None, "directory of the run to export", flag_values)
    define_path(
        "output",
        None,
        "directory of the model's versions, the --model_base_path of a server",
        flag_values,
    )
    flags.DEFINE_integer(
        "version",
        0,
        "number of the new version; 0: the newest one plus 1",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "image_size",
        0,
        "side of encoded images after preprocessing, in px; 0: the size of the "
        "run's evaluation",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "precision",
        "float32",
        [name for name in PRECISIONS if name != "auto"],
        "compute precision of the backbone; weights are stored in float32",
        flag_values,
    )
    flags.DEFINE_list(
        "outputs",
        list(served.OUTPUTS),
        "outputs to return, separated by commas: embedding (features of the "
        "backbone), projection (output of the head, unit vectors)",
        flag_values,
    )
    flags.DEFINE_enum(
        "bad_images",
        "error",
        served.BAD_IMAGES,
        "effect of an image that cannot be decoded or is too large: error "
        "fails its request and names the image and the reason; nan gives a row "
        "of NaN and false in the output `valid`. With TensorFlow Serving's "
        "batching an error fails all requests of the batch: use nan there. "
        "JavaScript's JSON.parse rejects the NaN in REST responses",
        flag_values,
    )
    flags.DEFINE_string(
        "license",
        "not stated",
        "licence of the weights, for the model card",
        flag_values,
    )
    for name, quantity in (
        ("image_bytes", "bytes of an encoded image"),
        ("image_pixels", "pixels of an encoded image, height times width"),
        (
            "batch_images",
            "images in a request or, if they are not encoded, as many pixels "
            "as this number of images of --image_size has",
        ),
    ):
        flags.DEFINE_integer(
            f"max_{name}",
            untrusted.Limits._field_defaults[name],
            f"maximum {quantity}; larger ones are rejected before decoding",
            lower_bound=1,
            flag_values=flag_values,
        )
    flags.DEFINE_list(
        "warmup_batch_sizes",
        [str(size) for size in warmup_requests.BATCH_SIZES],
        "images in each warm-up request, separated by commas. For a GPU: every "
        "batch size that clients send. A server with batching needs a "
        "max_batch_size of at least the largest one",
        flag_values,
    )
    require(flag_values, "workdir", "output")
    flags.register_validator(
        "warmup_batch_sizes",
        lambda sizes: sizes and all(size.isdecimal() for size in sizes),
        "integers, separated by commas",
        flag_values,
    )
    flags.register_validator(
        "outputs",
        lambda names: names and set(names) <= set(served.OUTPUTS),
        f"names out of {', '.join(served.OUTPUTS)}, separated by commas",
        flag_values,
    )


def main():
    """Reads the flags and export."""
    values = flags.FLAGS
    limits = untrusted.Limits(
        **{n: values[f"max_{n}"].value for n in untrusted.Limits._fields}
    )
    with progress.waiting("exporting and checking the model"):
        path = export(
            values.workdir,
            values.output,
            version=values.version,
            image_size=values.image_size,
            precision=values.precision,
            outputs=values.outputs,
            bad_images=values.bad_images,
            limits=limits,
            warmup_batch_sizes=[int(n) for n in values.warmup_batch_sizes],
            license_=values.license,
        )
    show(path)
    if values.bad_images == "error":
        print(
            "note: an image that cannot be decoded fails its request and, with "
            "batching, all requests of the same batch; --bad_images=nan marks "
            "the image in the response instead"
        )
    print(_next_steps(values.workdir, values.output, path))


def show(path):
    """Prints the path of an export and its warnings."""
    with open(os.path.join(path, MODEL_CARD), encoding="utf-8") as file:
        warnings = outcome.show(json.load(file))
    if not warnings:
        print(f"exported and verified: {path}")
        return
    print(f"exported ({'; '.join(short for short, _ in warnings)}): {path}")


if __name__ == "__main__":
    launch.launch(main, define_flags)
