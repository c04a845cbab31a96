"""The embedded dataset `shapes`: rendered on the machine, never downloaded.

Importing this module registers the builder, so that `tfds.load("shapes", ...)`
finds it. Only `prepare` generates it. `render.py` draws the images.
"""

import contextlib
import io
import pathlib
import shutil

import tensorflow_datasets as tfds
from PIL import Image

from clsa_tf import files
from clsa_tf.data.shapes import render
from clsa_tf.errors import UserError
from clsa_tf.terminal import progress

JPEG_QUALITY = 95


class _OfflineInfo(tfds.core.DatasetInfo):
    """Dataset info that is never looked up in the public storage bucket.

    The bucket is switched off. Older releases of tfds query it, with retries,
    for every dataset that is not yet prepared.
    """

    def initialize_from_bucket(self):
        """Does nothing: there is no precomputed info for this dataset."""


def encoded_example(split, index):
    """Returns an example: JPEG bytes and labels.

    It is a pure function of the arguments. `split` is "train" or "test";
    `index` counts from 0. "image" is an `io.BytesIO` that decodes to
    [64, 64, 3] uint8. The other values are Python ints.
    """
    factors = render.draw_factors(split, index)
    image = Image.fromarray(render.render(split, index, factors))
    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=JPEG_QUALITY)
    encoded.seek(0)
    return {
        "image": encoded,
        "label": factors.shape,
        "color": factors.color,
        "orientation": factors.orientation,
        "texture": factors.texture,
    }


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Ten oriented shapes in varying pose, colour, texture and clutter.

    Features: "image" [64, 64, 3] uint8; "label" (shape, 10), "color" (4),
    "orientation" (4) and "texture" (5), int64. A subclass with fewer EXAMPLES
    yields a smaller dataset with the same first images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    EXAMPLES = {"train": 10_000, "test": 2_000}
    # Nothing is downloaded. By default, tfds 4.9.10 looks for a list of
    # checksums with importlib_resources, an undeclared dependency.
    url_infos = None
    # Called after each generated example.
    on_example = staticmethod(lambda: None)

    def _info(self):
        label = tfds.features.ClassLabel
        side = render.SIDE
        return _OfflineInfo(
            builder=self,
            description="Oriented shapes rendered on the machine.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(side, side, 3), encoding_format="jpeg"
                    ),
                    "label": label(names=render.SHAPES),
                    "color": label(names=render.COLORS),
                    "orientation": label(names=render.ORIENTATIONS),
                    "texture": label(names=render.TEXTURES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {
            split: self._generate_examples(split, count)
            for split, count in self.EXAMPLES.items()
        }

    def _generate_examples(self, split, count):
        for index in range(count):
            yield index, encoded_example(split, index)
            self.on_example()


@contextlib.contextmanager
def _without_bars():
    """Hides the three progress bars of tfds while entered."""
    before = getattr(tfds.core.utils.tqdm_utils, "_active", True)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.display_progress_bar(before)


def prepare(data_dir, *, builder_class=Shapes):
    """Returns the builder; generates its files if they do not exist.

    `data_dir` is a local directory. No network is needed. tfds writes to an
    "incomplete" directory and renames it at the end, so a killed run leaves
    nothing that looks complete. The next run removes its files. Concurrent
    calls on one machine wait for each other. Progress goes to stderr.

    Raises:
        UserError: `data_dir` cannot be created or written to.
    """
    root = pathlib.Path(data_dir)
    parent = root / builder_class.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with files.lock(root / f".{builder_class.name}.lock", wait=True):
            return _prepare_locked(root, parent, builder_class)
    except OSError as error:
        raise UserError(
            f"Expected a writable local directory, received {str(root)!r} "
            f"({error.strerror or error}); choose another one."
        ) from error


def _prepare_locked(root, parent, builder_class):
    builder = builder_class(data_dir=str(root))
    if pathlib.Path(builder.data_dir).exists():
        return builder
    for leftover in parent.glob("*incomplete*"):
        shutil.rmtree(leftover)
    count = sum(builder_class.EXAMPLES.values())
    print(
        f"Rendering {count} images of {builder.name} to {builder.data_dir} "
        "(--data_dir sets another directory)"
    )
    # tfds announces a download of unknown size on stdout, but there is none.
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_without_bars())
        bar = stack.enter_context(progress.bar(count, unit="images"))
        builder.on_example = bar.update
        builder.download_and_prepare(
            file_format="tfrecord",
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False
            ),
        )
    return builder
