"""Trains the toy method as one worker of a job, with a pause in each epoch.

`python -m tests.paused_epoch PHOTOS WORKDIR SECONDS` pauses between the
beginning of an epoch and the pass over the dataset that follows. A signal that
arrives in the pause stops the job during the pass.
"""

import pathlib
import sys
import time

from clsa_tf import train
from clsa_tf.errors import Stopped
from tests import runs, tiny, toy


def main(photos, workdir, seconds):
    toy.register()
    before = toy.METHOD.on_epoch_begin

    def paused(self, epoch, features):
        print("epoch", epoch, flush=True)
        time.sleep(seconds)
        before(self, epoch, features)

    toy.METHOD.on_epoch_begin = paused
    runs.leave_out_pictures(pathlib.Path(workdir))
    config = tiny.config(
        "toy",
        backbone="one_block",
        dataset=f"folder:{photos}",
        holdout=0.0,
        workdir=workdir,
        strategy="multiworker",
        batch_norm="sync",
        total_epochs=2,
        log_steps=1,
        knn_epochs=0,
        image_size=16,
        base_lr=0.03,
    )
    try:
        train.run(config)
    except Stopped as e:
        print("saved", e.saved)
        sys.exit(128 + e.signal)


if __name__ == "__main__":
    main(*sys.argv[1:3], float(sys.argv[3]))
