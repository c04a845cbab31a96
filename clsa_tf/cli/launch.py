"""Entry of all commands: parses flags, runs, and reports errors in one line."""

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

    The exit status is 0 on success; 1 after a `UserError` or an unusable disk;
    128 + N after signal N; 138 after `WorkerLost`. Each failure prints one
    message without a traceback. `--help` prints the docstring of `main`'s
    module and the flags.

    Args:
        main: function without arguments, called after the flags are parsed.
        define_flags: function that defines the command's flags in an
            `absl.flags.FlagValues`.
        positional: whether the command accepts positional arguments before,
            between or after the flags. `main` then gets a list of them.
    """

    def parse(argv):
        own = flags.FlagValues()
        define_flags(own)
        # Only if alone: some commands have a flag --version with a value.
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
        # Without absl's prefix of date, thread and line.
        logging.get_absl_handler().setFormatter(None)
        # Log lines appear above a progress bar.
        logging.get_absl_handler().python_handler.stream = progress.LogStream()
        _forbid_tf32()
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
                f"error: A worker of the job stopped ({e}); start the same "
                "command on all workers again to resume from the last "
                "checkpoint.",
                file=sys.stderr,
            )
            return WorkerLost.STATUS
        except Exception as e:
            if not is_of_disk(e):
                raise
            print(
                f"error: Writing failed ({first_line(e)}); make room, fix the "
                "permissions or choose another directory.",
                file=sys.stderr,
            )
            return 1
        return 0

    app.run(guarded, flags_parser=parse)


def _forbid_tf32():
    """Has GPUs compute float32 as float32, if the command computes at all.

    A training allows TF32 again with `--precision=tf32`.
    """
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow:
        tensorflow.config.experimental.enable_tensor_float_32_execution(False)


def _ended_by(stopped):
    """Message for a command that a signal stopped."""
    if stopped.saved is None:
        return f"Stopped by {stopped}."
    done, where = "and saved", "there"
    if not stopped.saved:
        done, where = "before it could save", "the last checkpoint"
    return (
        f"Stopped by {stopped} {done}; the same command resumes from {where}:\n"
        f"  {shell.this()}"
    )
