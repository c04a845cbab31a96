# Chooses Keras 2, before anything imports TensorFlow.
from clsa_tf.terminal import console

# Tests run and start several processes, which share the GPUs.
console.share_gpus()
