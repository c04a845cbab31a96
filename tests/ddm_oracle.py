"""The divergence in NumPy, as the paper writes it."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def ddm(teacher, student, candidates, temperature):
    """Mean over rows of - sum_c t_c log r_c, for unit rows."""
    t = softmax(teacher @ candidates.T / temperature)
    r = softmax(student @ candidates.T / temperature)
    return -np.mean(np.sum(t * np.log(r), axis=1))
