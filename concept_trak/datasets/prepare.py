"""Encode a folder of pictures and captions once, in the layout of `datasets.encoded`.

laion_latents.npy [2 N, C, h, w]   posterior means of the VAE x scaling factor; row N + i is
                                   picture i mirrored
laion_text_embeddings.npy [N, T, d]
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError, call
from ..files import atomic, make_folder, sha256_file, write_json
from ..models.text_to_image import TextToImage, load_pipeline
from ..reading import read_json, read_npy
from ..settings import Settings, provenance
from .encoded import LATENTS, PREPARED, TEXT
from .folder import ImageCaptionDataset, load_folder

ANEW = "it is made again"


class ArrayFile:
    """A float16 .npy [n, ...] whose rows are written in any order."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self.file, self.row_bytes = file, 2 * int(np.prod(shape[1:]))
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        self.begin = file.tell()

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Put rows [b, ...] from `start` on. UserError for a NaN, or a number beyond float16."""
        values = rows.float().half().cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError(
                "an encoded picture or caption is NaN or too large for float16; use DTYPE=fp32"
            )
        self.file.seek(self.begin + start * self.row_bytes)
        self.file.write(values.tobytes())


def prepare(settings: Settings, device: str) -> Path:
    """Encode the train split of SOURCE_DIR into DATA_DIR (made if missing), which is returned;
    nothing to do when that was done already, and little when pictures were added since.

    Arrays are float16 and get their names when complete; N (2 C h w + T d) 2 bytes. A killed run
    begins again. Raises UserError for unreadable pictures, and a full disk.
    """
    source, folder = settings.source_dir, Path(settings.data_dir)
    if not source:
        kinds = "metadata.jsonl, metadata.csv or captions.txt"
        line = call("abc/run_prepare.sh", SOURCE_DIR="my_pictures", DATA_DIR=folder)
        raise UserError(f"SOURCE_DIR is not set; give a folder of pictures with {kinds}: {line}")
    model_path, dtype = settings.sd_model_path, settings.dtype
    model = load_pipeline(model_path, device, dtype, settings.lora_path)
    data = load_folder(source).split("train")
    made_from = {"source": str(Path(source).resolve()), "pictures": data.content_hash()}
    made_by = {"encoders": model.encoder_hash(), "dtype": dtype}
    made_from |= made_by | {"rows": len(data)}
    record = folder / PREPARED
    made_from["digests"] = data.digests()
    before = Encoded({})
    with contextlib.suppress(UserError):  # none, or none that can be used
        known = read_json(record, ANEW)
        if known.get("arrays") == _checksums(folder):
            if made_from.items() <= known.items():
                return folder
            if made_by.items() <= known.items():
                before = Encoded.read(folder, known.get("digests"))
    make_folder(folder)
    encode(model, data, folder, settings.batch_size, before)
    made = {"arrays": _checksums(folder), "sd_model_path": model_path, "provenance": provenance()}
    write_json(record, made_from | made)
    return folder


@dataclass(frozen=True)
class Encoded:
    """What was encoded before, as it is on the disk. rows: {digest of picture and caption: row}.

    latents [2 N, C, h, w], text [N, T, d].
    """

    rows: dict[str, int]
    latents: np.ndarray | None = None
    text: np.ndarray | None = None

    @classmethod
    def read(cls, folder: Path, digests: Any) -> Encoded:
        """The arrays of a folder, whose rows have these digests. UserError when they cannot be
        read or the digests, as a record has them, are none.
        """
        latents, text = (read_npy(folder / name, ANEW, mmap=True) for name in (LATENTS, TEXT))
        named = isinstance(digests, list) and all(isinstance(name, str) for name in digests)
        if not named or not len(digests) == len(text) == len(latents) / 2:
            raise UserError(f"{folder / PREPARED} is not of the arrays beside it; {ANEW}")
        return cls({name: row for row, name in enumerate(digests)}, latents, text)

    def pick(self, digests: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(latents, latents of the mirrored pictures, captions) of these; None if one is not
        there.
        """
        if not self.rows.keys() >= set(digests):
            return None
        rows = np.array([self.rows[name] for name in digests])
        parts = (self.latents[rows], self.latents[len(self.text) + rows], self.text[rows])
        return tuple(torch.from_numpy(np.array(part)) for part in parts)


def _checksums(folder: Path) -> dict[str, str]:
    """{name: sha256} of both arrays; empty for one that is not there."""
    paths = [folder / name for name in (LATENTS, TEXT)]
    return {path.name: sha256_file(path) if path.is_file() else "" for path in paths}


def encode(
    model: TextToImage, data: ImageCaptionDataset, folder: Path, step: int, before: Encoded
) -> None:
    """Write both arrays, `step` pictures at a time; what was encoded before is copied where all of
    a step is known. UserError for a disk that is too small.
    """
    n = len(data)
    text_shape = tuple(model.encode_prompts([""]).embeddings.shape[1:])
    needed = 2 * n * int(2 * np.prod(model.latent_shape) + np.prod(text_shape))
    print(f"{folder}: {n} pictures, {needed / 1e6:.0f} MB when complete")
    if (free := shutil.disk_usage(folder).free) < needed:  # asked before hours of work
        has = f"has {free / 1e6:.0f} MB free but {needed / 1e6:.0f} MB are needed"
        raise UserError(f"{folder} {has}; free some or choose another folder")
    with atomic(folder / LATENTS) as latent_file, atomic(folder / TEXT) as text_file:
        latents = ArrayFile(latent_file, (2 * n, *model.latent_shape))
        text = ArrayFile(text_file, (n, *text_shape))
        for start in tqdm(range(0, n, step), desc="encoding", unit=f" x {step} pictures"):
            rows = range(start, min(start + step, n))
            known = before.pick(data.digests()[rows.start : rows.stop])
            plain, mirrored, captions = known or encoded(model, data, rows)
            latents.write(start, plain)
            latents.write(n + start, mirrored)
            text.write(start, captions)


def encoded(
    model: TextToImage, data: ImageCaptionDataset, rows: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents [b, C, h, w], latents of the mirrored pictures, captions [b, T, d])."""
    pixels = data.images(rows, size=model.image_size)
    latents = (model.encode_images(x) for x in (pixels, pixels[:, :, ::-1]))
    return (*latents, model.encode_prompts([data.captions[i] for i in rows]).embeddings)
