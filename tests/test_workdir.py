"""The directory of a run: its lock, and changes when a run is resumed."""

import functools
import json
import os

import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf import files
from clsa_tf.data.open import open_source
from clsa_tf.data.sources import fingerprint
from clsa_tf.errors import UserError
from clsa_tf.training import workdir
from tests import tiny
from tests.photos import write_folder


@pytest.fixture
def config(tmp_path):
    return tiny.config(workdir=str(tmp_path / "run"), total_epochs=3)


def claim(config, step=0, **fingerprints):
    with workdir.claim(
        config,
        images=54,
        newest_step=lambda: step,
        steps_per_epoch=3,
        fingerprints=fingerprints,
    ) as claimed:
        return claimed


def test_the_newest_step_is_read_under_the_lock(config):
    """Another run may have saved its first checkpoint in the meantime."""

    def newest_step():
        with pytest.raises(files.Locked):
            files.lock(f"{config.workdir}/{workdir.LOCK}")
        return 0

    with workdir.claim(config, images=54, newest_step=newest_step):
        pass


def rejection(config, step=6, **fingerprints):
    with pytest.raises(UserError) as error:
        claim(config, step, **fingerprints)
    return str(error.value)


def flags_of(config):
    path = f"{config.workdir}/{config_lib.RUN_FLAGS}"
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run"])
def test_a_directory_of_a_network_is_rejected(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    assert "directory of this machine" in rejection(tiny.config(workdir=place))
    assert list(tmp_path.iterdir()) == []


# ---- Other flags


def test_the_directory_is_locked_before_flags_are_compared(config):
    """Another process may be about to write the flags."""
    claim(config)
    path = os.path.join(config.workdir, workdir.LOCK)
    with files.lock(path), pytest.raises(UserError) as error:
        claim(config.replace(seed=7))
    assert f"process {os.getpid()}" in str(error.value)
    # A rejection releases the lock.
    assert "--seed=7" in rejection(config.replace(seed=7))
    claim(config)


def test_a_rejection_lists_the_differences_and_the_remedies(config):
    claim(config)
    message = rejection(config.replace(base_lr=0.5, seed=7))
    assert "--base_lr=0.5 instead of 0.3, --seed=7 instead of 0;" in message
    assert f"--init_from={config.workdir}" in message
    # The changeable flags follow from the declarations of the flags.
    for name, condition in config_lib.changeable().items():
        if name not in ("workdir", "init_from", "init_what"):
            assert f"--{name}" + (condition and f" ({condition})") in message
    assert "--base_lr," not in message
    # If nothing was saved, there is nothing to start from.
    assert "--init_from" not in rejection(config.replace(seed=7), step=0)


def test_the_method_is_listed_first_and_many_differences_are_counted(config):
    claim(config)
    other = tiny.config("moco", workdir=config.workdir, total_epochs=3)
    found = config_lib.differences(config, other)
    assert len(found) > 6
    message = rejection(other)
    assert "received --method=moco instead of clsa, " in message
    assert f" and {len(found) - 6} more;" in message
    assert "None" not in message
    # (--holdout is declared before --method.)
    other = other.replace(holdout=0.5)
    assert "--method=moco instead of clsa, --holdout=0.5" in rejection(other)


# ---- More epochs


def test_more_epochs_are_accepted_and_recorded(config):
    assert claim(config).changes == []
    for total, step in ((5, 6), (5, 9), (9, 15)):
        claimed = claim(config.replace(total_epochs=total), step)
        assert f"--total_epochs={total}" in flags_of(config)
    assert [str(c) for c in claimed.changes] == [
        "--total_epochs=9 instead of 5"
    ]
    assert workdir.read_changes(config.workdir) == [
        {"step": 6, "flag": "total_epochs", "before": "3", "now": "5"},
        {"step": 15, "flag": "total_epochs", "before": "5", "now": "9"},
    ]


def test_the_schedule_may_follow_the_number_of_epochs(config):
    steps = dict(lr_schedule="steps", lr_milestones=(1, 2))
    config = config.replace(**steps, warmup_epochs=0.5)
    claim(config)
    other = dict(lr_milestones=(2, 4), warmup_epochs=1.0)
    message = rejection(config.replace(**other))
    assert "--lr_milestones=2,4 instead of 1,2" in message
    assert "--lr_milestones (with a larger --total_epochs)" in message
    claimed = claim(config.replace(total_epochs=6, **other), 6)
    assert {change.flag for change in claimed.changes} == {
        "total_epochs",
        "lr_milestones",
        "warmup_epochs",
    }
    assert "--lr_milestones=2,4" in flags_of(config)
    # The run is complete: the record stays, despite fewer epochs.
    assert claim(config.replace(total_epochs=2), step=6).shorter
    assert "--lr_milestones=2,4" in flags_of(config)
    assert "--warmup_epochs=1.0" in flags_of(config)


def test_a_change_is_recorded_once_despite_a_kill(config):
    claim(config)
    before = (config.workdir, "\n".join(flags_of(config)) + "\n")
    for _ in range(2):  # killed before run.flags was written
        with open(f"{before[0]}/run.flags", "w", encoding="utf-8") as file:
            file.write(before[1])
        claim(config.replace(total_epochs=5), 6)
    assert len(workdir.read_changes(config.workdir)) == 1


def test_fewer_epochs_are_rejected_unless_they_are_done(config):
    claim(config)
    fewer = config.replace(total_epochs=2)
    message = rejection(fewer, step=5)
    assert "--total_epochs=2 instead of 3" in message
    assert "--total_epochs (to a larger number)" in message
    claimed = claim(fewer, step=6)
    assert claimed.shorter and claimed.changes == []
    # The record of the run stays.
    assert "--total_epochs=3" in flags_of(config)
    assert not claim(config, step=6).shorter


# ---- The same images elsewhere


def test_images_may_move_if_they_are_the_same(config):
    here = config.replace(dataset="folder:/here", eval_dataset="folder:/e")
    claim(here, dataset="a", eval_dataset="b")
    there = here.replace(dataset="folder:/there", eval_dataset="folder:/f")
    assert "--dataset=folder:/there" in rejection(there)
    assert "--dataset=folder:/there" in rejection(
        there, dataset="c", eval_dataset="b"
    )
    assert "received --eval_dataset=folder:/f" in rejection(
        there, dataset="a", eval_dataset="c"
    )
    claimed = claim(there, 6, dataset="a", eval_dataset="b")
    assert [c.flag for c in claimed.changes] == ["dataset", "eval_dataset"]
    assert "--dataset=folder:/there" in flags_of(config)
    assert claim(there, 6, dataset="a", eval_dataset="b").changes == []
    # The number of images has to be the same, too.
    for step, remedy in (
        (0, "--workdir.$"),
        (6, f"--init_from={there.workdir}"),
    ):
        words = f"54 images .* received 55.*{remedy}"
        with pytest.raises(UserError, match=words):
            workdir.claim(
                there,
                images=55,
                newest_step=functools.partial(int, step),
                fingerprints={"dataset": "a"},
            )


def test_moved_images_are_distinguished_from_newly_named_ones(config):
    one = config.replace(dataset="folder:/one")
    claim(one, dataset="a", eval_dataset="b")
    two = one.replace(dataset="folder:/two", eval_dataset="folder:/held_out")
    claimed = claim(two, 6, dataset="a", eval_dataset="b")
    assert len(claimed.changes) == 2
    assert claimed.moved == [("folder:/one", "folder:/two")]


def test_other_images_at_the_same_path_are_noted(config):
    claim(config, dataset="a")
    assert claim(config, 6, dataset="a").notes == []
    (note,) = claim(config, 6, dataset="b").notes
    assert "--dataset" in note
    # The first fingerprints stay on record.
    with open(f"{config.workdir}/dataset.json", encoding="utf-8") as file:
        assert json.load(file)["fingerprints"] == {"dataset": "a"}
    assert workdir.images(config.workdir) == 54


def test_a_directory_of_an_earlier_version_is_accepted(config):
    claim(config)
    path = f"{config.workdir}/dataset.json"
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"images": 54}\n')
    lines = [x for x in flags_of(config) if not x.startswith("--init_")]
    with open(f"{config.workdir}/run.flags", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    moved = config.replace(dataset="folder:/there")
    assert "--dataset=folder:/there" in rejection(moved, dataset="a")
    assert claim(config, 6, dataset="a").notes == []
    assert {"--init_from=", "--init_what=encoder"} <= set(flags_of(config))
    claim(moved, 6, dataset="a")  # recorded by now


def test_init_from_is_recorded_until_the_first_checkpoint(config):
    claim(config.replace(init_from="/wrong"))
    claim(config.replace(init_from="/weights", init_what="all"))
    for later in ("", "/other"):
        claim(config.replace(init_from=later), step=3)
        assert {"--init_from=/weights", "--init_what=all"} <= set(
            flags_of(config)
        )


# ---- Fingerprints


def digest(dataset):
    return open_source(dataset).fingerprint()


def test_the_fingerprint_of_a_folder_depends_on_names_and_bytes(tmp_path):
    here = write_folder(tmp_path / "here", each=5)
    before = digest(f"folder:{here}")
    there = here.rename(tmp_path / "there")
    assert digest(f"folder:{there}") == before
    (there / "bright/000.jpg").rename(there / "bright/zzz.jpg")
    assert digest(f"folder:{there}") != before
    (there / "bright/zzz.jpg").rename(there / "bright/000.jpg")
    assert digest(f"folder:{there}") == before
    # The same number and names of files, and once the same sizes.
    photo = there / "bright/000.jpg"
    data = photo.read_bytes()
    for other in (data + b"!", data[:-40] + b"!" + data[-39:]):
        photo.write_bytes(other)
        assert digest(f"folder:{there}") != before


def test_missing_files_do_not_prevent_a_fingerprint(tmp_path):
    paths = [f"{i}.jpg" for i in range(3)]
    before = fingerprint.of_files(str(tmp_path), paths)
    (tmp_path / "1.jpg").write_bytes(b"1")
    assert fingerprint.of_files(str(tmp_path), paths) != before


def write_records(path, photos):
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for photo in photos:
            example = tf.train.Example()
            feature = example.features.feature["image"]
            feature.bytes_list.value.append(photo.read_bytes())
            writer.write(example.SerializeToString())


def test_the_fingerprint_of_record_files_depends_on_their_bytes(tmp_path):
    photos = sorted(write_folder(tmp_path / "photos", each=4).glob("*/*"))
    write_records(tmp_path / "a" / "train-0", photos)
    write_records(tmp_path / "b" / "train-0", photos)
    before = digest(f"tfrecord:{tmp_path}/a/train-*")
    assert digest(f"tfrecord:{tmp_path}/b/train-*") == before
    write_records(tmp_path / "b" / "train-0", photos[1:] + photos[-2:-1])
    assert digest(f"tfrecord:{tmp_path}/b/train-*") != before
