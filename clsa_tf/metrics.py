"""`workdir/metrics.jsonl`: one JSON object per logging step."""

import json
import os

from clsa_tf.files import write_atomically

FILE = "metrics.jsonl"


def read(workdir):
    """Returns the list of dictionaries logged so far, oldest first.

    A last line cut short by a kill is left out.
    """
    path = os.path.join(workdir, FILE)
    if not os.path.exists(path):
        return []
    entries = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries


def rewind(workdir, step):
    """Drops what was logged after `step`: the run goes on from there."""
    kept = [e for e in read(workdir) if e["step"] <= step]
    write_atomically(
        os.path.join(workdir, FILE),
        "".join(json.dumps(e) + "\n" for e in kept),
    )


def append(workdir, entry):
    """Adds one dictionary with at least the key `"step"`."""
    path = os.path.join(workdir, FILE)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        # A checkpoint lasts once it is written: what it follows has to, too.
        file.flush()
        os.fsync(file.fileno())
