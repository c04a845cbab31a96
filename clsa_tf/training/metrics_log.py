"""`workdir/metrics.jsonl`: one JSON object per logging step.

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
    """Returns the list of dictionaries logged so far, oldest first.

    A last line cut short by a kill is left out.
    """
    values = read_json_lines(os.path.join(workdir, FILE))
    return [e for e in values if isinstance(e, dict) and "step" in e]


def rewind(workdir, step):
    """Drops what was logged after `step`: the run goes on from there.

    Raises:
        UserError: event files cannot be written again.
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
                f"Expected to drop what {path} holds after step {step}, "
                f"received: {first_line(e)}; make room, fix the permissions, "
                "or delete the file."
            ) from e


def _rewind_events(path, step):
    """Writes an event file again without what comes after `step`."""
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
        pass  # the last record was cut short by a kill
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
    """Adds one dictionary with at least the key `"step"`."""
    path = os.path.join(workdir, FILE)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        # A checkpoint lasts once it is written: what it follows has to, too.
        file.flush()
        os.fsync(file.fileno())
