"""What the speed and the bytes of `clsa_tf` are compared with."""
