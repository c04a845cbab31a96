"""Claims the directory of a run and records its flags and dataset."""

import contextlib
import json
import os
import typing

import clsa_tf.config
from clsa_tf import files
from clsa_tf.errors import UserError
from clsa_tf.options.fields import AUTO

LOCK = "lock"
DATASET = "dataset.json"
# One JSON object per line, for each flag that a later start changed.
CHANGES = "changes.jsonl"

# Largest number of differing flags that a message lists.
_LISTED = 6
# Flags that may change with the number of epochs, because
# `recipe_length.adapt` scales recipes to it.
_OF_LENGTH = ("lr_schedule", "lr_milestones", "warmup_epochs")
# Flags without effect after the first checkpoint, recorded for the history.
_INITIAL = ("init_from", "init_what")


class Change(typing.NamedTuple):
    """A flag that differs from the previous start; values are text."""

    flag: str
    before: typing.Optional[str]  # None if the flag did not exist
    now: typing.Optional[str]  # None if the flag does not exist any more

    def __str__(self):
        """Text for messages."""
        if self.now is None:
            return f"no --{self.flag} (it was {self.before})"
        if self.before is None:
            return f"--{self.flag}={self.now} (it was not set)"
        return f"--{self.flag}={self.now} instead of {self.before}"


class Claim:
    """Exclusive use of a run's directory; a context manager.

    Attributes:
        changes: list of `Change`, the flags that this start has changed.
        shorter: whether `--total_epochs` is not larger than the epochs that
            the run has completed and smaller than recorded. There is nothing
            to train.
        notes: list of sentences to print.
        moved: list of (before, now), values of `--dataset` or
            `--eval_dataset` with the same images at another place.
    """

    def __init__(self, lock, changes, shorter, notes):
        """See the class."""
        self._lock = lock
        self.moved = [
            (change.before, change.now)
            for change in changes
            if change.flag in ("dataset", "eval_dataset")
            and change.before  # otherwise there was no dataset before
        ]
        self.changes = changes
        self.shorter = shorter
        self.notes = notes

    def __enter__(self):
        """Returns this object."""
        return self

    def __exit__(self, *_):
        """Releases the directory."""
        self._lock.close()


def claim(
    config,
    *,
    images,
    classes=0,
    newest_step=lambda: 0,
    steps_per_epoch=1,
    fingerprints=None,
):
    """Locks `config.workdir` for this process and records the run in it.

    The lock is released when the process ends, even if it is killed. On a file
    system without locks it excludes no process. The function writes
    `run.flags`, `dataset.json` and `changes.jsonl`.

    Args:
        config: `clsa_tf.config.Config`.
        images: number of training images.
        classes: number of their classes; 0 without labels.
        newest_step: function that returns the step of the newest checkpoint;
            0: none. It is called after the directory is locked.
        steps_per_epoch: int.
        fingerprints: dict, "dataset" and "eval_dataset" -> fingerprint of the
            images, independent of their place (`Source.fingerprint`). Either
            may be missing.

    Returns:
        `Claim`.

    Raises:
        UserError: the directory holds a run with other flags or images, is
            used by another process, or cannot be written.
    """
    directory = config.workdir
    if "://" in directory:
        raise UserError(
            f"Expected a directory of this machine as --workdir, received "
            f"{directory!r}; mount it, or copy the run there afterwards."
        )
    try:
        os.makedirs(directory, exist_ok=True)
        # Lock first: another process may be about to write these files.
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(
                files.lock(os.path.join(directory, LOCK))
            )
            claimed = _claim_locked(
                config,
                lock,
                {"images": images, "classes": classes},
                newest_step(),
                steps_per_epoch,
                fingerprints or {},
            )
            stack.pop_all()  # keeps the lock
            return claimed
    except files.Locked as e:
        raise UserError(
            f"Expected a --workdir that no other run uses, received "
            f"{directory!r}, in use by {e}; wait until that ends or choose "
            "another directory."
        ) from e
    except OSError as e:
        raise UserError(
            f"Expected a --workdir that can be written, received "
            f"{directory!r} ({e.strerror}); make room, fix its permissions or "
            "choose another directory."
        ) from e


def _claim_locked(config, lock, counts, step, steps_per_epoch, found):
    """Compares the run with its records and updates them, see `claim`."""
    directory = config.workdir
    flagfile = os.path.join(directory, clsa_tf.config.RUN_FLAGS)
    dataset = os.path.join(directory, DATASET)
    recorded = _recorded(dataset)
    known = recorded.get("fingerprints", {})
    same = {name for name in found if known.get(name) == found[name]}
    changes, shorter = _changes(flagfile, config, step, steps_per_epoch, same)
    _check_images(recorded, config, counts["images"], step)
    _append_changes(directory, step, changes)
    files.write_atomically(flagfile, _flagfile(flagfile, config, step, shorter))
    # Fingerprints from the start of the run are kept.
    record = {**counts, "fingerprints": found | known}
    files.write_atomically(dataset, json.dumps(record) + "\n")
    notes = [
        f"names or sizes of the files of --{name} have changed since the start "
        "of the run; the number of images is the same"
        for name in sorted(known.keys() & found.keys() - same)
    ]
    return Claim(lock, changes, shorter, notes)


def read_changes(directory):
    """Reads the changes of flags by later starts of a run.

    Args:
        directory: directory of the run.

    Returns:
        list of dict, oldest first: `step` (of the newest checkpoint at that
        start), `flag`, `before` and `now` (values as text).
    """
    return files.read_json_lines(os.path.join(directory, CHANGES))


def images(directory):
    """Number of training images of a run; None if it is not recorded."""
    return _count(directory, "images")


def classes(directory):
    """Number of classes of a run's images; None if it is not recorded."""
    return _count(directory, "classes")


def _count(directory, name):
    try:
        return _recorded(os.path.join(directory, DATASET)).get(name)
    except UserError:
        return None


# ---- Flags


def _changes(path, config, step, steps_per_epoch, same):
    """Compares flags with those in `run.flags`.

    Args:
        path: path of `run.flags`; it need not exist.
        config: `Config` of this start.
        step: step of the newest checkpoint.
        steps_per_epoch: int.
        same: names of flags whose datasets have the recorded fingerprints.

    Returns:
        (list of accepted `Change`, `Claim.shorter`).

    Raises:
        UserError: other flags differ.
    """
    if not os.path.exists(path):
        return [], False
    with open(path, encoding="utf-8") as file:
        before = clsa_tf.config.recorded(file.read(), path)
    found = clsa_tf.config.differences(before, config)
    changes = {c.flag: c for c in map(Change._make, found)}
    longer = shorter = False
    length = changes.get("total_epochs")
    if length and length.before is not None:
        longer = int(length.now) > int(length.before)
        shorter = not longer and 0 < int(length.now) * steps_per_epoch <= step
    ignored = _INITIAL + (("total_epochs", *_OF_LENGTH) if shorter else ())
    free = same | ({"total_epochs", *_OF_LENGTH} if longer else set())
    # An earlier version recorded `--precision=auto` instead of its value.
    free |= {c.flag for c in changes.values() if c.before == AUTO}
    accepted, rejected = [], []
    for change in changes.values():
        if change.flag not in ignored:
            (accepted if change.flag in free else rejected).append(change)
    if rejected:
        raise UserError(_rejection(config.workdir, rejected, step))
    return accepted, shorter


def _rejection(directory, rejected, step):
    """Returns the error message for rejected changes of flags."""
    listed = ", ".join(map(str, rejected[:_LISTED]))
    more = len(rejected) - _LISTED
    if more > 0:
        listed += f" and {more} more"
    alternative = _alternative(directory, step)
    free = {
        name: condition
        for name, condition in clsa_tf.config.changeable().items()
        if name not in ("workdir", *_INITIAL)
    }
    # Flags with a condition come first: they are wanted most often.
    names = sorted(free, key=lambda name: not free[name])
    allowed = ", ".join(
        f"--{name}" + (f" ({free[name]})" if free[name] else "")
        for name in names
    )
    return (
        f"Expected the flags that {directory} was started with, received "
        f"{listed}; restore these flags, or {alternative}. Flags that may "
        f"change when a run is resumed: {allowed}."
    )


def _flagfile(path, config, step, shorter):
    """Returns the new text of `run.flags`.

    Values that only the first start determines are taken from the old text.
    """
    # Flags that an older version did not have stay out of its run's file, so
    # that the run keeps that version's behaviour.
    older = clsa_tf.config.older_in(config.workdir)
    text = clsa_tf.config.to_flagfile(config, without=older)
    kept = _INITIAL if step else ()
    if shorter:
        kept += ("total_epochs", *_OF_LENGTH)
    if not os.path.exists(path):
        return clsa_tf.config.header() + text
    with open(path, encoding="utf-8") as file:
        recorded = file.read()
    header = clsa_tf.config.header(recorded)
    if not kept:
        return header + text
    lines = recorded.split("\n")
    before = dict(line.split("=", 1) for line in lines if "=" in line)
    first = {
        # A version without these flags used their defaults.
        name: before.get(f"--{name}", clsa_tf.config.default_of(name)).strip()
        for name in kept
    }
    lines = []
    for line in text.splitlines():
        name = line[2:].split("=", 1)[0]
        lines.append(f"--{name}={first[name]}" if name in first else line)
    return header + "\n".join(lines) + "\n"


def _alternative(directory, step):
    """Describes how to start a new run, for messages."""
    if not step:
        return "choose another --workdir"
    return (
        f"choose another --workdir with --init_from={directory}, which starts "
        "a new run from its weights"
    )


def _append_changes(directory, step, changes):
    lines = read_changes(directory)
    for change in changes:
        line = {"step": step, **change._asdict()}
        # A start that was killed soon afterwards may have written the line.
        if line not in lines:
            lines.append(line)
    if changes:
        files.write_atomically(
            os.path.join(directory, CHANGES),
            "".join(json.dumps(line) + "\n" for line in lines),
        )


# ---- Images


def _recorded(path):
    """Reads `dataset.json`; {} at the first start."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            recorded = json.load(file)
        recorded["images"] + 0
        recorded.setdefault("fingerprints", {}).items()
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(
            f'Expected {{"images": …}} in {path}, received something else; '
            "correct the file or choose another --workdir."
            + clsa_tf.config.written_by(os.path.dirname(path))
        ) from e
    return recorded


def _check_images(recorded, config, images, step):
    """Raises `UserError` if the number of images has changed.

    The order of the images and the length of an epoch depend on it.
    """
    before = recorded.get("images", images)
    if before != images:
        raise UserError(
            f"Expected the {before} images that {config.workdir} was started "
            f"with, received {images}; remove added images, restore missing "
            "ones (empty files of the same names suffice and are left out as "
            f"unreadable), or {_alternative(config.workdir, step)}."
        )
