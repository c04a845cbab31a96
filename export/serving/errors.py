"""What clients are told when a request fails."""

import re

import grpc

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# Names of nodes in a graph, which TensorFlow adds to what went wrong.
_NODES = re.compile(
    r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}|\[\[[\w/.]+\]\]|\[Op:\w+\]"
)
# What stands around the reason: nothing a client could act on.
_HEADER = "Graph execution error:"
_FIRST_OF_SEVERAL = re.compile(
    r"root error\(s\) found\.\s*\(0\)\s*(?:[A-Z_]+: )?(.*?)(?=\n\s*\(1\)|$)",
    re.DOTALL,
)
_FOOTERS = re.compile(
    r"\n\s*(?:Original stack trace|Detected at node|Hint: If you want|"
    r"Errors may have originated|\d+ successful operations)"
)
_ASSERTION = re.compile(r"assertion failed: \[(.*)\]$")
_LONGEST = 1000  # characters of a message


class ServingError(Exception):
    """A request that failed, or a version that could not be loaded.

    Attributes:
        code: `grpc.StatusCode`.
        message: one line for the client.
    """

    def __init__(self, code, message):
        """See the class."""
        super().__init__(message)
        self.code = code
        self.message = message

    def copy(self):
        """The same, without its traceback, which keeps a lot in memory."""
        return ServingError(self.code, self.message)


def as_serving_error(error):
    """Makes a `ServingError` of any other.

    That of TensorFlow keeps its code, which is the same number as gRPC's;
    others become INTERNAL.
    """
    if isinstance(error, ServingError):
        return error.copy()
    code = _CODES.get(getattr(error, "error_code", None))
    if code:
        return ServingError(code, reason(error.message or str(error)))
    return ServingError(
        grpc.StatusCode.INTERNAL,
        f"{type(error).__name__}: {reason(str(error))}",
    )


def reason(text):
    """What TensorFlow said, on one line, without the names of graph nodes."""
    text = text.split(_HEADER)[-1]
    several = _FIRST_OF_SEVERAL.search(text)
    text = several.group(1) if several else text
    text = _FOOTERS.split(_NODES.sub(" ", text))[0]
    text = " ".join(text.split())
    asserted = _ASSERTION.search(text)
    text = asserted.group(1).replace("] [", " ") if asserted else text
    return text[:_LONGEST] or "no reason given"
