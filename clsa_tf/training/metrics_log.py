"""Reads and writes `workdir/metrics.jsonl`, one JSON object per entry.

The same values are in `workdir/tensorboard`, in TensorFlow's event files.
"""

import glob
import json
import os

import tensorflow as tf

from clsa_tf.errors import UserError, first_line
from clsa_tf.files import read_json_lines, replacing, write_atomically

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read(workdir):
    """Returns the entries logged so far, list of dict, oldest first.

    A last line that is incomplete, because the process was killed, is skipped.
    """
    values = read_json_lines(os.path.join(workdir, FILE))
    return [e for e in values if isinstance(e, dict) and "step" in e]


def rewind(workdir, step):
    """Drops all entries after `step`, from which the run resumes.

    Raises:
        UserError: event files cannot be rewritten.
    """
    kept = [e for e in read(workdir) if e["step"] <= step]
    write_atomically(
        os.path.join(workdir, FILE),
        "".join(json.dumps(e) + "\n" for e in kept),
    )
    pattern = os.path.join(glob.escape(workdir), TENSORBOARD, "events.*")
    for path in glob.glob(pattern):
        try:
            _rewind_events(path, step)
        except (tf.errors.OpError, OSError) as e:
            raise UserError(
                f"Cannot drop the entries of {path} after step {step}: "
                f"{first_line(e)}; make room, fix the permissions, or delete "
                "the file."
            ) from e


def _rewind_events(path, step):
    """Rewrites an event file without the events after `step`."""
    kept, values, dropped = [], 0, 0
    try:
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            if event.step > step:
                dropped += 1
            else:
                kept.append(record.numpy())
                values += event.HasField("summary")
    except tf.errors.DataLossError:
        pass  # the process was killed while it wrote the last record
    if not dropped:
        return
    if not values:
        os.remove(path)
        return
    # Not a name that TensorBoard reads.
    unfinished = os.path.join(os.path.dirname(path), ".unfinished")
    with (
        replacing(path, draft=unfinished),
        tf.io.TFRecordWriter(unfinished) as writer,
    ):
        for record in kept:
            writer.write(record)


def append(workdir, entry):
    """Appends an entry, a dict with at least the key `"step"`."""
    path = os.path.join(workdir, FILE)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        # On disk before the checkpoint that follows, which is flushed, too.
        file.flush()
        os.fsync(file.fileno())
