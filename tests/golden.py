"""The tensors that the golden values of the losses were computed with.

`family(n, d, s)[i, j] = sin(0.7 (i d + j) + s)`, rows divided by their length,
float64. The values in the tests were computed from them in NumPy, independent
of this project.
"""

import numpy as np


def family(n, d, s):
    x = np.sin(0.7 * np.arange(n * d).reshape(n, d) + s)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


WEAK = family(4, 8, 0.0)
WEAK_2 = family(4, 8, 0.05)
STRONG = family(4, 8, 0.3)
STRONG_2 = family(4, 8, 0.45)
KEYS = family(4, 8, 0.1)
QUEUE = family(16, 8, 2.0)
CANDIDATES = np.concatenate([KEYS, QUEUE])
