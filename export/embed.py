"""Embeds a folder of images into one file.

    python -m export.embed --encoder=export/ --images=photos/ \\
        --output=embeddings.npz

The encoder is a SavedModel that `export.savedmodel` made, the directory of a
run (its newest checkpoint), or a server: grpc://host:port/MODEL or
http://host:port/MODEL. The output is .npz, .parquet or .tfrecord;
`export.embedding.embeddings` tells how to read it.

Photographs are turned upright, and WebP, TIFF, HEIC and AVIF files converted,
before the encoder gets them, as training does unless told otherwise. Of a run
that was (`--noexif_rotation`, `--nomore_formats`), say the same here.

What is done is kept in OUTPUT.parts: after a kill, a crash or a full disk the
same command goes on from there. Images that cannot be read, and those that
the model refuses, are left out and listed, a line each with the reason behind
a tab, in OUTPUT.unreadable.txt.
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
from clsa_tf.options.flags import define_path, require
from clsa_tf.terminal import progress
from clsa_tf.terminal.signals import Interruption
from export.embedding import embeddings
from export.embedding.encoders import open_encoder
from export.embedding.in_order import in_order
from export.embedding.parts import Parts
from export.embedding.photographs import prepare
from export.embedding.refusal import Gate, embed_each, read_image

_READERS = 4  # threads that read files


def images(root, *, more_formats):
    """Lists the images of a folder, and prints what is left out.

    Args:
        root: the folder.
        more_formats: see `clsa_tf.data.headers.Rules`.

    Returns:
        (list of paths below it; digest of these and of the files' sizes).

    Raises:
        UserError: there are none.
    """
    if "://" in root:
        raise UserError(
            f"Expected a folder of this machine as --images, received {root}; "
            "copy or mount it."
        )
    if root.startswith(FOLDER):  # as --dataset has it
        raise UserError(
            f"Expected a folder as --images, received {root}; write the path "
            f"alone: --images={root[len(FOLDER) :]}."
        )
    listing = list_folder(root, more_formats=more_formats)
    files = listing.images
    for note in listing.notes(root):
        print(note)
    digest = hashlib.sha256()
    for file in files:
        try:
            size = os.stat(posixpath.join(root, file)).st_size
        except OSError:  # it will be listed as bad
            size = -1
        digest.update(os.fsencode(file) + b"\0%d\0" % size)
    return files, f"{len(files)}, sha256:{digest.hexdigest()}"


def batches(start, end, size, shard_size):
    """Yields the bounds of batches, which end where shards end.

    So which images make a batch, and with it the rounding, does not depend on
    where a part ended before its time.
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
    """Embeds what is not embedded yet.

    Args:
        encoder: of `export.embedding.encoders`.
        root: the folder.
        files: list of paths below it.
        parts: `export.embedding.parts.Parts` of these files.
        interruption: `Interruption`, entered.
        rules: `clsa_tf.data.headers.Rules`.
        batch_size: images that are embedded at once.
        shard_size: images per part.
        concurrency: batches that are under way at the same time.

    Raises:
        ModelError: the encoder failed; what was done before is kept.
        Stopped: by a signal; what was done before is kept.
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
            in_order(read, bounds, workers=_READERS, ahead=concurrency + 1)
        )
        results = stack.enter_context(
            in_order(run, contents, workers=concurrency, ahead=concurrency)
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
    """Makes the output of the parts, and lists the bad images.

    Args:
        parts: `export.embedding.parts.Parts` of all files.
        files: list of paths.
        output: path, see `export.embedding.embeddings.write`.
        widths: from names of outputs to their widths.
        interruption: `Interruption`, entered.
        max_bad_share: in [0, 1].

    Returns:
        how many images are bad.

    Raises:
        UserError: too many are; the parts are kept.
        Stopped: by a signal; the parts are kept.
    """
    bad = parts.bad()
    listed = f"{output}.unreadable.txt"
    _list_bad(listed, [(files[i], reason) for i, reason in bad.items()])
    if len(bad) > max_bad_share * len(files):
        raise UserError(
            f"Expected at most {max_bad_share:g} of the images to be bad, "
            f"received {len(bad)} of {len(files)}, listed in {listed}; mend "
            "them and start anew, or raise --max_bad_share: what is done is "
            f"kept in {parts.directory}, and the same command goes on there."
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
    with open(
        path + ".draft", "w", encoding="utf-8", errors="surrogateescape"
    ) as file:
        for name, reason in bad:
            # A line break is a character that names may have.
            file.write(f"{name}\t{reason}".replace("\n", "\\n") + "\n")
    os.replace(path + ".draft", path)


def define_flags(flag_values):
    """Defines this command's flags."""

    def define(kind, *arguments):
        kind(*arguments, flag_values=flag_values)

    define(
        define_path,
        "encoder",
        None,
        "directory of a SavedModel, of its versions or of a run, "
        "grpc://host:port/MODEL or http://host:port/MODEL",
    )
    define(define_path, "images", None, "folder of images")
    define(define_path, "output", None, "file: .npz, .parquet or .tfrecord")
    define(
        flags.DEFINE_list,
        "outputs",
        "embedding,projection",
        "what to keep: either or both",
    )
    define(flags.DEFINE_integer, "batch_size", 32, "images embedded at once", 1)
    define(
        flags.DEFINE_integer,
        "shard_size",
        2048,
        "images after which what is done is saved",
        1,
    )
    define(
        flags.DEFINE_integer,
        "concurrency",
        4,
        "batches under way at the same time",
        1,
    )
    define(
        flags.DEFINE_float,
        "timeout",
        60.0,
        "seconds per attempt to reach a server",
        0.001,
    )
    define(flags.DEFINE_integer, "attempts", 5, "how often to try", 1)
    define(
        flags.DEFINE_bool,
        "exif_rotation",
        True,
        "turn photographs upright as their EXIF data say, before the encoder "
        "gets them",
    )
    define(
        flags.DEFINE_bool,
        "more_formats",
        True,
        "also read WebP, TIFF, HEIC and AVIF files, and images whose names do "
        "not say that they are; otherwise only .jpg .jpeg .png .bmp .gif",
    )
    for name, unit in (("bytes", ""), ("pixels", ", height times width")):
        define(
            flags.DEFINE_integer,
            f"max_image_{name}",
            getattr(headers.DEFAULT, f"image_{name}"),
            f"most {name}{unit}, of an image that is turned or converted here; "
            "the encoder has limits of its own. 0: no limit",
            0,
        )
    define(
        flags.DEFINE_float,
        "max_bad_share",
        0.05,
        "share, in [0, 1], of bad images above which there is no output",
        0.0,
        1.0,
    )
    require(flag_values, "encoder", "images", "output")


def main():
    """Reads the flags and embeds."""
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
            )
        stack.callback(encoder.close)
        manifest = {
            "encoder": encoder.identity,
            "images": digest,
            "outputs": encoder.widths,
            "shard_size": values.shard_size,
        }
        if rules.exif_rotation:  # as before, if photographs are not turned
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
        f"{len(files)} images, {before} of them done before; {bad} bad; "
        f"{seconds:.1f} s, {new / seconds:.1f} images/s"
    )
    print(f"the embeddings of {len(files) - bad} images are in {values.output}")
    if bad:
        print(f"the bad images, and why: {values.output}.unreadable.txt")


if __name__ == "__main__":
    launch.launch(main, define_flags)
