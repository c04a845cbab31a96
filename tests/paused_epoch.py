"""Trains the toy method as one worker of a job, with a pause in each epoch.

`python -m tests.paused_epoch PHOTOS WORKDIR SECONDS` pauses between the
beginning of an epoch and the pass over the dataset that follows. A signal that
arrives in the pause stops the job during the pass.
"""

import pathlib
import sys
import time

from tests import resized, test_interface, toy


def main(photos, workdir, seconds):
    toy.register()
    before = toy.METHOD.on_epoch_begin

    def paused(self, epoch, features):
        print("epoch", epoch, flush=True)
        time.sleep(seconds)
        before(self, epoch, features)

    toy.METHOD.on_epoch_begin = paused
    config = test_interface.config(pathlib.Path(workdir), f"folder:{photos}")
    resized.run_or_exit(config)


if __name__ == "__main__":
    main(*sys.argv[1:3], float(sys.argv[3]))
