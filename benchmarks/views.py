"""Measures the speed of views: `python -m benchmarks.views --photos=DIR`.

Each figure is a ratio of two loaders that take turns on the same photographs in
one run, on `--cores` processor cores (default: one).
"""

import functools
import io
import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS
_PHOTOS = flags.DEFINE_string(
    "photos", None, "folder of JPEG photographs", required=True
)
_COUNT = flags.DEFINE_integer("count", 512, "largest number of photographs")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each loader")
_CORES = flags.DEFINE_integer("cores", 1, "processor cores to run on")
_ONLY = flags.DEFINE_list(
    "only",
    ["single", "multi", "ops", "cores", "device"],
    "parts to run: single and multi (two recipes of configs/), ops (cost of "
    "more strong operations), cores (--cores against one), device (the device "
    "part of --augment_on=device, on --cores)",
)
_LONG_SIDE = 500  # longer side of the enlarged copies, in px
_BATCH = 16  # images
_PHASE = 6  # batches per turn
_SINGLE = "configs/clsa.flags"
_MULTI = "configs/clsa_multicrop.flags"


def main(argv):
    """Runs the parts in `--only`; prints a table of each."""
    del argv
    # Set before TensorFlow creates its thread pools.
    os.sched_setaffinity(
        0, set(sorted(os.sched_getaffinity(0))[: _CORES.value])
    )
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory() as large:
        photos = copy_photos(_PHOTOS.value, large)
        parts = {
            "single": lambda: recipes(_SINGLE, photos),
            "multi": lambda: recipes(_MULTI, photos),
            "ops": lambda: strong_ops(photos),
            "cores": lambda: scaling(photos),
            "device": device,
        }
        for name in _ONLY.value:
            parts[name]()


def copy_photos(folder, large):
    """Copies photographs, unchanged and enlarged; {description: folder}."""
    from PIL import Image

    small = os.path.join(large, "small")
    large = os.path.join(large, "large")
    os.mkdir(small)
    os.mkdir(large)
    paths = sorted(pathlib.Path(folder).rglob("*.jpg"))
    for i, path in enumerate(paths[:: max(1, len(paths) // _COUNT.value)]):
        with Image.open(path) as image:
            image = image.convert("RGB")
            scale = _LONG_SIDE / max(image.size)
            size = [round(side * scale) for side in image.size]
            image.resize(size, Image.Resampling.BICUBIC).save(
                os.path.join(large, f"{i:06}.jpg"), quality=90
            )
        with open(os.path.join(small, f"{i:06}.jpg"), "wb") as file:
            file.write(path.read_bytes())
    return {"as they are": small, f"{_LONG_SIDE} px": large}


def views_of(flagfile, **changes):
    """Returns the views of a flagfile, with some options changed."""
    import clsa_tf.config
    from clsa_tf import methods

    config = clsa_tf.config.parse([f"--flagfile={flagfile}"])
    config = config.replace(**changes)
    return methods.class_of(config).views(config.options)


def recipes(flagfile, photos):
    """Compares loaders that make the views of a flagfile."""
    views = views_of(flagfile)
    for description, folder in photos.items():
        loaders = {"Pillow, as published": pillow(published(views), folder)}
        if len(published(views)) != len(views):
            loaders["Pillow, the same views"] = pillow(views, folder)
        loaders |= {
            "clsa_tf": pipeline(views, folder),
            "clsa_tf, host part of device": pipeline(
                views, folder, completed=False
            ),
            "decode and crop only": bare(views, folder),
            "the same, antialiased": bare(views, folder, antialias=True),
        }
        title = f"{flagfile}, {len(views)} views, photographs {description}"
        references = [x for x in loaders if "clsa_tf" not in x]
        report(title, take_turns(loaders), references)


def strong_ops(photos):
    """Measures the cost of more strong operations."""
    folder = photos["as they are"]
    loaders = {
        f"strong_ops={count}": pipeline(
            views_of(_SINGLE, strong_ops=count), folder
        )
        for count in (0, 1, 2, 5, 10)
    }
    report(
        f"{_SINGLE}, strong operations", take_turns(loaders), ["strong_ops=0"]
    )


def scaling(photos):
    """Compares one loader, with equal threads, on one and several cores."""
    load = pipeline(views_of(_SINGLE), photos["as they are"])
    cores = sorted(os.sched_getaffinity(0))

    def pinned(count):
        pin(cores[:count])
        return load()

    loaders = {
        f"{count} core(s)": functools.partial(pinned, count)
        for count in sorted({1, len(cores)})
    }
    report(f"{_SINGLE}, cores", take_turns(loaders), ["1 core(s)"])
    pin(cores)


def pin(cores):
    """Pins all threads of this process to these cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def device():
    """Measures the device part of --augment_on=device on this processor."""
    import tensorflow as tf

    from clsa_tf.augment.chain import complete_batch
    from clsa_tf.augment.views import params_key

    views = views_of(_SINGLE)
    packed = draw_all(views, [[300, 400]] * _BATCH)
    batch = {params_key(view): packed[view.name] for view in views}
    for view in views:
        pixels = tf.random.stateless_uniform(
            [_BATCH, view.size, 3, view.size], [1, 2], 0, 256, tf.int32
        )
        batch[view.name] = tf.cast(pixels, tf.uint8)

    def run():
        for _ in range(_PHASE):
            complete_batch(batch, views=views)
        return _PHASE * _BATCH

    report(f"{_SINGLE}, device part", take_turns({"all views": run}))


def draw_all(views, sizes):
    """Draws parameters for images of these sizes; {view name: packed}."""
    import tensorflow as tf

    from clsa_tf.augment.chain import compiled_draw
    from clsa_tf.augment.views import split_packed

    seeds = tf.stack([tf.range(len(sizes)), tf.zeros(len(sizes), tf.int32)], 1)
    _, packed = compiled_draw(tuple(views))(seeds, tf.constant(sizes))
    return split_packed(packed, views=views)


def published(views):
    """The views of the published loader: every crop, weak and strong.

    The published training ignores some of them.
    """
    import dataclasses

    key, *queries = views
    crops = {}
    for view in queries:
        crops.setdefault((view.size, view.min_area, view.max_area), view)
    made = [key]
    for i, view in enumerate(crops.values()):
        for ops in (0, 5):
            name = f"{'strong' if ops else 'weak'}_{i}"
            made.append(dataclasses.replace(view, name=name, strong_ops=ops))
    return made


def pillow(views, folder):
    """Returns a Pillow loader like the published one."""
    import numpy as np
    import tensorflow as tf
    from PIL import Image

    from benchmarks import pillow_chain
    from clsa_tf.augment.views import unpack

    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size[::-1])
    packed = draw_all(views, sizes)
    columns = {view.name: unpack(packed[view.name], view) for view in views}
    columns = tf.nest.map_structure(lambda x: x.numpy(), columns)
    work = [
        (path, tf.nest.map_structure(lambda x, i=i: x[i], columns))
        for i, path in enumerate(paths)
    ]
    turns = itertools.cycle(work)

    def run():
        for path, params in itertools.islice(turns, _PHASE * _BATCH):
            with open(path, "rb") as file:
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
            for view in views:
                np.asarray(
                    pillow_chain.make(image, params[view.name], view.size)
                )
        return _PHASE * _BATCH

    return run


def drained(dataset, count=_PHASE):
    """Returns a loader that takes `count` batches per turn from a dataset."""
    batches = iter(dataset)

    def run():
        for _ in range(count):
            next(batches)
        return count * _BATCH

    return run


def pipeline(views, folder, completed=True, count=_PHASE, **options):
    """Returns this package's loader, with `count` batches per turn."""
    from clsa_tf.data.pipeline import training_batches
    from clsa_tf.data.unreadable import UnreadableImages

    return drained(
        training_batches(
            source_of(folder),
            views,
            batch_size=_BATCH,
            seed=0,
            start_step=0,
            unreadable=UnreadableImages(max_bad_share=0),
            completed=completed,
            **options,
        ),
        count,
    )


def source_of(folder):
    """Opens a folder as training does."""
    import clsa_tf.config
    from clsa_tf.data.open import open_train_source

    config = clsa_tf.config.default(dataset=f"folder:{folder}", labels="none")
    return open_train_source(config)


def bare(views, folder, antialias=False):
    """Returns a loader of TensorFlow's operations: decode, crop, resize.

    Resizing is bilinear. The default, without antialiasing, is the minimal
    work. Published views are antialiased.
    """
    import tensorflow as tf

    def crops(example):
        image = tf.io.decode_jpeg(example["bytes"], channels=3)
        result = {}
        for i, view in enumerate(views):
            begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
                tf.shape(image),
                tf.zeros([0, 0, 4]),
                tf.stack([example["counter"], i]),
                min_object_covered=0.0,
                area_range=(view.min_area, view.max_area),
                use_image_if_no_bounding_boxes=True,
            )
            crop = tf.slice(image, begin, size)
            crop = tf.image.resize(
                crop, [view.size, view.size], antialias=antialias
            )
            result[view.name] = tf.cast(crop + 0.5, tf.uint8)
        return result

    examples = source_of(folder).examples(
        start=0, seed=0, shuffle=True, repeat=True
    )
    dataset = examples.map(crops, num_parallel_calls=_CORES.value)
    return drained(dataset.batch(_BATCH).prefetch(2))


def take_turns(loaders):
    """Runs loaders in turns; returns ms per image, {name: list of turns}."""
    for run in loaders.values():
        run()
    times = {name: [] for name in loaders}
    for _ in range(_ROUNDS.value):
        for name, run in loaders.items():
            time.sleep(1)  # lets the other loaders fill their buffers
            run()  # uses up this loader's prefetched batches
            start = time.perf_counter()
            images = run()
            times[name].append(1000 * (time.perf_counter() - start) / images)
    return times


def report(title, times, references=()):
    """Prints medians of the times, and of the ratios within each turn."""
    print(f"\n{title}; {_CORES.value} core(s), {_ROUNDS.value} turns")
    for name, values in times.items():
        print(f"  {name:30} {statistics.median(values):7.2f} ms/image")
        for reference in references:
            ratios = [b / a for a, b in zip(values, times[reference])]
            if name != reference:
                print(
                    f"    {statistics.median(ratios):5.2f} x as fast as "
                    f"'{reference}' ({min(ratios):.2f} to {max(ratios):.2f})"
                )
    sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
