"""Decoding, batches as a function of (seed, step), and unreadable images."""

import dataclasses
import gc
import io
import weakref

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clsa_tf.augment.chain import complete_batch
from clsa_tf.augment.views import View, params_key, unpack
from clsa_tf.data import batch_parts, decode, headers
from clsa_tf.data.batch_parts import BatchParts
from clsa_tf.data.batch_rows import arrange
from clsa_tf.data.evaluation_batches import evaluation_batches
from clsa_tf.data.open import open_source
from clsa_tf.data.order import ALONE, Worker
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.source import Source
from clsa_tf.data.source_checks import check_sizes
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from tests.marks import slow_but
from tests.modules import copied

WEAK = View("query", 8, 0.2, 1.0)
KEY = View("key", 8, 0.2, 1.0, shuffle=True)
VIEWS = (
    WEAK,
    KEY,
    View("strong_0", 6, 0.2, 1.0, strong_ops=2),
    View("strong_1", 6, 0.2, 1.0, strong_ops=2),
)


def picture(number=0, size=(31, 23)):
    """A coloured picture with details as large as in a photograph."""
    grid = np.random.RandomState(number).randint(0, 256, (4, 5, 3))
    return Image.fromarray(grid.astype(np.uint8)).resize(size, Image.BICUBIC)


def contents(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_alpha(image):
    alpha = Image.linear_gradient("L").resize(image.size)
    image = image.copy()
    image.putalpha(alpha)
    return image


READABLE = {
    "JPEG": contents(picture(), "JPEG"),
    "JPEG, progressive": contents(picture(), "JPEG", progressive=True),
    "JPEG, grey": contents(picture().convert("L"), "JPEG"),
    "JPEG, CMYK": contents(picture().convert("CMYK"), "JPEG"),
    "JPEG, 1 px": contents(picture(size=(1, 1)), "JPEG"),
    "PNG": contents(picture(), "PNG"),
    "PNG, grey": contents(picture().convert("L"), "PNG"),
    "PNG, 1 bit": contents(picture().convert("1"), "PNG"),
    "PNG, palette": contents(picture().quantize(16), "PNG"),
    "PNG, alpha": contents(with_alpha(picture()), "PNG"),
    "PNG, grey and alpha": contents(with_alpha(picture().convert("L")), "PNG"),
    "BMP": contents(picture(), "BMP"),
    "BMP, alpha": contents(with_alpha(picture()), "BMP"),
    "BMP, grey": contents(picture().convert("L"), "BMP"),
    "BMP, palette": contents(picture().quantize(16), "BMP"),
    "GIF": contents(picture(), "GIF"),
    "GIF, animated": contents(
        picture(), "GIF", save_all=True, append_images=[picture(1)]
    ),
}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: rotated by 90 degrees
UNREADABLE = {
    "truncated.jpg": READABLE["JPEG"][:300],
    "truncated.png": READABLE["PNG"][:-60],
    "truncated.bmp": READABLE["BMP"][:-60],
    "truncated.gif": READABLE["GIF"][:60],
    "text.jpg": b"This is not an image.",
    "header.bmp": b"BM",
    "empty.png": b"",
}


def photo_folder(path, good=12, bad=()):
    """Writes images a-00.png … and bad files; returns the source."""
    path.mkdir(exist_ok=True)
    for n in range(good):
        picture(n).save(path / f"a-{n:02d}.png")
    for name in bad:
        (path / name).write_bytes(UNREADABLE.get(name, b"no image"))
    return open_source(f"folder:{path}", labels="none")


def batches(source, count, *, start=0, share=0.0, unreadable=None, **options):
    settings = dict(batch_size=5, seed=3, views=(WEAK, KEY))
    settings.update(options)
    data = training_batches(
        source,
        settings.pop("views"),
        start_step=start,
        unreadable=unreadable or UnreadableImages(max_bad_share=share),
        **settings,
    )
    return list(data.take(count).as_numpy_iterator())


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def one_sentence(error):
    text = str(error)
    assert text.startswith("Cannot ") or (
        text.startswith("Expected ") and ", received " in text
    )
    assert text.endswith(".") and "; " in text and "\n" not in text
    return text


# Parts of a batch


@pytest.mark.slow
def test_parts_of_workers_make_up_the_batch(tmp_path):
    source = photo_folder(tmp_path, good=12)
    options = dict(batch_size=8, views=VIEWS, start=1)
    whole = batches(source, 3, **options)
    parts = [batches(source, 3, worker=Worker(i, 2), **options) for i in (0, 1)]
    for step, batch in enumerate(whole):
        joined = {
            name: np.concatenate([part[step][name] for part in parts])
            for name in batch
        }
        # Several loaders leave it to the replicas to permute the rows.
        np.testing.assert_array_equal(joined["key_order"], batch["key_order"])
        joined["key"] = joined["key"][joined["key_order"]]
        for name in batch:
            np.testing.assert_array_equal(joined[name], batch[name])


def test_replicas_get_views_in_both_orders(tmp_path):
    """A single replica permutes them itself."""
    source = photo_folder(tmp_path, good=12)
    views = (dataclasses.replace(KEY, both_orders=True),)
    (alone,) = batches(source, 1, batch_size=8, views=views)
    halves = batches(source, 2, batch_size=8, views=views, replicas=2)
    batch = {
        name: np.concatenate([half[name] for half in halves])
        for name in halves[0]
    }
    assert batch.keys() - alone.keys() == {"key_shuffled"}
    order = alone["key_order"]
    np.testing.assert_array_equal(batch["key"], alone["key"])
    np.testing.assert_array_equal(batch["key_shuffled"], alone["key"][order])
    assert np.any(order != np.arange(8))


def counting_stream(size):
    """A stream whose elements are the numbers of their epochs."""

    def epoch(seed, number, reader=ALONE):
        del seed, reader
        return tf.data.Dataset.from_tensors(number).repeat(size)

    return Source("numbers", size, None, False, epoch, read=None)


@pytest.mark.parametrize("start", [0, 5, 20])
def test_services_keep_to_the_epochs_of_the_run(start):
    """9 parts of 4 records in an epoch, for 2 services."""
    parts = BatchParts(
        counting_stream(38),
        VIEWS,
        batch_size=12,
        seed=0,
        start_step=start,
        worker=ALONE,
        completed=True,
        keep_params=False,
        whole_epochs=True,
    )
    made = 0
    for first in (0, 1):
        items = parts._items(4, first, 2).take(60)
        for counter, epoch in items.as_numpy_iterator():
            assert counter // 36 == epoch
            made += 1
    assert made == 120


@pytest.mark.slow
def test_replicas_get_the_batch_in_parts(tmp_path):
    source = photo_folder(tmp_path, good=12)
    options = dict(batch_size=8, views=VIEWS)
    whole = batches(source, 2, **options)
    parts = batches(source, 8, replicas=4, **options)
    for step, batch in enumerate(whole):
        for name in batch:
            joined = [part[name] for part in parts[4 * step : 4 * step + 4]]
            np.testing.assert_array_equal(np.concatenate(joined), batch[name])


@pytest.mark.slow
@pytest.mark.parametrize("completed", [True, False])
@pytest.mark.parametrize("replicas, count", [(1, 1), (2, 1), (2, 2)])
def test_shapes_are_static_and_the_data_endless(
    tmp_path, completed, replicas, count
):
    """Accelerators compile for one shape; workers cannot negotiate it."""
    data = training_batches(
        photo_folder(tmp_path, good=12),
        VIEWS,
        batch_size=8,
        seed=1,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.0),
        completed=completed,
        worker=Worker(0, count),
        replicas=replicas,
    )
    for spec in data.element_spec.values():
        assert spec.shape.is_fully_defined()
        assert spec.shape[0] == 8 // (count * replicas)
    assert data.cardinality() == tf.data.INFINITE_CARDINALITY


# Decoding


@pytest.mark.parametrize("kind", READABLE)
def test_decode_equals_pillow(kind):
    expected = Image.open(io.BytesIO(READABLE[kind])).convert("RGB")
    for function in (decode.decode, tf.function(decode.decode)):
        image = function(tf.constant(READABLE[kind]))
        assert image.dtype == tf.uint8
        np.testing.assert_array_equal(image, expected)


def test_sixteen_bits_keep_the_high_byte():
    values = np.arange(0, 65536, 97, dtype=np.uint16).reshape(26, 26)
    image = decode.decode(contents(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(image[..., 1], values // 256)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_have_a_code_and_are_black(name):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode.decode(tf.constant(UNREADABLE[name]))
    data = tf.data.Dataset.from_tensors(UNREADABLE[name])
    data = data.map(lambda x: decode.try_decode(x, headers.DEFAULT))
    code, image = next(iter(data))
    assert code != headers.OK
    np.testing.assert_array_equal(image, np.zeros([1, 1, 3]))


# Batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(source):
    """Steps 0 … 7: three epochs."""
    return batches(source, 8)


@pytest.fixture(scope="module")
def strong(source):
    """Steps 0 and 1, with strong views."""
    return batches(source, 2, views=VIEWS)


def test_batches_have_the_stated_shapes_and_types(strong):
    shapes = {name: (x.shape, x.dtype) for name, x in strong[0].items()}
    assert shapes == {
        "index": ((5,), np.int64),
        "query": ((5, 8, 8, 3), np.uint8),
        "key": ((5, 8, 8, 3), np.uint8),
        "key_order": ((5,), np.int32),
        "strong_0": ((5, 6, 6, 3), np.uint8),
        "strong_1": ((5, 6, 6, 3), np.uint8),
    }


def test_shapes_of_batches_are_static(source):
    data = training_batches(
        source,
        (WEAK, KEY),
        batch_size=5,
        seed=0,
        start_step=0,
        unreadable=UnreadableImages(max_bad_share=0.0),
    )
    shapes = {n: tuple(spec.shape) for n, spec in data.element_spec.items()}
    assert shapes["key"] == shapes["query"] == (5, 8, 8, 3)
    assert shapes["key_order"] == (5,)


@pytest.mark.parametrize("start", slow_but(1, [5, 1]))  # 12 images, 5 a step
def test_tail_after_a_restart_is_the_same(source, whole, start):
    tail = batches(source, 8 - start, start=start)
    assert_same(tail, whole[start:])


@pytest.mark.slow
@pytest.mark.parametrize("parallel_calls", [1, 7])
def test_parallel_equals_serial(source, whole, parallel_calls):
    again = batches(source, 8, parallel_calls=parallel_calls)
    assert_same(again, whole)


def test_strong_views_after_a_restart_are_the_same(source, strong):
    tail = batches(source, 1, start=1, views=VIEWS, parallel_calls=1)
    assert_same(tail, strong[1:])


@pytest.mark.slow
def test_batches_depend_on_their_seed_only(source, whole):
    tf.random.set_seed(11)
    assert_same(batches(source, 2), whole[:2])
    other = batches(source, 1, seed=4)[0]
    assert not np.array_equal(other["query"], whole[0]["query"])


def test_views_have_different_seeds(whole, strong):
    for batch in strong:
        for a, b in zip(batch["strong_0"], batch["strong_1"]):
            assert not np.array_equal(a, b)
    # Twelve images, eight steps: images are repeated, with other crops.
    rows = np.concatenate([b["query"] for b in whole])
    assert len(np.unique(rows.reshape(len(rows), -1), axis=0)) == len(rows)


def test_a_view_does_not_depend_on_later_views(whole, strong):
    for a, b in zip(whole[:2], strong):
        np.testing.assert_array_equal(a["query"], b["query"])
        np.testing.assert_array_equal(a["key"], b["key"])


@pytest.mark.parametrize("batch_size", slow_but(1, [4, 1, 2, 12]))
def test_a_row_depends_on_its_counter_only(source, batch_size):
    """It does not depend on the number of examples per call."""
    count = -(-15 // batch_size)
    options = dict(whole_epochs=False)  # their length depends on the batch
    others = batches(source, count, batch_size=batch_size, **options)
    whole = batches(source, 3, **options)
    rows = np.concatenate([b["query"] for b in whole])
    np.testing.assert_array_equal(
        rows, np.concatenate([b["query"] for b in others])[:15]
    )


@pytest.mark.slow
def test_shuffled_rows_can_be_put_back_in_order(source):
    views = [
        View(name, 8, 0.2, 1.0, shuffle=shuffle)
        for name, shuffle in (("a", False), ("b", True), ("c", True))
    ]
    straight = [View(v.name, 8, 0.2, 1.0) for v in views]
    steps = batches(source, 4, views=views)
    permutations = []
    for batch, expected in zip(steps, batches(source, 4, views=straight)):
        assert batch.keys() == expected.keys() | {"b_order", "c_order"}
        np.testing.assert_array_equal(batch["a"], expected["a"])
        for name in "bc":
            rows = batch[f"{name}_order"]
            assert sorted(rows) == list(range(5))
            np.testing.assert_array_equal(batch[name], expected[name][rows])
            np.testing.assert_array_equal(
                batch[name][np.argsort(rows)], expected[name]
            )
            permutations.append(tuple(rows))
    assert len(set(permutations)) > 5
    assert_same(batches(source, 1, start=3, views=views), steps[3:])


def test_permutations_stay_what_they_were():
    """Golden values: with others, runs could not be repeated."""
    views = [View(name, 8, 0.2, 1.0, shuffle=True) for name in "ab"]
    batch = {name: tf.range(12) for name in ("a", "b", "index", "label")}
    found = arrange(
        batch | {"valid": tf.fill([12], True)},
        tf.range(12),
        views,
        seed=3,
        step=7,
        worker=Worker(),
        copies=False,
    )
    a = [3, 11, 8, 2, 7, 5, 6, 1, 4, 0, 9, 10]
    b = [9, 4, 8, 6, 11, 3, 2, 1, 10, 0, 5, 7]
    for name, order in (("a", a), ("b", b)):
        np.testing.assert_array_equal(found[f"{name}_order"], order)
        np.testing.assert_array_equal(found[name], order)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 10**9])
def test_records_after_a_restart_are_the_same(tmp_path, limit):
    with tf.io.TFRecordWriter(str(tmp_path / "r-0")) as first:
        with tf.io.TFRecordWriter(str(tmp_path / "r-1")) as second:
            for n in range(13):
                image = tf.train.Feature(
                    bytes_list=tf.train.BytesList(
                        value=[contents(picture(n), "JPEG")]
                    )
                )
                example = tf.train.Example(
                    features=tf.train.Features(feature={"image": image})
                )
                writer = first if n < 8 else second
                writer.write(example.SerializeToString())
    source = open_source(
        f"tfrecord:{tmp_path}/r-*", window=4, memory_bytes=limit
    )
    whole = batches(source, 7)
    tail = batches(source, 4, start=3, parallel_calls=1)
    assert_same(tail, whole[3:])


# Unreadable images


@pytest.mark.slow
def test_all_kinds_of_files_can_be_mixed(tmp_path):
    for i, (kind, content) in enumerate(READABLE.items()):
        suffix = kind[:3].replace("JPE", "jpg").lower()
        (tmp_path / f"{i:02d}.{suffix}").write_bytes(content)
    source = photo_folder(tmp_path, good=0, bad=UNREADABLE)
    assert source.size == len(READABLE) + len(UNREADABLE)
    unreadable = UnreadableImages(max_bad_share=0.5)
    steps = batches(source, 8, batch_size=12, unreadable=unreadable)
    assert len(steps) == 8  # four epochs
    assert unreadable.count == len(UNREADABLE) and unreadable.error() is None


def test_programs_of_earlier_views_are_freed():
    fresh = copied(batch_parts)  # with an empty cache
    fresh.compiled_draw = lambda views: views
    first, *_ = [weakref.ref(fresh._draw((), seed)) for seed in range(17)]
    assert fresh._draw.cache_info().currsize == 16
    gc.collect()
    assert first() is None


def test_bad_rows_are_replaced_by_the_next_readable_one(tmp_path):
    source = photo_folder(tmp_path)
    good = batches(source, 24, batch_size=1)  # step = counter
    examples = source.examples(start=0, seed=3, shuffle=True, repeat=True)
    order = [
        e["name"].decode()[-6:-4] for e in examples.take(24).as_numpy_iterator()
    ]
    bad = [order[place] for place in (0, 4, 5, 9)]  # 5 ends its batch
    for number in bad:
        (tmp_path / f"a-{number}.png").write_bytes(b"damaged meanwhile")
    steps = batches(source, 4, batch_size=6, share=0.5)
    replaced = 0
    for step, batch in enumerate(steps):
        counters = list(range(6 * step, 6 * step + 6))
        for row, counter in enumerate(counters):
            following = counters[row:] + counters[:row]
            replacement = next(i for i in following if order[i] not in bad)
            replaced += replacement != counter
            for name, place in (
                ("query", row),
                ("key", batch["key_order"].tolist().index(row)),
            ):
                np.testing.assert_array_equal(
                    batch[name][place], good[replacement][name][0]
                )
    assert replaced == 8  # four bad images in each of two epochs


def run_until_error(source, unreadable, **options):
    with pytest.raises(tf.errors.OpError):
        batches(source, 20, unreadable=unreadable, **options)
    return one_sentence(unreadable.error())


def test_too_many_bad_images_are_an_error(tmp_path):
    source = photo_folder(tmp_path, bad=("b.png", "text.jpg"))
    tolerant = UnreadableImages(max_bad_share=0.15)  # of 14
    batches(source, 9, unreadable=tolerant)
    assert tolerant.error() is None and tolerant.count == 2
    strict = UnreadableImages(max_bad_share=0.14)
    text = run_until_error(source, strict)
    assert "2 among 14 (14.3%)" in text
    assert "at most 14.0%" in text and "--max_bad_share" in text
    assert str(tmp_path / "text.jpg") in text
    assert str(tmp_path / "b.png") in text


def test_a_batch_without_any_readable_image_is_an_error(tmp_path):
    source = photo_folder(
        tmp_path, good=1, bad=[f"b-{n}.png" for n in range(9)]
    )
    text = run_until_error(
        source, UnreadableImages(max_bad_share=1.0), batch_size=2
    )
    assert "whole batch" in text and "b-" in text


def large(size):
    """A source that is never read."""
    return Source(f"of {size}", size, None, True, None, None)


def named(names):
    """Returns names, with the reason why they cannot be read."""
    return dict.fromkeys(names, "is damaged")


def test_names_of_earlier_versions_have_no_reason(tmp_path):
    (tmp_path / "unreadable.txt").write_text("a\n")
    unreadable = UnreadableImages(max_bad_share=0.5)
    unreadable.record(tmp_path)
    assert unreadable.report(named("ab"), source=large(100), seen=2)
    assert unreadable.count == 2
    written = (tmp_path / "unreadable.txt").read_text()
    assert written == "a\nb\tis damaged\n"


def test_up_to_ten_bad_images_are_tolerated():
    source, unreadable = large(10**6), UnreadableImages(max_bad_share=0.01)
    ten = named(f"{n}" for n in range(10))
    assert unreadable.report(ten, source=source, seen=20)
    assert unreadable.report(named("34"), source=source, seen=30)  # known ones
    assert unreadable.count == 10 and unreadable.error() is None
    assert not unreadable.report(named("x"), source=source, seen=40)
    assert "11 among 40 (27.5%)" in one_sentence(unreadable.error())
    assert not unreadable.report({}, source=source, seen=10**6)  # it persists


def test_the_share_counts_distinct_images():
    many = named(f"{n}" for n in range(50))
    unreadable = UnreadableImages(max_bad_share=0.01)
    assert unreadable.report(many, source=large(10**6), seen=5000)
    small = large(200)  # seen 25 times
    assert unreadable.report(named("ab"), source=small, seen=5000)
    assert not unreadable.report(named("c"), source=small, seen=5000)
    text = one_sentence(unreadable.error())
    assert "3 among 200" in text and "of 200" in text


def test_only_ten_names_are_logged(capsys):
    unreadable = UnreadableImages(max_bad_share=1.0)
    for n in range(15):
        names = named([f"file-{n}", "file-0"])
        unreadable.report(names, source=large(100), seen=n + 1)
    *logged, last = capsys.readouterr().err.splitlines()
    assert len(logged) == 10 and last.endswith("are only counted.")
    assert (
        logged[-1] == "Cannot read the image file-9, which is damaged; skipped."
    )
    assert unreadable.count == 15


def test_names_follow_a_dataset_that_has_moved(tmp_path):
    unreadable = UnreadableImages(max_bad_share=1.0)
    unreadable.record(tmp_path)
    names = ["/old/a.jpg", "/older/b.jpg", "/eval/old/c.jpg"]
    unreadable.report(named(names), source=large(100), seen=3)
    unreadable = UnreadableImages(max_bad_share=1.0)
    moved = [("folder:/old", "folder:/new/place"), ("folder:/eval/", "/e")]
    unreadable.record(tmp_path, moved=moved)
    names = ["/new/place/a.jpg", "/older/b.jpg", "/e/old/c.jpg"]
    unreadable.report(named(names), source=large(100), seen=3)
    assert unreadable.count == 3
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert lines == [f"{name}\tis damaged" for name in names]


def test_names_are_kept_across_restarts(tmp_path, capsys):
    for names in (["a", "b\nc"], ["b\nc", "d\te"]):
        unreadable = UnreadableImages(max_bad_share=0.02)
        unreadable.record(tmp_path)
        # Names that were known before do not count in the share of this start.
        assert unreadable.report(named(names), source=large(100), seen=2)
    assert unreadable.count == 3 and str(tmp_path) in unreadable.summary()
    path = tmp_path / "unreadable.txt"
    assert path.read_text() == (
        "a\tis damaged\nb c\tis damaged\nd e\tis damaged\n"
    )
    assert len(capsys.readouterr().err.splitlines()) == 3
    path.unlink()
    path.symlink_to("/dev/full")
    assert not unreadable.report(named("e"), source=large(1000), seen=1000)
    assert "No space left" in one_sentence(unreadable.error())


@pytest.mark.slow
def test_device_and_host_make_the_same_views(source, strong):
    raw = batches(source, len(strong), views=VIEWS, completed=False)
    for host, crops in zip(strong, raw):
        crops = tf.nest.map_structure(tf.constant, crops)
        device = complete_batch(crops, views=VIEWS)
        for name, images in host.items():
            np.testing.assert_array_equal(device[name], images)


@pytest.mark.slow
def test_draws_can_be_kept_with_the_views(source, strong):
    kept = batches(source, len(strong), views=VIEWS, keep_params=True)
    for batch, expected in zip(kept, strong):
        for name, images in expected.items():
            np.testing.assert_array_equal(batch[name], images)
        # The draws of a shuffled view have its order.
        params = {v.name: unpack(batch[params_key(v)], v) for v in VIEWS}
        boxes = {name: drawn["box"].numpy() for name, drawn in params.items()}
        unshuffled = boxes["query"][batch["key_order"]]
        assert not np.array_equal(boxes["key"], unshuffled)
        assert params["strong_0"]["strong"]["op"].shape == (5, 2)


@pytest.mark.slow
def test_strange_files_make_views_or_are_counted(tmp_path):
    strange = {
        "tall.jpg": contents(picture(size=(1, 3000)), "JPEG"),
        "wide.png": contents(picture(size=(3000, 1)), "PNG"),
        "pixel.bmp": contents(picture(size=(1, 1)), "BMP"),
        "deep.png": contents(
            Image.fromarray(np.full([9, 7], 40000, np.uint16)), "PNG"
        ),
        "turned.jpg": contents(picture(), "JPEG", exif=TURNED),
        "large.jpg": contents(picture(size=(900, 700)), "JPEG"),
        "cut.jpg": contents(picture(size=(900, 700)), "JPEG")[:-3000],
        "header.jpg": contents(picture(size=(900, 700)), "JPEG")[:400],
    }
    for name, data in strange.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(f"folder:{tmp_path}", labels="none")
    unreadable = UnreadableImages(max_bad_share=0.5)
    made = batches(source, 3, views=VIEWS, batch_size=8, unreadable=unreadable)
    assert len(made) == 3 and unreadable.count == 2
    assert made[0]["query"].shape == (8, 8, 8, 3)


# Evaluation


def test_evaluation_batches_are_in_order_with_labels(tmp_path):
    for n in range(7):
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        Image.new("L", (12, 10), 10 * n).save(
            tmp_path / "ab"[n % 2] / f"{n}.png"
        )
    (tmp_path / "a" / "3.png").write_bytes(b"bad")
    source = open_source(f"folder:{tmp_path}", holdout=0.0)
    unreadable = UnreadableImages(max_bad_share=0.2)
    found = list(
        evaluation_batches(
            source,
            image_size=4,
            crop_ratio=0.875,
            batch_size=3,
            unreadable=unreadable,
        ).as_numpy_iterator()
    )
    assert [images.shape[0] for images, _ in found] == [3, 3, 1]
    images = np.concatenate([images for images, _ in found])
    labels = np.concatenate([labels for _, labels in found])
    assert images.shape == (7, 4, 4, 3) and images.dtype == np.uint8
    expected = np.array([0, 20, 40, 60, 10, 30, 50])[:, None, None, None]
    np.testing.assert_array_equal(images, expected + np.zeros([4, 4, 3]))
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert labels.dtype == np.int64
    assert unreadable.count == 1 and unreadable.error() is None


@pytest.mark.slow
def test_evaluation_of_a_part_has_images_of_all_classes(tmp_path):
    for n in range(40):  # the first ones are all of one class
        (tmp_path / "ab"[n // 20]).mkdir(exist_ok=True)
        Image.new("L", (5, 5), n).save(
            tmp_path / "ab"[n // 20] / f"{n:02d}.png"
        )
    source = open_source(f"folder:{tmp_path}", holdout=0.0)

    def pixels_and_labels(limit):
        data = evaluation_batches(
            source,
            image_size=2,
            crop_ratio=1.0,
            batch_size=5,
            unreadable=UnreadableImages(max_bad_share=0.0),
            limit=limit,
        )
        found = list(data.unbatch().as_numpy_iterator())
        return [(int(image[0, 0, 0]), label) for image, label in found]

    part = pixels_and_labels(12)
    assert len(set(part)) == 12 and {label for _, label in part} == {0, 1}
    assert all(label == pixel // 20 for pixel, label in part)
    assert pixels_and_labels(12) == part
    assert pixels_and_labels(99) == [(n, n // 20) for n in range(40)]


def test_evaluation_with_too_many_bad_images_is_an_error(tmp_path):
    source = photo_folder(tmp_path, good=3, bad=("text.jpg",))
    unreadable = UnreadableImages(max_bad_share=0.1)
    data = evaluation_batches(
        source,
        image_size=4,
        crop_ratio=1.0,
        batch_size=2,
        unreadable=unreadable,
    )
    with pytest.raises(tf.errors.OpError):
        list(data)
    assert "1 among 4" in one_sentence(unreadable.error())


# Checks


def test_a_batch_larger_than_the_dataset_is_rejected(source):
    with pytest.raises(UserError) as error:
        batches(source, 1, batch_size=13)
    text = one_sentence(error.value)
    assert "at most 12" in text and "--batch_size=13" in text
    assert batches(source, 1, batch_size=12, views=(WEAK,))


@pytest.mark.slow
def test_crops_larger_than_most_images_are_rejected(tmp_path):
    for n in range(9):  # the longer side decides: five are smaller than 32
        size = (30, 20) if n < 5 else (20, 32)
        picture(n, size).save(tmp_path / f"{n}.png")
    source = open_source(f"folder:{tmp_path}")
    views = (WEAK, View("large", 32, 0.2, 1.0))
    with pytest.raises(UserError) as error:
        check_sizes(source, views, allow_upscaling=False)
    text = one_sentence(error.value)
    assert "32 px" in text and "30x20 px" in text
    assert "--allow_upscaling" in text
    check_sizes(source, views, allow_upscaling=True)
    check_sizes(source, VIEWS, allow_upscaling=False)
    (tmp_path / "0.png").unlink()  # four of eight remain: not more than half
    check_sizes(source, views, allow_upscaling=False)


@pytest.mark.slow
def test_a_dataset_without_readable_images_is_rejected(tmp_path):
    source = photo_folder(tmp_path, good=0, bad=UNREADABLE)
    with pytest.raises(UserError) as error:
        check_sizes(source, VIEWS, allow_upscaling=True)
    words = f"received {len(UNREADABLE)} samples that cannot be decoded"
    assert words in one_sentence(error.value)
