"""Sources: their images, labels and order."""

import io
import os
import posixpath
import shutil
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from clsa_tf.data import headers
from clsa_tf.data import source as source_lib
from clsa_tf.data.open import open_eval_source, open_source, open_train_source
from clsa_tf.data.order import Worker
from clsa_tf.data.shapes import dataset
from clsa_tf.data.source import Absent
from clsa_tf.errors import UserError
from tests.marks import slow_but


def write_image(path, number=0, size=(8, 6), mode="RGB"):
    """Writes an image whose pixels follow from `number`."""
    pixels = np.random.RandomState(number).randint(0, 256, (*size[::-1], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)
    return path


def encoded(number):
    """Returns the bytes of a PNG that follow from `number`."""
    buffer = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (6, 8, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_records(
    path, numbers, *, image="image/encoded", label="image/class/label"
):
    """Writes one TFRecord file; the label is the number modulo 3."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for n in numbers:
            feature = {
                image: tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[encoded(n)])
                )
            }
            if label:
                feature[label] = tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[n % 3])
                )
            features = tf.train.Features(feature=feature)
            writer.write(
                tf.train.Example(features=features).SerializeToString()
            )


@pytest.fixture
def records(tmp_path):
    """Pattern of 40 records in 5 files of unequal length."""
    bounds = [0, 3, 20, 21, 30, 40]
    for i, (a, b) in enumerate(zip(bounds, bounds[1:])):
        write_records(tmp_path / f"train-{i}.tfrecord", range(a, b))
    return f"tfrecord:{tmp_path}/train-*"


@pytest.fixture
def photos(tmp_path):
    """Folder with two classes of 30 images."""
    for n in range(60):
        write_image(tmp_path / "ab"[n % 2] / f"{n:02d}.png", n)
    return tmp_path


def read(source, *, start=0, seed=1, shuffle=True, count=None):
    """Returns the examples; one epoch in order if not shuffled."""
    data = source.examples(
        start=start, seed=seed, shuffle=shuffle, repeat=shuffle
    )
    return list(data.take(-1 if count is None else count).as_numpy_iterator())


def names(examples):
    return [e["name"].decode() for e in examples]


def message(**kwargs):
    with pytest.raises(UserError) as error:
        open_source(**kwargs)
    text = str(error.value)
    assert text.startswith("Expected ") and ", received " in text
    assert text.endswith(".") and "; " in text and "\n" not in text
    return text


# Order


@pytest.fixture(params=["folder", "memory", "streamed"])
def source(request, photos, records):
    if request.param == "folder":
        return open_source(f"folder:{photos}", labels="none")
    limit = 10**9 if request.param == "memory" else 0
    result = open_source(records, memory_bytes=limit, window=7)
    assert result.random_access == (request.param == "memory")
    return result


def test_every_example_occurs_once_per_epoch(source):
    n = source.size
    examples = read(source, count=3 * n)
    assert [e["counter"] for e in examples] == list(range(3 * n))
    epochs = [names(examples[e * n : (e + 1) * n]) for e in range(3)]
    fixed = names(read(source, shuffle=False))
    assert len(set(fixed)) == n
    assert all(sorted(epoch) == sorted(fixed) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != fixed != epochs[0]


def test_order_depends_on_the_seed_only(source):
    tf.random.set_seed(4)
    first = names(read(source, count=source.size + 9))
    tf.random.set_seed(5)
    assert names(read(source, count=source.size + 9)) == first
    assert names(read(source, seed=2, count=source.size)) != first[:-9]


@pytest.mark.parametrize("share", slow_but(1, [1.8, 0.3, 1.0]))
def test_tail_after_a_restart_is_the_same(source, share):
    start = int(source.size * share)
    whole = read(source, count=source.size * 2 + 5)
    tail = read(source, start=start, count=source.size * 2 + 5 - start)
    assert len(tail) == len(whole) - start
    assert tail == whole[start:]


def read_part(
    source, index, count, batches, *, start=0, batch_size=8, whole=False
):
    """Names and counters of one worker's part of some batches."""
    items = source.items_of(
        Worker(index, count),
        start=start * batch_size,
        seed=1,
        batch_size=batch_size,
        whole_epochs=whole,
    )
    items = items.map(lambda i, item: (i, source.read(item)["name"]))
    rows = list(items.take(batches * batch_size // count).as_numpy_iterator())
    return [int(i) for i, _ in rows], [name.decode() for _, name in rows]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_workers_make_parts_of_the_same_batches(source, count):
    """With random access the examples are the same, with files they differ."""
    whole = read(source, count=20 * 8)
    parts = [read_part(source, i, count, 20) for i in range(count)]
    joined = [[] for _ in range(20)]
    for counters, part in parts:
        share = 8 // count
        for step in range(20):
            rows = slice(step * share, (step + 1) * share)
            joined[step] += zip(counters[rows], part[rows])
    joined = [row for step in joined for row in step]
    assert [i for i, _ in joined] == list(range(20 * 8))
    if source.random_access or count == 1:
        assert [name for _, name in joined] == names(whole)


@pytest.mark.parametrize("count", slow_but(1, [2, 1]))
def test_no_batch_holds_an_image_twice(source, count):
    """An epoch ends with its last whole batch; the rest is left out."""
    size = 14  # leaves a rest of 40 and of 60 images
    each = source.size // size
    assert source.size % size
    options = dict(batch_size=size)
    found = [
        read_part(source, i, count, 8 * each, whole=True, **options)[1]
        for i in range(count)
    ]
    share = size // count
    steps = [
        sum((part[share * i :][:share] for part in found), [])
        for i in range(8 * each)
    ]
    if source.random_access or count == 1:
        for epoch in range(8):
            names = sum(steps[epoch * each :][:each], [])
            assert len(set(names)) == size * each
        # Other images are left out in other epochs.
        assert len(set(sum(steps, []))) > size * each
    if source.random_access:
        # Otherwise some batch reaches into the next epoch. (In a stream none
        # has to: records stay near their position.)
        _, names = read_part(source, 0, 1, 8 * each, **options)
        assert any(
            len(set(names[i : i + size])) < size
            for i in range(0, len(names), size)
        )
    for i, part in enumerate(found):  # a restart changes nothing
        _, tail = read_part(
            source, i, count, each, start=each + 1, whole=True, **options
        )
        assert tail == part[(each + 1) * share :][: each * share]


@pytest.mark.slow
def test_each_worker_reads_its_own_files(records):
    source = open_source(records, memory_bytes=0, window=7)
    epoch = source.size // 2 // 4  # batches of 8 in half the records
    seen = []
    for start in range(0, 10 * epoch, epoch):
        parts = [
            {
                name.split(" #")[0]
                for name in read_part(source, i, 2, epoch, start=start)[1]
            }
            for i in (0, 1)
        ]
        assert not parts[0] & parts[1]
        seen += parts
    # Files differ between epochs, so that none is left out for good.
    assert len(set(map(frozenset, seen))) > 3
    assert len(set.union(*seen)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8])  # five files
def test_a_restarted_worker_reads_the_same_tail(source, count):
    for index in (0, count - 1):
        counters, found = read_part(source, index, count, 20)
        share = 8 // count
        tail = read_part(source, index, count, 13, start=7)
        assert tail == (counters[7 * share :], found[7 * share :])


def test_more_workers_than_files_share_the_records(tmp_path):
    write_records(tmp_path / "one", range(16))
    source = open_source(f"tfrecord:{tmp_path}/one", memory_bytes=0)
    parts = [read_part(source, i, 4, 2)[1] for i in range(4)]
    assert len(set(sum(parts, []))) == 16


def test_an_unshuffled_source_ends_after_one_epoch(source):
    examples = read(source, shuffle=False)
    assert [e["counter"] for e in examples] == list(range(source.size))
    assert read(source, shuffle=False, start=source.size - 2) == examples[-2:]


def test_small_sources_are_shuffled_uniformly(tmp_path):
    for n in range(4):
        write_image(tmp_path / f"{n}.png", n)
    source = open_source(f"folder:{tmp_path}")
    order = np.array(names(read(source, count=4 * 600))).reshape(600, 4)
    permutations, counts = np.unique(order, axis=0, return_counts=True)
    assert len(permutations) == 24
    assert counts.min() > 5 and counts.max() < 50  # 25 expected, deviation 5


def test_the_order_stays_what_it_was(records):
    """Golden values: with others, runs could not be repeated."""
    data = source_lib.indexed("numbers", 12, None, None)
    epochs = [list(data.epoch(3, e).as_numpy_iterator()) for e in (0, 1)]
    assert epochs == [
        [7, 4, 1, 0, 5, 9, 6, 8, 10, 2, 3, 11],
        [3, 5, 4, 0, 1, 7, 8, 10, 6, 9, 2, 11],
    ]
    streamed = open_source(records, memory_bytes=0, window=7)
    order = [
        "".join(filter(str.isdigit, name.rsplit("train-")[-1]))
        for name in names(read(streamed, count=9))
    ]
    # File and number of each record.
    assert order == ["01", "32", "02", "20", "34", "35", "30", "36", "33"]


def test_streamed_shuffle_reaches_across_files(records):
    source = open_source(records, memory_bytes=0)
    files = [name.split(" #")[0] for name in names(read(source, count=40))]
    changes = sum(a != b for a, b in zip(files, files[1:]))
    assert changes > 15


def test_each_epoch_of_one_file_has_another_order(tmp_path):
    write_records(tmp_path / "one", range(20))
    source = open_source(f"tfrecord:{tmp_path}/one", memory_bytes=0)
    order = names(read(source, count=40))
    assert sorted(order[:20]) == sorted(order[20:])
    assert order[:20] != order[20:]


# Folders


def test_folders_contain_visible_image_files_at_any_depth(tmp_path):
    kept = ["a.jpg", "b.JPEG", "x/c.Png", "x/y/z/d.bmp", "x/e.gif"]
    other = [".f.png", ".hidden/g.png", "x/._h.jpg", "note.txt", "i.tif"]
    for path in kept + other:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    rules = headers.DEFAULT._replace(more_formats=False)
    source = open_source(f"folder:{tmp_path}", rules=rules)
    examples = read(source, shuffle=False)
    assert names(examples) == sorted(str(tmp_path / path) for path in kept)
    for e in examples:
        assert e["bytes"] == os.path.relpath(e["name"], bytes(tmp_path))
        assert e["label"] == -1
    assert source.class_names is None


def test_names_may_be_arbitrary_bytes(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(path, "wb") as file:
        file.write(b"content")
    (example,) = read(open_source(f"folder:{tmp_path}"), shuffle=False)
    assert example["name"] == path and example["bytes"] == b"content"


def test_links_are_followed_without_cycles(tmp_path):
    write_image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "photos")
    source = open_source(f"folder:{tmp_path}/photos")
    assert names(read(source, shuffle=False)) == [
        f"{tmp_path}/photos/link/a.png"
    ]


def test_a_deleted_file_is_empty_bytes(photos):
    source = open_source(f"folder:{photos}", labels="none")
    (photos / "a" / "02.png").unlink()
    empty = [e for e in read(source, shuffle=False) if not e["bytes"]]
    assert names(empty) == [str(photos / "a" / "02.png")]


def test_first_level_folders_are_classes(photos):
    (photos / "b" / "deep").mkdir()
    write_image(photos / "b" / "deep" / "x.png")
    source = open_source(f"folder:{photos}", holdout=0.0)
    assert source.class_names == ("a", "b") and source.size == 61
    for e in read(source, shuffle=False):
        folder = os.path.relpath(e["name"].decode(), photos).split("/")[0]
        assert e["label"] == "ab".index(folder)


@pytest.mark.parametrize("change", ["one in root", "one class", "none"])
def test_other_folders_are_unlabelled(tmp_path, photos, change):
    if change == "one in root":
        write_image(photos / "x.png")
    if change == "one class":
        shutil.rmtree(photos / "b")
    labels = "none" if change == "none" else "auto"
    source = open_source(f"folder:{photos}", labels=labels)
    assert source.class_names is None
    assert {e["label"] for e in read(source, shuffle=False)} == {-1}
    assert (
        source.size == {"one in root": 61, "one class": 30, "none": 60}[change]
    )
    words = {
        "one in root": "1 image lies beside its 2 folders (x.png); if these",
        "one class": "it has one (a)",
        "none": "--labels=none",
    }[change]
    assert words in source.unlabelled
    absent = open_source(f"folder:{photos}", labels=labels, role="eval")
    assert absent == Absent(f"no labels in {photos}: {source.unlabelled}")


def test_holdout_is_disjoint_complete_and_fixed(photos):
    def parts(share):
        sources = [
            open_source(f"folder:{photos}", holdout=share, role=role)
            for role in ("train", "eval")
        ]
        assert sources[0].class_names == sources[1].class_names == ("a", "b")
        assert sources[0].held_out == sources[1].size
        return [set(names(read(s, shuffle=False))) for s in sources]

    train, test = parts(0.2)
    assert not train & test and len(train | test) == 60
    assert 3 <= len(test) <= 25
    assert parts(0.2) == [train, test]
    more_train, more_test = parts(0.4)
    assert test < more_test and more_train < train
    write_image(photos / "a" / "new.png")  # moves no other image
    assert test <= parts(0.2)[1] and train <= parts(0.2)[0] | {
        str(photos / "a" / "new.png")
    }


def test_holdout_of_zero_or_one_leaves_one_part_empty(photos):
    absent = open_source(f"folder:{photos}", holdout=0.0, role="eval")
    words = f"--holdout=0 keeps none of the 60 images of {photos}"
    assert absent == Absent(words)
    assert open_source(f"folder:{photos}", holdout=1.0, role="eval").size == 60
    text = message(dataset=f"folder:{photos}", holdout=1.0)
    assert "--holdout=1" in text


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_train_and_test_folders_are_splits(tmp_path, test):
    for n in range(8):
        split = "train" if n < 6 else test
        write_image(tmp_path / split / "ab"[n % 2] / f"{n}.png", n)
    dataset = f"folder:{tmp_path}"
    train, evaluation = open_source(dataset), open_source(dataset, role="eval")
    assert train.size == 6 and evaluation.size == 2
    assert train.class_names == evaluation.class_names == ("a", "b")
    assert [e["label"] for e in read(evaluation, shuffle=False)] == [0, 1]
    assert open_source(dataset, split=test).size == 2
    assert open_source(dataset, labels="none").size == 6
    absent = open_source(dataset, labels="none", role="eval")
    assert absent == Absent(f"no labels in {tmp_path}/{test}: --labels=none")
    bank = open_source(dataset, role="bank")
    assert names(read(bank, shuffle=False)) == names(read(train, shuffle=False))
    assert isinstance(open_source(dataset, role="bank", split="train"), Absent)
    text = message(dataset=dataset, split="extra")
    assert f"train, {test}" in text and "extra" in text


def test_unlabelled_test_folder_is_not_evaluated_on(tmp_path):
    for split in ("train", "val"):
        for n in range(4):
            write_image(tmp_path / split / "ab"[n % 2] / f"{n}.png", n)
    write_image(tmp_path / "test" / "x.png")
    evaluation = open_source(f"folder:{tmp_path}", role="eval")
    assert "/val/" in names(read(evaluation, shuffle=False))[0]


def test_a_test_folder_with_other_classes_is_rejected(tmp_path):
    for n in range(4):
        write_image(tmp_path / "train" / "ab"[n % 2] / f"{n}.png", n)
        write_image(tmp_path / "test" / "ac"[n % 2] / f"{n}.png", n)
    text = message(dataset=f"folder:{tmp_path}", role="eval")
    assert "received c" in text and "--labels=none" in text


def test_a_labelled_test_folder_serves_unlabelled_training_images(tmp_path):
    write_image(tmp_path / "train" / "x.png")
    for n in range(4):
        write_image(tmp_path / "test" / "ab"[n % 2] / f"{n}.png", n)
    write_image(tmp_path / "more" / "y.png")
    dataset = f"folder:{tmp_path}"
    train, test = open_source(dataset), open_source(dataset, role="eval")
    assert train.size == 1 and "no folders in it" in train.unlabelled
    assert "the 1 of 6 images in the folder train" in train.about
    assert test.size == 4 and test.class_names == ("a", "b")


def test_wrong_folders_are_rejected(tmp_path, photos):
    text = message(dataset=f"folder:{tmp_path}/absent")
    assert "does not exist" in text
    path = write_image(tmp_path / "x.png")
    assert "received the file" in message(dataset=f"folder:{path}")
    (tmp_path / "empty").mkdir()
    assert "received no files" in message(dataset=f"folder:{tmp_path}/empty")
    for n in range(3):
        (tmp_path / "empty" / f"{n}.txt").touch()
    text = message(dataset=f"folder:{tmp_path}/empty")
    assert "3 files: 3 .txt" in text
    assert "split" in message(dataset=f"folder:{photos}", split="test")


def test_sources_of_a_run_follow_its_config(tmp_path, photos):
    config = types.SimpleNamespace(
        dataset=f"folder:{photos}",
        split="train",
        eval_dataset="",
        eval_split="",
        data_dir="",
        labels="auto",
        holdout=0.3,
        num_examples=0,
        download=False,
        max_image_bytes=7,
        max_image_pixels=8,
        exif_rotation=False,
        more_formats=False,
    )
    train, test = open_train_source(config), open_eval_source(config)
    assert train.size + test.size == 60 and test.size < 40
    assert train.rules == test.rules == headers.Rules(7, 8, False, False)
    for n in range(4):
        write_image(tmp_path / "new" / "ab"[n % 2] / f"{n}.png", n)
    config.eval_dataset = f"folder:{tmp_path}/new"
    assert open_eval_source(config).size == 4


# TFRecord files


@pytest.mark.parametrize("memory_bytes", [0, 10**9])
def test_records_hold_image_label_and_name(records, memory_bytes):
    source = open_source(records, memory_bytes=memory_bytes)
    assert source.size == 40 and source.class_names == ("0", "1", "2")
    content = {encoded(n): n for n in range(40)}
    for e in read(source, shuffle=False):
        n = content.pop(e["bytes"])
        assert e["label"] == n % 3
        if 3 <= n < 20:
            assert e["name"].decode().endswith(f"train-1.tfrecord #{n - 3}")
    assert not content


def test_records_may_have_keys_of_tfds_and_no_labels(tmp_path):
    write_records(tmp_path / "a", range(4), image="image", label="label")
    write_records(tmp_path / "b", range(4), label=None)
    source = open_source(f"tfrecord:{tmp_path}/a")
    assert [e["label"] for e in read(source, shuffle=False)] == [0, 1, 2, 0]
    assert read(source, shuffle=False)[2]["bytes"] == encoded(2)
    for file, labels, why in (
        ("a", "none", "--labels=none"),
        ("b", "auto", "no integer image/class/label or label"),
    ):
        source = open_source(f"tfrecord:{tmp_path}/{file}", labels=labels)
        assert source.class_names is None and why in source.unlabelled
        assert {e["label"] for e in read(source, shuffle=False)} == {-1}


def test_several_patterns_are_one_source(records, tmp_path):
    pattern = f"tfrecord:{tmp_path}/train-0*,{tmp_path}/train-1*"
    assert open_source(pattern).size == 20
    absent = open_source(pattern, role="eval")
    assert f"training uses all images of {pattern}; " in absent.reason
    assert open_source(pattern, role="eval", holdout=1.0).size == 20


def test_a_wrong_number_of_records_is_an_error(records):
    source = open_source(records, num_examples=40, memory_bytes=0)
    assert source.size == 40 and len(read(source, count=50)) == 50
    wrong = open_source(records, num_examples=41, memory_bytes=0)
    with pytest.raises(tf.errors.FailedPreconditionError):
        read(wrong, count=50)
    assert "received 40" in message(dataset=records, num_examples=41)


def test_wrong_records_are_rejected(tmp_path, records):
    assert "matches no file" in message(dataset=f"tfrecord:{tmp_path}/x/*")
    assert "matches no file" in message(dataset=f"tfrecord:{tmp_path}/no-*")
    assert "no split" in message(dataset=records, split="test")
    (tmp_path / "text").write_bytes(b"not records " * 20)
    assert "cannot be read" in message(dataset=f"tfrecord:{tmp_path}/text")
    whole = (tmp_path / "train-1.tfrecord").read_bytes()
    (tmp_path / "train-1.tfrecord").write_bytes(whole[:-20])
    text = message(dataset=records, memory_bytes=0)
    assert "train-1.tfrecord," in text and "train-2" not in text
    write_records(tmp_path / "odd", range(2), image="pixels")
    text = message(dataset=f"tfrecord:{tmp_path}/odd")
    assert "image/class/label, pixels" in text
    write_records(tmp_path / "none", [])
    assert "received none" in message(dataset=f"tfrecord:{tmp_path}/none")
    with tf.io.TFRecordWriter(str(tmp_path / "other")) as writer:
        writer.write(b"\xff\xff\xff")
    text = message(dataset=f"tfrecord:{tmp_path}/other")
    assert "tf.train.Example" in text


# tensorflow-datasets


def prepare(data_dir, **settings):
    """Prepares a dataset like ImageNet's: the test split has no labels."""

    image = settings.get("image", "image")

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(settings.get("version", "1.2.0"))
        url_infos = None  # nothing is downloaded

        def _info(self):
            features = {
                image: tfds.features.Image(encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            sizes = {"train": 30, "test": 3, "validation": 6}
            return {
                split: self._generate_examples(split, size)
                for split, size in sizes.items()
            }

        def _generate_examples(self, split, size):
            for n in range(size):
                label = -1 if split == "test" else n % 3
                yield n, {image: io.BytesIO(encoded(n)), "label": label}

    builder = Tiny(data_dir=data_dir, file_format=settings.get("form"))
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    prepare(path)
    return path


@pytest.mark.parametrize("memory_bytes", [0, 10**9])
@pytest.mark.parametrize("spelling", ["tiny", "tiny:1.2.0", "directory"])
def test_a_prepared_dataset_is_found_by_name_version_or_directory(
    data_dir, memory_bytes, spelling
):
    dataset = spelling
    if spelling == "directory":
        dataset = posixpath.join(data_dir, "tiny", "1.2.0")
    source = open_source(dataset, data_dir=data_dir, memory_bytes=memory_bytes)
    assert source.size == 30 and source.class_names == ("x", "y", "z")
    content = {encoded(n): n for n in range(30)}
    examples = read(source, shuffle=False)
    for e in examples:
        assert e["label"] == content.pop(e["bytes"]) % 3
    assert set(names(examples)) == {f"{dataset}/train #{i}" for i in range(30)}


def test_splits_follow_role_and_name(data_dir):
    def size(**kwargs):
        source = open_source("tiny", data_dir=data_dir, **kwargs)
        return getattr(source, "size", None) or source.reason

    assert size(role="eval") == 6  # validation: test has no labels
    assert size(role="eval", split="train") == 30
    assert "published without them" in size(role="eval", split="test")
    assert size(role="bank") == size(role="bank", split="validation") == 30
    assert "may be a part of" in size(role="bank", split="train[:9]")
    assert size(split="test") == 3
    assert size(split="train[:50%]") == 15
    both = open_source(
        "tiny",
        data_dir=data_dir,
        split="train[5:]+validation",
        memory_bytes=0,
    )
    examples = read(both, shuffle=False)
    assert {name.split(" #")[1] for name in names(examples)} == {
        str(n) for n in range(31)
    }
    assert size(role="eval", labels="none") == "--labels=none"
    text = message(dataset="tiny", data_dir=data_dir, split="extra")
    assert "train" in text and "test" in text and "validation" in text


def test_parts_of_a_split_are_disjoint(data_dir):
    halves = [
        {
            e["bytes"]
            for e in read(
                open_source(
                    "tiny", data_dir=data_dir, split=split, memory_bytes=0
                ),
                shuffle=False,
            )
        }
        for split in ("train[:40%]", "train[40%:]")
    ]
    assert [len(h) for h in halves] == [12, 18]
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("memory_bytes", [0, 10**9])
def test_array_records_are_read(tmp_path, memory_bytes):
    pytest.importorskip("array_record")
    prepare(str(tmp_path), form="array_record")
    source = open_source(
        "tiny",
        data_dir=str(tmp_path),
        split="train[10:]",
        memory_bytes=memory_bytes,
    )
    assert source.size == 20 and source.random_access
    contents = {encoded(n): n % 3 for n in range(30)}
    found = {e["bytes"]: e["label"] for e in read(source, count=20)}
    assert len(found) == 20 and found.items() <= contents.items()


def test_the_newest_version_is_read(tmp_path, data_dir):
    path = str(tmp_path)
    for version in ("1.10.0", "1.9.0"):
        prepare(path, version=version)
    with open(posixpath.join(path, "tiny/1.10.0/dataset_info.json")) as info:
        assert '"1.10.0"' in info.read()
    tf.io.gfile.remove(posixpath.join(path, "tiny/1.9.0/features.json"))
    assert open_source("tiny", data_dir=path).size == 30  # 1.9.0 would fail
    prepare(path, version="2.0.0", image="picture")
    assert "label, picture" in message(dataset="tiny", data_dir=path)


def test_one_of_several_configurations_has_to_be_named(data_dir, tmp_path):
    for config in ("one", "two"):
        shutil.copytree(
            posixpath.join(data_dir, "tiny"), tmp_path / "conf" / config
        )
        source = open_source(f"conf/{config}", data_dir=str(tmp_path))
        assert source.size == 30
        if config == "one":
            assert open_source("conf", data_dir=str(tmp_path)).size == 30
    text = message(dataset="conf", data_dir=str(tmp_path))
    assert "conf/one, conf/two" in text


def test_the_embedded_dataset_is_read_as_generated(tmp_path):
    class Few(dataset.Shapes, skip_registration=True):
        name = "shapes"
        EXAMPLES = {"train": 12, "test": 5}
        url_infos = None

    dataset.prepare(str(tmp_path), builder_class=Few)
    train, test = (
        open_source("shapes", data_dir=str(tmp_path), role=role)
        for role in ("train", "eval")
    )
    assert (train.size, test.size) == (12, 5)
    assert train.class_names == test.class_names
    assert len(train.class_names) == 10
    expected = {
        dataset.encoded_example("test", n)["image"].getvalue() for n in range(5)
    }
    assert {e["bytes"] for e in read(test, shuffle=False)} == expected


def test_unknown_datasets_are_rejected_with_a_remedy(tmp_path):
    path = str(tmp_path)
    text = message(dataset="cifar10", data_dir=path)
    assert f"`tfds build cifar10 --data_dir={path}`" in text
    assert "--download" in text and "manual" not in text
    text = message(dataset="imagenet2012", data_dir=path)
    assert "ILSVRC2012_img_train.tar" in text
    assert f"{path}/downloads/manual" in text
    assert "cifar10" in message(dataset="cifar_10", data_dir=path)
    assert "shapes" in message(dataset="shape", data_dir=path)
    assert "correct the name" in message(dataset="qqqqqqq", data_dir=path)
    assert "folder:PATH" in message(dataset="/some/where", data_dir=path)
    assert "folder:PATH" in message(dataset="fodler:/photos", data_dir=path)
