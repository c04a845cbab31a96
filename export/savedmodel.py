"""Exports the encoder of a run for TensorFlow Serving.

    python -m export.savedmodel --workdir=runs/photos --output=models/photos

Writes OUTPUT/VERSION, a SavedModel, complete or not at all: it is written under
a temporary name, checked, and only then renamed.
"""

import json
import os
import shutil
import tempfile

import tensorflow as tf
from absl import flags

from clsa_tf import config
from clsa_tf.cli import launch
from clsa_tf.data.open import FOLDER
from clsa_tf.errors import UserError
from clsa_tf.files import MODEL_CARD, flush_to_disk
from clsa_tf.networks.precision import PRECISIONS
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import progress, shell
from clsa_tf.training import outcome
from clsa_tf.training.checkpoint import load_trained
from export.model import card, checks, served, untrusted, warmup


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
    warmup_batch_sizes=warmup.BATCH_SIZES,
    license_="not stated",
):
    """Exports the encoder of the run in `workdir`.

    Args:
        workdir: directory of the run.
        output: directory of the versions; created when missing.
        version: number of this one, >= 1; 0: one more than the newest.
        image_size: side that encoded images are brought to, in px; 0: the one
            that the run was evaluated with.
        precision: in which the backbone computes, see
            `clsa_tf.networks.precision`.
        outputs: those of `export.model.served.OUTPUTS` to return.
        bad_images: see `export.model.served.ServedEncoder`.
        limits: `export.model.untrusted.Limits`.
        warmup_batch_sizes: images in the requests that a server makes before
            it serves; each in 1..`limits.batch_images`.
        license_: of the weights, for the model card.

    Returns:
        path of the SavedModel, `<output>/<version>`.

    Raises:
        UserError: no run there, the version exists, or a check failed.
    """
    most = limits.batch_images
    if not all(1 <= size <= most for size in warmup_batch_sizes):
        raise UserError(
            f"Expected --warmup_batch_sizes from 1 to {most}, what a request "
            f"may have, received {list(warmup_batch_sizes)}; change them or "
            "--max_batch_images."
        )
    trained = load_trained(workdir, precision=precision)
    served_as = {
        "image_size": image_size or trained.config.image_size,
        "keep": trained.config.eval_keep,
        "outputs": list(outputs),
        "bad_images": bad_images,
    }
    module = served.ServedEncoder(trained.encoder, limits=limits, **served_as)
    served_as |= {"precision": precision, "limits": limits._asdict()}
    described = card.describe(workdir, trained, served_as, license_=license_)
    target = _new_version(output, version)
    # Beside its target, so that the rename stays on one file system; servers
    # look at names that are numbers only.
    draft = tempfile.mkdtemp(prefix=".draft-", dir=output)
    try:
        os.chmod(draft, 0o755)
        tf.saved_model.save(module, draft, signatures=module.signatures)
        warmup.write(
            draft,
            image_size=served_as["image_size"],
            batch_sizes=warmup_batch_sizes,
        )
        card.write(described, draft)
        _check(draft, trained.encoder, served_as)
        _publish(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _check(path, encoder, served_as):
    precision = served_as["precision"]
    expected = checks.examples(
        encoder,
        image_size=served_as["image_size"],
        keep=served_as["keep"],
        outputs=served_as["outputs"],
        bad_images=served_as["bad_images"],
    )
    checks.check_graph(path, encoder)
    checks.check_warmup(path)
    checks.check_clean_process(path, expected, precision=precision)
    checks.check_c_loader(path, expected, precision=precision)


def _new_version(output, version):
    """Path of the version to write; makes the directory that it is in."""
    if "://" in output:
        raise UserError(
            f"Expected a directory of this machine, received {output}, where "
            "nothing can be published at once; export to a local one and copy "
            "the finished version, saved_model.pb last."
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
    """Renames the finished model, after all of it is on the disk."""
    for folder, _, files in os.walk(draft):
        for name in (*files, ""):
            flush_to_disk(os.path.join(folder, name))
    try:
        os.rename(draft, target)
    except OSError as e:
        if os.path.lexists(target):  # another export was faster
            raise UserError(_exists(target)) from e
        raise
    flush_to_disk(os.path.dirname(target))


def _exists(target):
    return (
        f"Expected a version that does not exist yet, received {target}; "
        "leave --version out or choose another."
    )


def _next_steps(workdir, output, path):
    """What to type next, in lines of text."""
    dataset = config.load(workdir).dataset
    images = "/photos"
    if dataset.startswith(FOLDER):
        images = dataset[len(FOLDER) :]
    base = os.path.abspath(output)  # which servers want
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
            "to serve it and to ask that server, to embed the images of a "
            "folder, and to go on from it in Python, type",
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
        "directory of the model's versions, what --model_base_path of a server "
        "names",
        flag_values,
    )
    flags.DEFINE_integer(
        "version",
        0,
        "number of this version; 0: one more than the newest",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "image_size",
        0,
        "side, in px, that encoded images are brought to; 0: that of the run's "
        "evaluation",
        lower_bound=0,
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "precision",
        "float32",
        [name for name in PRECISIONS if name != "auto"],
        "in which the backbone computes; the weights are stored in float32",
        flag_values,
    )
    flags.DEFINE_list(
        "outputs",
        list(served.OUTPUTS),
        "outputs to return, separated by commas: embedding (the backbone's "
        "features), projection (unit vectors of the head)",
        flag_values,
    )
    flags.DEFINE_enum(
        "bad_images",
        "error",
        served.BAD_IMAGES,
        "what an image does that cannot be decoded, or is too large: fail its "
        "request, saying which and why, or give a row of NaN and be false in "
        "the output `valid`. With TensorFlow Serving's batching a failure hits "
        "all requests of a batch: choose nan there. Over REST, NaN is a token "
        "that JavaScript's JSON.parse refuses",
        flag_values,
    )
    flags.DEFINE_string(
        "license", "not stated", "of the weights, for the card", flag_values
    )
    for name, what in (
        ("image_bytes", "bytes of an encoded image"),
        ("image_pixels", "pixels of an encoded image, height times width"),
        (
            "batch_images",
            "images in a request; of those that are not encoded, as many "
            "pixels as so many images of --image_size have",
        ),
    ):
        flags.DEFINE_integer(
            f"max_{name}",
            untrusted.Limits._field_defaults[name],
            f"most {what}; more is refused before it is decoded",
            lower_bound=1,
            flag_values=flag_values,
        )
    flags.DEFINE_list(
        "warmup_batch_sizes",
        [str(size) for size in warmup.BATCH_SIZES],
        "images in the requests that a server makes before it serves, "
        "separated by commas. For a GPU: every size that clients send. A "
        "server that batches needs a max_batch_size as large as the largest",
        flag_values,
    )
    require(flag_values, "workdir", "output")
    flags.register_validator(
        "warmup_batch_sizes",
        lambda sizes: sizes and all(size.isdecimal() for size in sizes),
        "whole numbers, separated by commas",
        flag_values,
    )
    flags.register_validator(
        "outputs",
        lambda names: names and set(names) <= set(served.OUTPUTS),
        f"names of {', '.join(served.OUTPUTS)}, separated by commas",
        flag_values,
    )


def main():
    """Reads the flags and exports."""
    values = flags.FLAGS
    limits = untrusted.Limits(
        **{n: values[f"max_{n}"].value for n in untrusted.Limits._fields}
    )
    with progress.waiting("exporting, and checking what was exported"):
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
            "note: an image that cannot be decoded fails its whole request and,"
            " where a server batches, those of other clients in the batch; "
            "--bad_images=nan marks it in the answer instead"
        )
    print(_next_steps(values.workdir, values.output, path))


def show(path):
    """Prints what was exported, and what is wrong with it."""
    with open(os.path.join(path, MODEL_CARD), encoding="utf-8") as file:
        warnings = outcome.show(json.load(file))
    if not warnings:
        print(f"exported and verified: {path}")
        return
    print(f"exported ({'; '.join(short for short, _ in warnings)}): {path}")


if __name__ == "__main__":
    launch.launch(main, define_flags)
