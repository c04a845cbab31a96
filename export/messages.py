"""Shorten TensorFlow's error messages to the cause."""

import re

# Names of graph nodes.
_NODES = re.compile(
    r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}|\[\[[\w/.]+\]\]|\[Op:\w+\]"
)
# The location that created a node; TensorFlow prints the cause below it.
_LOCATION = re.compile(r"Detected at node .*?\nNode: '[^'\n]*'\n", re.DOTALL)
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
_MAX_LENGTH = 1000  # characters


def reason(text):
    """Returns the cause that a TensorFlow error message contains.

    Args:
        text: message of an exception or of a server's response.

    Returns:
        one line of at most 1,000 characters, without the names of graph nodes,
        stack traces and `assertion failed: […]`.
    """
    text = _LOCATION.sub("", text.split(_HEADER)[-1])
    several = _FIRST_OF_SEVERAL.search(text)
    text = several.group(1) if several else text
    text = _FOOTERS.split(_NODES.sub(" ", text))[0]
    text = " ".join(text.split())
    assertion = _ASSERTION.search(text)
    text = assertion.group(1).replace("] [", " ") if assertion else text
    return text[:_MAX_LENGTH] or "no reason given"
