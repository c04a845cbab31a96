"""The one exception that means: the input was wrong, not the program."""


class UserError(Exception):
    """Wrong input from outside: a flag, a file, an image, a checkpoint.

    The message is one sentence of the form *expected …, received …; do …*.
    Entry points print it without a traceback and exit with status 1.
    """
