"""A folder in the layout of CelebAMask-HQ, of pictures that show their labels as grey halves."""

import numpy as np
from PIL import Image

from experiments.attributes import celeba

NAMES = ("Smiling", "Eyeglasses", "Male", "Young")


def stand_in(root, count=60, seed=0):
    """The layout of CelebAMask-HQ: no photo is a smiling one with glasses but the first three."""
    rng = np.random.default_rng(seed)
    (root / celeba.IMAGES).mkdir(parents=True)
    lines = [str(count), " ".join(NAMES)]
    for i in range(count):
        told = rng.integers(0, 2, len(NAMES))
        told[:2] = (1, 1) if i < 3 else [(0, 0), (0, 1), (1, 0)][i % 3]
        pixels = np.full((24, 20, 3), 40, np.uint8)
        pixels[:12] += (told[0] * 180).astype(np.uint8)
        pixels[12:] += (told[1] * 180).astype(np.uint8)
        Image.fromarray(pixels).save(root / celeba.IMAGES / f"{i}.jpg")
        lines.append(f"{i}.jpg  " + "  ".join("1" if t else "-1" for t in told))
    (root / celeba.LIST).write_text("\n".join(lines) + "\n")
    return root
