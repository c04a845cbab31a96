"""The directory of a run: whose it is, and what it was begun with."""

import json
import os

import clsa_tf.config
from clsa_tf import files
from clsa_tf.errors import UserError

LOCK = "lock"
DATASET = "dataset.json"


def claim(config, *, images):
    """Makes `config.workdir` this process's until it ends, however it ends.

    Writes `run.flags` and `dataset.json` there. On a file system that knows no
    locks nothing keeps two processes apart.

    Args:
        config: `clsa_tf.config.Config`.
        images: how many there are to train on.

    Returns:
        a context manager that gives the directory back.

    Raises:
        UserError: it belongs to a run with other flags or images, is used by
            another process, or cannot be written.
    """
    directory = config.workdir
    flagfile = os.path.join(directory, clsa_tf.config.RUN_FLAGS)
    dataset = os.path.join(directory, DATASET)
    _check_flags(flagfile, config)
    _check_images(dataset, config, images)
    try:
        os.makedirs(directory, exist_ok=True)
        lock = files.lock(os.path.join(directory, LOCK))
        files.write_atomically(
            flagfile,
            # What it was begun without stays out: a run of its version.
            clsa_tf.config.to_flagfile(
                config, without=clsa_tf.config.older_in(directory)
            ),
        )
        files.write_atomically(dataset, json.dumps({"images": images}) + "\n")
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
    return lock


def _check_flags(path, config):
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        found = clsa_tf.config.differences(
            file.read(), clsa_tf.config.to_flagfile(config)
        )
    if found:
        name, before, now = found[0]
        raise UserError(
            f"Expected the flags that {config.workdir} was started with, "
            f"received --{name}={now} instead of {before}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + "; choose another --workdir or put the flags back."
        )


def _check_images(path, config, images):
    """With another number of them the order and the epochs would be others."""
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)["images"]
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(
            f'Expected {{"images": …}} in {path}, received something else; '
            "put it right or choose another --workdir."
        ) from e
    if before != images:
        raise UserError(
            f"Expected the {before} images that {config.workdir} was started "
            f"with, received {images}; take out what was added, put back what "
            "is gone (empty files of the same names will do, which are left "
            "out as unreadable), or choose another --workdir."
        )
