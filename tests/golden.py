"""The tensors from which the golden values of the losses were computed.

`family(n, d, s)[i, j] = sin(0.7 (i d + j) + s)`, rows divided by their length,
float64. The values in the tests were computed from them in NumPy, independently
of this project.
"""

import numpy as np


def family(n, d, s):
    x = np.sin(0.7 * np.arange(n * d).reshape(n, d) + s)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def unit_rows(seed, *shape):
    """Random unit rows, which no golden value uses."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


WEAK = family(4, 8, 0.0)
WEAK_2 = family(4, 8, 0.05)
STRONG = family(4, 8, 0.3)
STRONG_2 = family(4, 8, 0.45)
KEYS = family(4, 8, 0.1)
QUEUE = family(16, 8, 2.0)
CANDIDATES = np.concatenate([KEYS, QUEUE])

# CACR: views of an image; with a queue these are the queries.
VIEWS = [WEAK, KEYS, STRONG]
KEYS_OF_VIEWS = [family(4, 8, s) for s in (0.02, 0.12, 0.33)]

# LooC, two augmentations: one space per head h; keys are of view j.
LOOC_QUERIES = [family(4, 8, h) for h in range(3)]
LOOC_KEYS = [
    [family(4, 8, 0.1 + 0.2 * j + h) for j in range(3)] for h in range(3)
]
LOOC_QUEUES = [family(16, 8, 2.0 + h) for h in range(3)]
