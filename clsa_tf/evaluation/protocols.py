"""Evaluation protocols by name: the registry `PROTOCOLS`.

A protocol measures how well labels can be predicted from features. Its module
defines `TITLE`, its name in texts, and

    accuracy(bank, queries, *, own, config)

which returns the share in [0, 1] of queries whose label is predicted from the
labelled bank. `bank` and `queries` are pairs of features float32 `[M, F]` and
labels int64 `[M]`; `own` is the row of the bank that each query is, int `[Q]`,
or None if the queries are other images; `config` is the run's `Config`.

The report evaluates every protocol, on raw pixels, on the untrained and on the
trained encoder. `--knn_epochs` evaluates `knn` during training.
"""

import importlib

# Name -> module. `summary.json` names its figures `<name>_trained` and so on.
PROTOCOLS = {"knn": "clsa_tf.evaluation.knn"}


def load(name):
    """Returns the module of the protocol called `name`."""
    return importlib.import_module(PROTOCOLS[name])
