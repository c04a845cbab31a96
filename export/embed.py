"""Embed a folder of images into one file.

    python -m export.embed --encoder=models/photos --images=photos/ \\
        --output=embeddings.npz

The encoder is a SavedModel from `export.savedmodel`, the directory of a run
(its newest checkpoint), or a model on a server: grpc[s]://host:port/MODEL or
http[s]://host:port/MODEL. The output is an .npz, .parquet or .tfrecord file;
the docstring of `export.embedding.embeddings` shows how to read it.

The command applies the EXIF orientation and converts WebP, TIFF, HEIC and AVIF
files, as training does by default. Set --noexif_rotation or --nomore_formats if
the run was trained with them.

OUTPUT.parts holds the finished parts: after a crash, a kill or a full disk the
same command continues from there. Images that cannot be read or that the model
rejects are left out. OUTPUT.unreadable.txt lists them with the reasons, one per
line, separated by a tab.
"""

import contextlib
import hashlib
import os
import posixpath
import time

from absl import flags

from clsa_tf.cli import launch
from clsa_tf.data import headers
from clsa_tf.data.open import FOLDER
from clsa_tf.data.sources.folder import list_folder
from clsa_tf.errors import Stopped, UserError
from clsa_tf.files import write_atomically
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import progress
from clsa_tf.terminal.signals import Interruption
from export.embedding import embeddings
from export.embedding.encoders import open_encoder
from export.embedding.ordered_map import ordered_map
from export.embedding.parts import Parts
from export.embedding.photographs import prepare
from export.embedding.rejected import Gate, embed_each, read_image

_READER_THREADS = 4


def images(root, *, more_formats):
    """Lists the images of a folder, and prints which files are left out.

    Args:
        root: path of the folder.
        more_formats: see `clsa_tf.data.headers.Rules`.

    Returns:
        (list of paths relative to `root`; digest of the paths and the sizes of
        the files).

    Raises:
        UserError: the folder has no images.
    """
    if "://" in root:
        raise UserError(
            f"Expected a local folder as --images, received {root}; copy or "
            "mount it."
        )
    if root.startswith(FOLDER):  # the syntax of --dataset
        raise UserError(
            f"Expected the path of a folder as --images, received {root}; set "
            f"--images={root[len(FOLDER) :]}."
        )
    listing = list_folder(root, more_formats=more_formats)
    files = listing.images
    for note in listing.notes(root):
        print(note)
    digest = hashlib.sha256()
    for file in files:
        try:
            size = os.stat(posixpath.join(root, file)).st_size
        except OSError:  # will be listed as bad
            size = -1
        digest.update(os.fsencode(file) + b"\0%d\0" % size)
    return files, f"{len(files)}, sha256:{digest.hexdigest()}"


def batches(start, end, size, shard_size):
    """Yields the bounds of batches, which never cross the end of a shard.

    The batches, and with them the rounding errors, therefore do not depend on
    where an earlier process was interrupted.
    """
    while start < end:
        stop = min(start + size, end, start - start % shard_size + shard_size)
        yield start, stop
        start = stop


def embed(
    encoder,
    root,
    files,
    parts,
    interruption,
    *,
    rules,
    batch_size,
    shard_size,
    concurrency,
):
    """Embeds the images that are not in `parts` yet.

    Args:
        encoder: see `export.embedding.encoders.open_encoder`.
        root: path of the folder.
        files: list of paths relative to `root`.
        parts: `export.embedding.parts.Parts` of these files.
        interruption: `Interruption`, entered.
        rules: `clsa_tf.data.headers.Rules`.
        batch_size: images per batch.
        shard_size: images per part.
        concurrency: number of batches in progress at the same time.

    Raises:
        ModelError: the encoder failed; finished batches are saved.
        Stopped: a signal stopped it; finished batches are saved.
    """
    gate = Gate(concurrency)

    def read(bounds):
        paths = [posixpath.join(root, file) for file in files[slice(*bounds)]]
        return bounds, [prepare(read_image(path), rules) for path in paths]

    def run(item):
        bounds, contents = item
        return bounds, embed_each(encoder, contents, gate)

    bounds = batches(parts.done, len(files), batch_size, shard_size)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            progress.bar(len(files), initial=parts.done, unit="images")
        )
        contents = stack.enter_context(
            ordered_map(
                read, bounds, workers=_READER_THREADS, ahead=concurrency + 1
            )
        )
        results = stack.enter_context(
            ordered_map(run, contents, workers=concurrency, ahead=concurrency)
        )
        try:
            for (start, stop), (outputs, bad) in results:
                parts.add(start, stop, outputs, bad)
                bar.update(stop - start)
                if stop % shard_size == 0:
                    parts.save()
                if interruption.signal:
                    raise Stopped(interruption.signal)
        finally:
            parts.save()


def join(parts, files, output, widths, interruption, *, max_bad_share):
    """Joins the parts to the output file, and lists the bad images.

    Args:
        parts: `export.embedding.parts.Parts` of all files.
        files: list of paths.
        output: path, see `export.embedding.embeddings.write`.
        widths: dictionary from output names to their widths.
        interruption: `Interruption`, entered.
        max_bad_share: largest allowed share of bad images, in [0, 1].

    Returns:
        number of bad images.

    Raises:
        UserError: too many images are bad; the parts are kept.
        Stopped: a signal stopped it; the parts are kept.
    """
    bad = parts.bad()
    list_path = f"{output}.unreadable.txt"
    _list_bad(list_path, [(files[i], reason) for i, reason in bad.items()])
    if len(bad) > max_bad_share * len(files):
        raise UserError(
            f"Expected at most {max_bad_share:g} of the images to be bad, "
            f"received {len(bad)} of {len(files)}, listed in {list_path}; "
            f"repair them and remove {parts.directory}, or raise "
            "--max_bad_share and run the command again: it continues from "
            "there."
        )

    def blocks(names):
        for block in parts.blocks(names):
            if interruption.signal:
                raise Stopped(interruption.signal)
            yield block

    good = [files[row] for row in parts.rows()]
    embeddings.write(output, good, widths, blocks)
    parts.remove()
    return len(bad)


def _list_bad(path, bad):
    if not bad:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    # File names may contain line breaks, and bytes that are not UTF-8.
    lines = [f"{n}\t{reason}".replace("\n", "\\n") + "\n" for n, reason in bad]
    write_atomically(path, "".join(lines), errors="surrogateescape")


def define_flags(flag_values):
    """Defines this command's flags."""

    def define(kind, *arguments):
        kind(*arguments, flag_values=flag_values)

    define(
        define_path,
        "encoder",
        None,
        "directory of a SavedModel, of its versions or of a run, or "
        "grpc[s]://host:port/MODEL or http[s]://host:port/MODEL",
    )
    define(define_path, "images", None, "folder of images")
    define(define_path, "output", None, "file: .npz, .parquet or .tfrecord")
    define(
        flags.DEFINE_list,
        "outputs",
        "embedding,projection",
        "outputs to write, separated by commas",
    )
    define(flags.DEFINE_integer, "batch_size", 32, "images per batch", 1)
    define(
        flags.DEFINE_integer,
        "shard_size",
        2048,
        "images per part that is saved",
        1,
    )
    define(
        flags.DEFINE_integer,
        "concurrency",
        4,
        "batches in progress at the same time",
        1,
    )
    define(
        flags.DEFINE_float,
        "timeout",
        60.0,
        "seconds per attempt of a request to a server",
        0.001,
    )
    define(
        flags.DEFINE_integer,
        "attempts",
        5,
        "attempts per request to a server",
        1,
    )
    define(
        define_path,
        "ca_certificates",
        "",
        "PEM file of the certificate authorities to trust for grpcs:// and "
        "https://; empty: those of gRPC and requests",
    )
    define(
        flags.DEFINE_bool,
        "exif_rotation",
        True,
        "apply the EXIF orientation to photographs",
    )
    define(
        flags.DEFINE_bool,
        "more_formats",
        True,
        "also read WebP, TIFF, HEIC and AVIF files, and images without a known "
        "extension; otherwise only .jpg .jpeg .png .bmp .gif",
    )
    for name, unit in (("bytes", ""), ("pixels", ", height times width")):
        define(
            flags.DEFINE_integer,
            f"max_image_{name}",
            getattr(headers.DEFAULT, f"image_{name}"),
            f"largest image, in {name}{unit}, that is rotated or converted "
            "here. The encoder has its own limits. 0: no limit",
            0,
        )
    define(
        flags.DEFINE_float,
        "max_bad_share",
        0.05,
        "largest share of bad images, in [0, 1]; above it no output is written",
        0.0,
        1.0,
    )
    require(flag_values, "encoder", "images", "output")


def main():
    """Reads the flags and embeds the images."""
    values = flags.FLAGS
    embeddings.check(values.output)
    rules = headers.Rules(
        image_bytes=values.max_image_bytes,
        image_pixels=values.max_image_pixels,
        exif_rotation=values.exif_rotation,
        more_formats=values.more_formats,
    )
    files, digest = images(values.images, more_formats=rules.more_formats)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(
            Interruption("finishing the batch and saving")
        )
        with interruption.at_once("ended before the first image"):
            encoder = open_encoder(
                values.encoder,
                outputs=sorted({*values.outputs}),
                batch_size=values.batch_size,
                timeout=values.timeout,
                attempts=values.attempts,
                certificates=values.ca_certificates,
            )
        stack.callback(encoder.close)
        manifest = {
            "encoder": encoder.identity,
            "images": digest,
            "outputs": encoder.widths,
            "shard_size": values.shard_size,
        }
        # Omitted if false, as in parts from versions without this setting.
        if rules.exif_rotation:
            manifest["exif_rotation"] = True
        parts = Parts(f"{values.output}.parts", manifest, encoder.widths)
        stack.callback(parts.close)
        before, started = parts.done, time.perf_counter()
        embed(
            encoder,
            values.images,
            files,
            parts,
            interruption,
            rules=rules,
            batch_size=values.batch_size,
            shard_size=values.shard_size,
            concurrency=values.concurrency,
        )
        seconds = time.perf_counter() - started
        bad = join(
            parts,
            files,
            values.output,
            encoder.widths,
            interruption,
            max_bad_share=values.max_bad_share,
        )
    new = len(files) - before
    print(
        f"{len(files)} images, {before} of them embedded before; {bad} bad; "
        f"{seconds:.1f} s, {new / seconds:.1f} images/s"
    )
    print(f"wrote embeddings of {len(files) - bad} images to {values.output}")
    if bad:
        print(f"bad images and reasons: {values.output}.unreadable.txt")


if __name__ == "__main__":
    launch.launch(main, define_flags)
