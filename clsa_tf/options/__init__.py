"""Declaration of options, and the flags made from them."""
