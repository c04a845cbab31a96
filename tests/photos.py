"""Folders of real JPEG files for tests."""

import numpy as np
from PIL import Image

TINY_FLAGS = [
    "--backbone=resnet18",
    "--width=0.125",
    "--projection_size=16",
    "--key_crop=24:0.3:1",
    "--query_crops=24:0.3:1",
    "--strong_crops=16:0.2:0.6",
    "--queue_size=40",
    "--batch_size=16",
    "--total_epochs=3",
    "--image_size=32",
    "--eval_keep=1",
    "--log_steps=2",
    "--knn_k=5",
]


def write_folder(root, *, classes=("bright", "dark"), each=30):
    """Writes `each` photographs per class: blurred noise around a level."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        folder = root / name if name else root
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            level = 190 - 130 * number
            coarse = rng.normal(level, 25, [5, 6, 3]).clip(0, 255)
            image = Image.fromarray(np.uint8(coarse))
            image.resize((60, 50), Image.BICUBIC).save(folder / f"{i:03d}.jpg")
    return root
