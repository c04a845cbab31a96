"""Marks for the cases that `make test` leaves out."""

import pytest


def slow_but(quick, cases):
    """Marks all cases except the first ones for `make test-slow`.

    Args:
        quick: number of cases, from the first on, that `make test` runs.
        cases: list of values, or of tuples of them; dictionaries count by
            their keys.

    Returns:
        list of `pytest.param`.
    """
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = () if i < quick else pytest.mark.slow
        found.append(pytest.param(*values, marks=marks))
    return found
