"""Training pictures that are encoded already, in the layout of the AbC release (Wang et al. 2023,
2024).

    laion_latents.npy           [M >= N, C, h, w] scaled latents; mirrored pictures may follow the N originals
    laion_text_embeddings.npy   [N, T, d]; its length says how many originals there are
    laion_subset/images/*       the pictures, in lexical order; needed to show results only
    laion_subset/captions.txt   one caption a line, in that order
    prepared.json               instead of laion_subset, when `prepare` made the arrays from your own folder

Both arrays are memory-mapped. The tasks of the benchmark are in `datasets.tasks`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .folder import IMAGE_SUFFIXES, ImageCaptionDataset, load_folder

LATENTS, TEXT, PREPARED = "laion_latents.npy", "laion_text_embeddings.npy", "prepared.json"
# of each array, evenly spread, enter the content hash: 36 GB would take minutes at every start
HASHED_ROWS = 256


class EncodedData:
    """The first `num_train` (0: all) encoded pictures of a folder, for the given model.

    Raises UserError for a missing or truncated array, arrays that do not fit each other or the
    model.
    """

    def __init__(self, root: str | Path, model, num_train: int = 0):
        self.root, self.model = Path(root), model
        latents, text = _array(self.root / LATENTS, 4), _array(self.root / TEXT, 3)
        n = min(len(text), num_train or len(text))
        if len(latents) < n:
            raise UserError(
                f"{self.root / LATENTS} has {len(latents)} rows but {TEXT} has {len(text)} "
                "captions; download or prepare both again"
            )
        if latents.shape[1:] != model.latent_shape:
            raise UserError(
                f"{self.root / LATENTS} holds latents {list(latents.shape[1:])} but the model "
                f"takes {list(model.latent_shape)}; "
                "mend DATA_DIR or SD_MODEL_PATH"
            )
        width = model.pipe.unet.config.cross_attention_dim
        if text.shape[2] != width:
            raise UserError(
                f"{self.root / TEXT} is {text.shape[2]} wide but the model takes {width}; mend "
                "DATA_DIR or SD_MODEL_PATH"
            )
        self._latents, self._text = latents[:n], text[:n]

    def __len__(self) -> int:
        return len(self._text)

    @property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] float32, all of them in memory."""
        return torch.from_numpy(np.array(self._latents, dtype=np.float32))

    def batch(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0 [b, C, h, w], cond [b, T, d]) of consecutive rows, on the model's device and in its
        dtype.
        """
        parts = (
            np.array(array[rows.start : rows.stop], dtype=np.float32)
            for array in (self._latents, self._text)
        )
        return tuple(
            torch.from_numpy(part).to(self.model.device, self.model.dtype) for part in parts
        )

    @cached_property
    def pictures(self) -> ImageCaptionDataset:
        """The pictures and captions behind the rows. UserError when they are not there."""
        if (self.root / PREPARED).exists():
            source = json.loads((self.root / PREPARED).read_text(encoding="utf-8"))["source"]
            data = load_folder(source).split("train")
        else:
            data = _laion(self.root / "laion_subset", len(self))
        if len(data) < len(self):
            raise UserError(
                f"{data.root} has {len(data)} pictures but {self.root / TEXT} has {len(self)} "
                "rows; it was changed since: prepare it again"
            )
        return data.subset(range(len(self)))

    @property
    def everything(self) -> ImageCaptionDataset:
        """The same: encoded pictures have no held-out split."""
        return self.pictures

    def content_hash(self) -> str:
        """sha256 over shape, dtype and evenly spread rows of both arrays: knows another subset or
        order, not every changed row.
        """
        digest = hashlib.sha256()
        for array in (self._latents, self._text):
            digest.update(f"{array.shape}{array.dtype}".encode())
            for row in np.unique(np.linspace(0, len(array) - 1, HASHED_ROWS).astype(int)):
                digest.update(np.ascontiguousarray(array[row]).tobytes())
        return digest.hexdigest()


def _array(path: Path, dims: int) -> np.ndarray:
    """The array, memory-mapped. UserError when it is missing, truncated, or not of `dims`
    dimensions.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; fetch it with PARTS=latents bash scripts/abc/run_download.sh or "
            "make it with run_prepare.sh"
        ) from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it and download or prepare it again"
        ) from None
    if array.ndim != dims or not len(array) or array.dtype.kind != "f":
        raise UserError(
            f"{path} is {array.dtype} {list(array.shape)}, not float with {dims} dimensions; "
            "download or prepare it again"
        )
    return array


def _laion(root: Path, count: int) -> ImageCaptionDataset:
    """The first `count` pictures of images/ in lexical order with the lines of captions.txt."""
    if not (root / "captions.txt").is_file() or not (root / "images").is_dir():
        raise UserError(
            f"{root} (images/, captions.txt) is missing, so results cannot be shown; "
            "fetch it with PARTS=laion_subset bash scripts/abc/run_download.sh"
        )
    names = sorted(
        p.name for p in (root / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
    )[:count]
    with open(root / "captions.txt", encoding="utf-8") as lines:
        captions = [line.rstrip("\n") for line in itertools.islice(lines, count)]
    if len(captions) < len(names):
        raise UserError(
            f"{root / 'captions.txt'} has {len(captions)} lines for {len(names)} pictures; "
            "download laion_subset again"
        )
    return ImageCaptionDataset(root / "images", [{"file_name": name} for name in names], captions)
