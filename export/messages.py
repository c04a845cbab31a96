"""What TensorFlow says went wrong, without what is around it."""

import re

# Names of nodes in a graph.
_NODES = re.compile(
    r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}|\[\[[\w/.]+\]\]|\[Op:\w+\]"
)
# Where in the program a node was made, before what happened there.
_MADE = re.compile(r"Detected at node .*?\nNode: '[^'\n]*'\n", re.DOTALL)
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
_LONGEST = 1000  # characters


def reason(text):
    """The reason in a message of TensorFlow.

    Args:
        text: of an exception, or what a server answered.

    Returns:
        one line of at most 1,000 characters, without the names of graph nodes,
        stack traces and `assertion failed: […]`.
    """
    text = _MADE.sub("", text.split(_HEADER)[-1])
    several = _FIRST_OF_SEVERAL.search(text)
    text = several.group(1) if several else text
    text = _FOOTERS.split(_NODES.sub(" ", text))[0]
    text = " ".join(text.split())
    asserted = _ASSERTION.search(text)
    text = asserted.group(1).replace("] [", " ") if asserted else text
    return text[:_LONGEST] or "no reason given"
