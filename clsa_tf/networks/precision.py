"""The precision of the convolutions; everything else is float32.

Variables, batch statistics, heads, unit vectors, similarities and losses are
always float32, because a softmax over 65,536 keys underflows in float16 and has
errors of several percent in bfloat16. With TF32, heads are rounded like
convolutions; similarities and losses are not.
"""

import platform

import tensorflow as tf

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "auto")
# float32 with products of 10 bits of mantissa, by the tensor cores of NVIDIA
# GPUs; TensorFlow's default on Ampere and later.
TF32 = "tf32"
TRAINING_PRECISIONS = (*PRECISIONS, TF32)

# Without these instructions bfloat16 is slower than float32 on a CPU.
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def resolve(name):
    """Returns the Keras policy of one of `TRAINING_PRECISIONS`.

    `"auto"` is bfloat16 on TPUs, on GPUs of compute capability 8.0 and above
    and on CPUs with bfloat16 instructions; otherwise it is float32.
    """
    if name == TF32:
        return "float32"
    if name != "auto":
        return name
    return "mixed_bfloat16" if _fast_bfloat16() else "float32"


def set_tf32(name):
    """Enables TF32 if `name` is `"tf32"`; otherwise disables it.

    The setting is global to the process, for convolutions and matrix products.
    `clsa_tf.losses.products` always computes similarities in full float32.
    """
    tf.config.experimental.enable_tensor_float_32_execution(name == TF32)


def _fast_bfloat16():
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return True
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = map(tf.config.experimental.get_device_details, gpus)
        return all(d.get("compute_capability", (0,)) >= (8,) for d in details)
    return any(name in _cpu_flags() for name in _CPU_BFLOAT16)


def _cpu_flags():
    """Names of the processor's instruction sets; empty except on Linux."""
    if platform.system() != "Linux":
        return set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.split())
    return set()
