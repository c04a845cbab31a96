"""What all commands share: flags in, one clear sentence out when they fail."""

import sys

from absl import app, flags, logging

from clsa_tf import stack
from clsa_tf.cli import help_page, parser
from clsa_tf.errors import (
    Stopped,
    UserError,
    WorkerLost,
    first_line,
    is_of_disk,
)
from clsa_tf.terminal import progress, shell, signals


def launch(main, define_flags, *, positional=False):
    """Parses the flags, calls `main()` and exits.

    The exit status is 0; 1 after a `UserError` or an unusable disk; 128 + its
    number after a signal that stopped the run; 138 after `WorkerLost`. Each is
    said in one sentence without a traceback. `--help` prints the docstring of
    `main`'s module and the flags.

    Args:
        main: function without arguments; flags are parsed when it is called.
        define_flags: function that defines the command's flags in the
            `absl.flags.FlagValues` that it is given.
        positional: whether the command takes other arguments, too, before,
            between or behind the flags; `main` is then called with their list.
    """

    def parse(argv):
        own = flags.FlagValues()
        define_flags(own)
        # Alone: of some commands it is a flag with a value, a model's version.
        if argv[1:] == ["--version"]:
            print(stack.describe())
            sys.exit(0)
        try:
            if help_page.asked(argv[1:]):
                text = sys.modules[main.__module__].__doc__
                print(help_page.render(text, own, argv[1:]))
                sys.exit(0)
            define_flags(flags.FLAGS)
            rest = parser.parse(
                argv[1:], flags.FLAGS, known=list(own), positional=positional
            )
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)
        return [argv[0], *rest]

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        # Plain text: absl's prefix of date, thread and line is for servers.
        logging.get_absl_handler().setFormatter(None)
        # Whole lines of the log above a progress bar.
        logging.get_absl_handler().python_handler.stream = progress.LogStream()
        try:
            with signals.Interruption("stopping", stop=True):
                signals.started()
                main(argv[1:]) if positional else main()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
        except Stopped as e:
            print(_ended_by(e), file=sys.stderr)
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

    app.run(guarded, flags_parser=parse)


def _ended_by(stopped):
    """A sentence for the end of a command that was asked to stop."""
    if stopped.saved is None:
        return f"Stopped by {stopped}."
    done, where = "and saved", "there"
    if not stopped.saved:
        done, where = "before it could save", "the last checkpoint"
    return (
        f"Stopped by {stopped} {done}; the same command goes on from {where}:\n"
        f"  {shell.this()}"
    )
