"""Images that are given in memory, kept as a folder in one of the layouts of `image_folder`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_io import atomic_folder
from ..errors import UserError
from ..settings import short_hash
from .image_folder import REPLACE, load_folder
from .picture import on_white, read_picture

CAPTIONS = ("text", "caption")  # columns of a `datasets.Dataset`


def save_images(images: Any, captions: Sequence[str] | None, folder: Path) -> Path:
    """Write images and captions below `folder`, under a name of their content; returns where.

    images: a `datasets.Dataset` with the columns image and text (or caption), or a sequence of PIL
    images, uint8 arrays [H, W, 3] and paths with as many captions. What is there is not written
    again.
    UserError for none, for captions of another number, and for what is no image.
    """
    image = "image" if captions is None else None  # a dataset's rows are read one by one
    captions = _captions(images) if captions is None else captions
    if not len(images) or len(images) != len(captions):
        counts = f"{len(images)} images and {len(captions)} captions"
        raise UserError(f"there are {counts}; give one caption for each of one or more images")

    def picture(i: int) -> Image.Image:
        return _picture(images[i] if image is None else images[i][image], i)

    whole = hashlib.sha256()
    for shown in map(picture, range(len(images))):  # one at a time in memory
        whole.update(f"{shown.size}".encode() + shown.tobytes())
    place = folder / short_hash([whole.hexdigest(), list(captions)])
    if not place.is_dir():
        with atomic_folder(place) as made:
            rows = [{"file_name": f"{i:06}.png", "text": c} for i, c in enumerate(captions)]
            for i, row in enumerate(rows):
                picture(i).save(made / row["file_name"])
            (made / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            load_folder(made)  # refuses empty captions
    return place


def _captions(images: Any) -> Sequence[str]:
    """Those of a `datasets.Dataset`."""
    names = getattr(images, "column_names", None)
    if not isinstance(names, list):
        raise UserError(
            f"images is a {type(images).__name__}; give captions, too, or images as a folder"
        )
    column = next((name for name in CAPTIONS if name in names), None)
    if "image" not in names or column is None:
        raise UserError(
            f"the dataset has the columns {', '.join(names)}; give images with image and text"
        )
    return list(images[column])


def _picture(image: Any, number: int) -> Image.Image:
    """One of them, RGB on white."""
    what = f"image {number}"
    if isinstance(image, str | Path):
        return read_picture(Path(image), REPLACE)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = f"{image.dtype} {list(image.shape)}"
            raise UserError(f"{what} is an array {shape}; give image as uint8 [height, width, 3]")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{what} is a {type(image).__name__}; give image as a PIL image, an array or a path"
        )
    return on_white(image)
