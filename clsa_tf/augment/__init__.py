"""Weak and strong augmentations, and the views they produce."""
