"""The directory of a run: whose it is, and what it was begun with."""

import contextlib
import json
import os
import typing

import clsa_tf.config
from clsa_tf import files
from clsa_tf.errors import UserError

LOCK = "lock"
DATASET = "dataset.json"
# One JSON object per flag that a later start changed.
CHANGES = "changes.jsonl"

# Differing flags that a message lists one by one.
_LISTED = 6
# May change with the number of epochs: `length.adapt` fits recipes to it.
_OF_LENGTH = ("lr_schedule", "lr_milestones", "warmup_epochs")
# Recorded for a run's history; they act before its first checkpoint only.
_INITIAL = ("init_from", "init_what")


class Change(typing.NamedTuple):
    """A flag that is another than at the start before."""

    flag: str
    before: typing.Optional[str]  # None where there was no such flag
    now: typing.Optional[str]

    def __str__(self):
        """As messages list it."""
        if self.now is None:
            return f"no --{self.flag}, which was {self.before}"
        if self.before is None:
            return f"--{self.flag}={self.now}, which it did not have"
        return f"--{self.flag}={self.now} instead of {self.before}"


class Claim:
    """A directory that is this process's until it ends; a context manager.

    Attributes:
        changes: list of `Change`: flags that this start has changed.
        shorter: whether fewer epochs are asked for than the run has done, so
            that there is nothing to do.
        notes: sentences to print.
        moved: list of (before, now): datasets, as flags spell them, that are
            the same images at another place.
    """

    def __init__(self, lock, changes, shorter, notes):
        """See the class."""
        self._lock = lock
        self.moved = [
            (change.before, change.now)
            for change in changes
            if change.flag in ("dataset", "eval_dataset")
            and change.before  # otherwise it was not anywhere
        ]
        self.changes = changes
        self.shorter = shorter
        self.notes = notes

    def __enter__(self):
        """Returns this object."""
        return self

    def __exit__(self, *_):
        """Gives the directory back."""
        self._lock.close()


def claim(config, *, images, step=0, steps_per_epoch=1, fingerprints=None):
    """Makes `config.workdir` this process's until it ends, however it ends.

    Writes `run.flags`, `dataset.json` and `changes.jsonl` there. On a file
    system that knows no locks nothing keeps two processes apart.

    Args:
        config: `clsa_tf.config.Config`.
        images: how many there are to train on.
        step: of the newest checkpoint; 0 without any.
        steps_per_epoch: int.
        fingerprints: dictionary, "dataset" and "eval_dataset" -> what tells
            the images from others wherever they are (`Source.fingerprint`);
            either may be missing.

    Returns:
        `Claim`.

    Raises:
        UserError: it belongs to a run with other flags or images, is used by
            another process, or cannot be written.
    """
    directory = config.workdir
    if "://" in directory:
        raise UserError(
            f"Expected a directory of this machine as --workdir, received "
            f"{directory!r}; mount it, or copy the run there afterwards."
        )
    try:
        os.makedirs(directory, exist_ok=True)
        # First of all: another process may be about to write these files.
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(
                files.lock(os.path.join(directory, LOCK))
            )
            claimed = _claim_locked(
                config, lock, images, step, steps_per_epoch, fingerprints or {}
            )
            stack.pop_all()  # it stays locked
            return claimed
    except files.Locked as e:
        raise UserError(
            f"Expected a --workdir that no other run uses, received "
            f"{directory!r}, in use by {e}; wait for it or choose another."
        ) from e
    except OSError as e:
        raise UserError(
            f"Expected a --workdir that can be written, received "
            f"{directory!r} ({e.strerror}); make room, fix its permissions or "
            "choose another."
        ) from e


def _claim_locked(config, lock, images, step, steps_per_epoch, found):
    """Compares with what is recorded, and records; see `claim`."""
    directory = config.workdir
    flagfile = os.path.join(directory, clsa_tf.config.RUN_FLAGS)
    dataset = os.path.join(directory, DATASET)
    recorded = _recorded(dataset)
    known = recorded.get("fingerprints", {})
    same = {name for name in found if known.get(name) == found[name]}
    changes, shorter = _changes(flagfile, config, step, steps_per_epoch, same)
    _check_images(recorded, config, images, step)
    _append_changes(directory, step, changes)
    files.write_atomically(flagfile, _flagfile(flagfile, config, step, shorter))
    # What the run was started with stays.
    record = {"images": images, "fingerprints": found | known}
    files.write_atomically(dataset, json.dumps(record) + "\n")
    notes = [
        f"the images of --{name} are as many as at the start of the run, but "
        "names or sizes of their files have changed"
        for name in sorted(known.keys() & found.keys() - same)
    ]
    return Claim(lock, changes, shorter, notes)


def read_changes(directory):
    """Flags that later starts of a run have changed.

    Args:
        directory: of the run.

    Returns:
        list of dictionaries: `step` (of the newest checkpoint then), `flag`,
        `before`, `now` (as spelled), oldest first.
    """
    return files.read_json_lines(os.path.join(directory, CHANGES))


def images(directory):
    """How many images a run is trained on; None if it is not recorded."""
    try:
        return _recorded(os.path.join(directory, DATASET)).get("images")
    except UserError:
        return None


# ---- Flags


def _changes(path, config, step, steps_per_epoch, same):
    """Accepted changes, and whether fewer epochs are wanted than are done."""
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
    accepted, refused = [], []
    for change in changes.values():
        if change.flag not in ignored:
            (accepted if change.flag in free else refused).append(change)
    if refused:
        raise UserError(_refusal(config.workdir, refused, step))
    return accepted, shorter


def _refusal(directory, refused, step):
    listed = ", ".join(map(str, refused[:_LISTED]))
    more = len(refused) - _LISTED
    if more > 0:
        listed += f" and {more} more"
    way_on = _another(directory, step)
    free = {
        name: condition
        for name, condition in clsa_tf.config.changeable().items()
        if name not in ("workdir", *_INITIAL)
    }
    # Those with a condition are what a person is most likely to ask for.
    names = sorted(free, key=lambda name: not free[name])
    allowed = ", ".join(
        f"--{name}" + (f" ({free[name]})" if free[name] else "")
        for name in names
    )
    return (
        f"Expected the flags that {directory} was started with, received "
        f"{listed}; put them back, or {way_on}. Flags that may change when a "
        f"run is resumed: {allowed}."
    )


def _flagfile(path, config, step, shorter):
    """Text of `run.flags`, with what of it only the first start decided."""
    # What it was begun without stays out: a run of its version.
    older = clsa_tf.config.older_in(config.workdir)
    text = clsa_tf.config.to_flagfile(config, without=older)
    kept = _INITIAL if step else ()
    if shorter:
        kept += ("total_epochs", *_OF_LENGTH)
    if not kept or not os.path.exists(path):
        return clsa_tf.config.header() + text
    with open(path, encoding="utf-8") as file:
        before = dict(line.split("=", 1) for line in file if "=" in line)
    first = {
        # (A version without these flags began with their defaults.)
        name: before.get(f"--{name}", clsa_tf.config.default_of(name)).strip()
        for name in kept
    }
    lines = []
    for line in text.splitlines():
        name = line[2:].split("=", 1)[0]
        lines.append(f"--{name}={first[name]}" if name in first else line)
    return clsa_tf.config.header() + "\n".join(lines) + "\n"


def _another(directory, step):
    """What to do instead of going on with a run at `step`."""
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
        # A process that was killed at once has written it already.
        if line not in lines:
            lines.append(line)
    if changes:
        files.write_atomically(
            os.path.join(directory, CHANGES),
            "".join(json.dumps(line) + "\n" for line in lines),
        )


# ---- Images


def _recorded(path):
    """What is recorded of the images; {} at the first start."""
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
            "put it right or choose another --workdir."
        ) from e
    return recorded


def _check_images(recorded, config, images, step):
    """With another number of them the order and the epochs would be others."""
    before = recorded.get("images", images)
    if before != images:
        raise UserError(
            f"Expected the {before} images that {config.workdir} was started "
            f"with, received {images}; take out what was added, put back what "
            "is gone (empty files of the same names will do, which are left "
            f"out as unreadable), or {_another(config.workdir, step)}."
        )
