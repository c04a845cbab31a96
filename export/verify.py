"""Loads a SavedModel and compares what it computes with recorded outputs.

`python -I export/verify.py MODEL EXAMPLES.npz`: run as a file, in a process
that knows nothing of this project. Exit status 0 if all outputs agree.
"""

import sys

import numpy as np
import tensorflow as tf

# Another process may choose other kernels; float32 then differs by rounding.
_TOLERANCE = 1e-4


def main(model, examples):
    """Raises AssertionError if an output differs by more than rounding."""
    examples = np.load(examples, allow_pickle=False)
    signatures = tf.saved_model.load(model).signatures
    count = sum(name.startswith("bytes_") for name in examples.files)
    encoded = [examples[f"bytes_{i}"].tobytes() for i in range(count)]
    inputs = {
        "serving_default": {"image_bytes": tf.constant(encoded)},
        "images": {"images": tf.constant(examples["images"])},
    }
    for signature, arguments in inputs.items():
        outputs = signatures[signature](**arguments)
        for name, value in outputs.items():
            expected = examples[f"{signature}/{name}"]
            scale = np.abs(expected).max() + 1e-6
            worst = np.abs(value.numpy() - expected).max() / scale
            assert worst < _TOLERANCE, (
                f"output {name} of signature {signature} is off by {worst:.2g} "
                "of its largest value"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
