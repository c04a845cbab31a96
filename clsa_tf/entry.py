"""What all commands share: flags in, one clear sentence out when they fail."""

import sys

from absl import app, logging

from clsa_tf.errors import (
    Stopped,
    UserError,
    WorkerLost,
    first_line,
    is_of_disk,
)


def launch(main, *, positional=False):
    """Parses the flags, calls `main()` and exits.

    The exit status is 0; 1 after a `UserError` or an unusable disk; 128 + its
    number after a signal that stopped the run; 138 after `WorkerLost`. Each is
    said in one sentence without a traceback.

    Args:
        main: function without arguments; flags are parsed when it is called.
        positional: whether the command takes other arguments, too, before,
            between or behind the flags; `main` is then called with their list.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        # Plain text: absl's prefix of date, thread and line is for servers.
        logging.get_absl_handler().setFormatter(None)
        try:
            if len(argv) > 1 and not positional:
                raise UserError(
                    f"Expected only flags, received {argv[1]!r}; write flags "
                    "as --name=value."
                )
            main(argv[1:]) if positional else main()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
        except Stopped as e:
            done, where = "and saved", "there"
            if not e.saved:
                done, where = "before it could save", "the last checkpoint"
            print(
                f"Stopped by {e} {done}; the same command goes on from "
                f"{where}.",
                file=sys.stderr,
            )
            return 128 + e.signal
        except WorkerLost as e:
            print(
                f"error: Expected all workers of the job, lost one ({e}); "
                "start the same command on all of them again: it goes on from "
                "the last checkpoint.",
                file=sys.stderr,
            )
            return WorkerLost.STATUS
        except Exception as e:
            if not is_of_disk(e):
                raise
            print(
                f"error: Expected a place to write to, received: "
                f"{first_line(e)}; make room, fix the permissions or choose "
                "another directory.",
                file=sys.stderr,
            )
            return 1
        return 0

    app.run(guarded)
