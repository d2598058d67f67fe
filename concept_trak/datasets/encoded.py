"""Pictures encoded already, in the layout of the AbC release (Wang et al. 2023, 2024).

    laion_latents.npy           [M >= N, C, h, w] scaled latents; mirrored pictures may follow the
                                N originals
    laion_text_embeddings.npy   [N, T, d]; its length says how many originals there are
    laion_subset/images/*       the pictures, in lexical order; needed to show results only
    laion_subset/captions.txt   one caption a line, in that order
    prepared.json               instead of laion_subset, when `prepare` made the arrays

Both arrays are memory-mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic_io import sha256_file, write_json
from ..errors import UserError, remove_hint, script_hint
from ..models.condition import Condition
from ..models.text_to_image import TextToImage
from ..settings import short_hash
from ..validated_io import read_json, read_npy, read_text
from .image_folder import ImageCaptionDataset, load_folder, looks
from .metadata import is_data
from .picture import IMAGE_SUFFIXES

LATENTS, TEXT, PREPARED = "laion_latents.npy", "laion_text_embeddings.npy", "prepared.json"
HASHES = ".content.json"  # of the arrays: 36 GB would take minutes at every start
SHOWN_HASH = ".pictures.json"  # the same of released pictures
SOURCE = "my_pictures"  # stands for a folder that nothing here names


def prepare_again(root: Path, model_path: str, source: str = SOURCE) -> str:
    """What makes the arrays of a folder, its record with them."""
    where = {"SOURCE_DIR": source, "DATA_DIR": root, "SD_MODEL_PATH": model_path}
    return f"prepare it again: {script_hint('abc/run_prepare.sh', **where)}"


def encode_hint(root: Path) -> str:
    """What brings released arrays to a folder, or makes some of one's own pictures there."""
    fetch = script_hint("abc/run_download.sh", DATA_DIR=root, PARTS="latents")
    prepare = script_hint("abc/run_prepare.sh", SOURCE_DIR=SOURCE, DATA_DIR=root)
    return f"make it: {prepare}, or fetch it (some 20 GB): {fetch}"


def download_hint(root: Path) -> str:
    """What brings the released pictures anew: what is there is not overwritten."""
    fetch = script_hint("abc/run_download.sh", DATA_DIR=root, PARTS="laion_subset")
    return f"move laion_subset away and fetch it again (about 265 GB): {fetch}"


class EncodedData:
    """The first `num_train` (0: all) encoded pictures of a folder, for the given model.

    UserError for a missing or truncated array, arrays that do not fit each other or the model.
    """

    def __init__(self, root: str | Path, model: TextToImage, num_train: int = 0) -> None:
        self.root, self.model = Path(root), model
        latents, text = _array(self.root / LATENTS, 4), _array(self.root / TEXT, 3)
        n = min(len(text), num_train or len(text))
        if len(latents) < n:
            counts = f"has {len(latents)} rows but {TEXT} has {len(text)} captions"
            raise UserError(f"{self.root / LATENTS} {counts}; {encode_hint(self.root)}")
        remedy, shape = "mend DATA_DIR or SD_MODEL_PATH", list(latents.shape[1:])
        if shape != list(model.latent_shape):
            takes = f"but the model takes {list(model.latent_shape)}"
            raise UserError(f"{self.root / LATENTS} holds latents {shape} {takes}; {remedy}")
        width = model.pipe.unet.config.cross_attention_dim
        if text.shape[2] != width:
            takes = f"but the model takes {width}"
            raise UserError(f"{self.root / TEXT} is {text.shape[2]} wide {takes}; {remedy}")
        self._latents, self._text = latents[:n], text[:n]

    def __len__(self) -> int:
        return len(self._text)

    @property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] float32, all of them in memory."""
        return torch.from_numpy(np.array(self._latents, dtype=np.float32))

    def batch(self, rows: range) -> tuple[torch.Tensor, Condition]:
        """x0 [b, C, h, w] and captions of consecutive rows, in the model's device and dtype."""
        part, model = slice(rows.start, rows.stop), self.model
        x0, embeddings = (
            torch.from_numpy(np.array(array[part], dtype=np.float32)).to(model.device, model.dtype)
            for array in (self._latents, self._text)
        )
        return x0, Condition(embeddings)

    @cached_property
    def pictures(self) -> ImageCaptionDataset:
        """The pictures and captions behind the rows. UserError when they are not there."""
        if (self.root / PREPARED).exists():
            return self._prepared()
        data = _laion(self.root / "laion_subset", len(self))
        if len(data) < len(self):
            counts = f"has {len(data)} pictures but {self.root / TEXT} has {len(self)} rows"
            raise UserError(f"{data.root} {counts}; {download_hint(self.root)}")
        return data.subset(range(len(self)))

    def _prepared(self) -> ImageCaptionDataset:
        """The pictures that were encoded, in the order of the rows whatever theirs is now."""
        record = self._record()
        source, digests = record["source"], record["digests"]
        data = load_folder(source).split("train")
        places: dict[str, list[int]] = {}
        for i, name in reversed(list(enumerate(data.digests()))):
            places.setdefault(name, []).append(i)
        try:  # a picture that is there twice serves each of its rows once
            order = [places[name].pop() for name in digests[: len(self)]]
        except (KeyError, IndexError, TypeError):
            reason = "a picture or caption that was encoded is not there any more"
            mend = self._prepare_again(source)
            raise UserError(f"{source} was changed since: {reason}; {mend}") from None
        return data.subset(order)

    def _record(self) -> dict[str, Any]:
        """What `prepare` wrote down. UserError when it is not of these arrays."""
        path = self.root / PREPARED
        record = read_json(path, self._prepare_again())
        source, digests = record.get("source"), record.get("digests")
        mend = self._prepare_again(source if isinstance(source, str) else SOURCE)
        if not isinstance(source, str) or not isinstance(digests, list):
            raise UserError(f"{path} does not say which pictures were encoded; {mend}")
        if len(digests) < len(self) or record.get("arrays") != self._checksums:
            raise UserError(f"{path} is not of the arrays beside it; {mend}")
        if record.get("encoders") != self.model.encoder_hash():
            reason = "its pictures were encoded by another model (or version)"
            raise UserError(f"{path}: {reason}; mend SD_MODEL_PATH, or {mend}")
        return record

    def _prepare_again(self, source: str = SOURCE) -> str:
        return prepare_again(self.root, self.model.source, source)

    @property
    def everything(self) -> ImageCaptionDataset:
        """The same: encoded pictures have no held-out split."""
        return self.pictures

    def content_hash(self) -> str:
        """sha256 over the checksums of both files and the number of rows in use."""
        return hashlib.sha256(json.dumps([self._checksums, len(self)]).encode()).hexdigest()

    @cached_property
    def _checksums(self) -> dict[str, str]:
        """{name: sha256} of both files, taken again when one has another size, time or inode."""
        paths = [self.root / name for name in (LATENTS, TEXT)]
        stamps = {path.name: _stamp(path) for path in paths}
        whole = {path.name: path for path in paths}
        return _cached_digest(
            self.root / HASHES, stamps, lambda: {k: sha256_file(p) for k, p in whole.items()}
        )

    def digests(self) -> list[str]:
        """Of each row's picture and caption, as `prepare` found them, and of what encoded them; []
        for released arrays.
        """
        if not (self.root / PREPARED).exists():
            return []
        record = self._record()
        by = f"{record['encoders']} {record.get('dtype')}"
        named = (f"{by} {own}" for own in record["digests"][: len(self)])
        return [hashlib.sha256(text.encode()).hexdigest() for text in named]

    def shown_hash(self) -> str:
        """Of the pictures and captions that released rows are shown with, in their order; empty
        while those are not there, and for prepared rows, which are paired by content.
        """
        if (self.root / PREPARED).exists():
            return ""
        try:
            data = self.pictures
        except UserError:  # told when they are to be shown
            return ""
        files = [[data.path(i).name, *_stamp(data.path(i))] for i in range(len(data))]
        stamps = hashlib.sha256(json.dumps([files, data.captions]).encode()).hexdigest()
        mend = download_hint(self.root)
        return _cached_digest(
            self.root / SHOWN_HASH, stamps, lambda: {"pictures": looks(data, mend)}
        )["pictures"]


def _cached_digest(
    path: Path, stamps: Any, compute: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """What was computed while the stamps were the same, as the file `path` has it under a checksum
    of its own; else computed, and kept there if the disk takes it.
    """
    with contextlib.suppress(UserError):
        known = read_json(path, remove_hint(path))
        kept = known.get("checksums")
        if known == {"stamps": stamps, "checksums": kept, "digest": short_hash([stamps, kept])}:
            return kept
    found = compute()
    with contextlib.suppress(UserError):  # a folder that cannot be written
        record = {"stamps": stamps, "checksums": found, "digest": short_hash([stamps, found])}
        write_json(path, record)
    return found


def _stamp(path: Path) -> list[int]:
    """What changes when a file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _array(path: Path, dims: int) -> np.ndarray:
    """The array, memory-mapped. UserError when missing, truncated, or not of `dims` dimensions."""
    if not path.exists():
        raise UserError(f"{path} is missing; {encode_hint(path.parent)}")
    mend = f"remove it and {encode_hint(path.parent)}"
    array = read_npy(path, mend, mmap=True)
    if array.ndim != dims or not len(array) or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}, not float with {dims} dimensions"
        raise UserError(f"{path} is {found}; {mend}")
    return array


def _laion(root: Path, count: int) -> ImageCaptionDataset:
    """The first `count` pictures of images/ in lexical order with the lines of captions.txt."""
    if not (root / "captions.txt").is_file() or not (root / "images").is_dir():
        missing = f"{root} (images/, captions.txt) is missing, so results cannot be shown"
        fetch = script_hint("abc/run_download.sh", DATA_DIR=root.parent, PARTS="laion_subset")
        raise UserError(f"{missing}; fetch it (about 265 GB): {fetch}")
    images = (p for p in (root / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(p.name for p in images if is_data(Path(p.name)))[:count]
    mend = download_hint(root.parent)
    lines = io.StringIO(read_text(root / "captions.txt", mend), None)
    captions = [line.rstrip("\n") for line in itertools.islice(lines, count)]
    if len(captions) < len(names):
        counts = f"has {len(captions)} lines for {len(names)} pictures"
        raise UserError(f"{root / 'captions.txt'} {counts}; {mend}")
    return ImageCaptionDataset(root / "images", [{"file_name": name} for name in names], captions)
