"""Encode a folder of pictures and captions once, in the layout of `datasets.encoded`.

laion_latents.npy [2 N, C, h, w]   posterior means of the VAE x scaling factor; row N + i is
                                   picture i mirrored
laion_text_embeddings.npy [N, T, d]
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from ..atomic_io import (
    PART,
    READ_BYTES,
    disk_errors,
    make_folder,
    sha256_file,
    sync_folder,
    write_fully,
    write_json,
)
from ..errors import UserError, remove_hint, script_hint
from ..models.text_to_image import TextToImage, load_pipeline
from ..settings import Settings, provenance, short_hash
from ..validated_io import read_json, read_npy
from .encoded import LATENTS, PREPARED, TEXT
from .image_folder import ImageCaptionDataset, load_folder

SYNC_SECONDS = 10.0  # of work that a kill loses at most, beside the step at hand
Shape = tuple[int, ...]


class EncodedWriter:
    """Both arrays while they are made, in hidden files of the folder; what a kill left there is
    gone on with. Attributes: done, {first row: digest} of the steps that are safely on the disk;
    made, the record of the finished arrays, {} until they are whole.

    .laion_latents.npy.part            header and rows, at the end those of the mirrored pictures
    .mirrored.part                     rows of the mirrored pictures until then
    .laion_text_embeddings.npy.part    header and rows
    .prepared.json.part                made_by, shapes, done, made
    """

    def __init__(self, folder: Path, made_by: dict[str, Any], shapes: tuple[Shape, Shape]) -> None:
        """made_by: what decides a row beside its picture (JSON). shapes: of a row of each array.

        UserError while another process makes them.
        """
        self.folder, self.shapes = folder, shapes
        self.like = {"made_by": made_by, "shapes": [list(shape) for shape in shapes]}
        self.progress = folder / f".{PREPARED}{PART}"
        self.paths = [folder / f".{name}{PART}" for name in (LATENTS, "mirrored", TEXT)]
        self.row_bytes = [2 * int(np.prod(shapes[i])) for i in (0, 0, 1)]
        self.begins = [len(_header(2, shapes[0])), 0, len(_header(1, shapes[1]))]
        self.done: dict[int, str] = {}
        self.made: dict[str, Any] = {}
        self.files: list[BinaryIO] = []
        self.synced = time.monotonic()

    def __enter__(self) -> EncodedWriter:
        with disk_errors(self.folder):
            self.folder_lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(self.folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self.folder_lock)
                told = f"{self.folder} is being encoded by another process"
                raise UserError(f"{told}; let it end, then run the same again") from None
            self._read_progress()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()
        os.close(self.folder_lock)  # and with it the lock

    def _read_progress(self) -> None:
        with contextlib.suppress(UserError, ValueError, AttributeError):
            known = read_json(self.progress, remove_hint(self.progress))
            if self.like.items() <= known.items():
                self.done = {int(start): str(name) for start, name in known["done"].items()}
                self.made = dict(known.get("made") or {})

    def open(self) -> None:
        """Open the files to go on; steps that they do not hold are not counted as done."""
        if not all(path.exists() for path in self.paths):
            self.done = {}
        self.made = {}
        with disk_errors(self.folder):
            for path in self.paths:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self.files.append(open(fd, "r+b", buffering=0))

    def left(self, steps: Sequence[range], digests: Sequence[list[str]]) -> list[int]:
        """Which steps are not on the disk yet, of the very pictures and captions. The others of
        before are not counted as done any more: their rows are about to change.
        """
        sizes = [os.fstat(file.fileno()).st_size for file in self.files]
        room = min(
            (size - begin) // each
            for size, begin, each in zip(sizes, self.begins, self.row_bytes, strict=True)
        )
        done = {
            rows.start: self.done[rows.start]
            for rows, names in zip(steps, digests, strict=True)
            if self.done.get(rows.start) == short_hash(names) and rows.stop <= room
        }
        if done != self.done:
            self.done = done
            self.sync()
        return [i for i, rows in enumerate(steps) if rows.start not in done]

    def write(self, rows: range, digests: list[str], parts: Sequence[torch.Tensor]) -> None:
        """Put the rows of a step: latents, those of the mirrored pictures, captions, [b, ...] each.

        UserError for a NaN, a number beyond float16, a full disk.
        """
        for i, part in enumerate(parts):
            values = part.float().half().cpu().numpy()
            if not np.isfinite(values).all():
                raise UserError(
                    "an encoded picture or caption is NaN or too large for float16; set DTYPE=fp32"
                )
            self._put(i, rows.start, values.tobytes())
        self.done[rows.start] = short_hash(digests)
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def _put(self, i: int, row: int, content: bytes) -> None:
        with disk_errors(self.paths[i]):
            self.files[i].seek(self.begins[i] + row * self.row_bytes[i])
            write_fully(self.files[i].fileno(), content)

    def sync(self, **also: Any) -> None:
        """Put what was written on the disk, and then write down that it is there."""
        with disk_errors(self.folder):
            for file in self.files:
                os.fsync(file.fileno())
        write_json(self.progress, self.like | {"done": self.done} | also)
        self.synced = time.monotonic()

    def finish(self, rows: int, record: dict[str, Any]) -> None:
        """Give the arrays of so many rows their names, and `record` with their checksums its own.
        A kill on the way loses nothing: what is left of it is done by the next call.
        """
        self.sync()
        latents, mirrored, text = self.files
        step = max(1, READ_BYTES // self.row_bytes[1])
        for start in range(0, rows, step):
            mirrored.seek(start * self.row_bytes[1])
            self._put(0, rows + start, mirrored.read(min(step, rows - start) * self.row_bytes[1]))
        with disk_errors(self.folder):
            for i, file, count in ((0, latents, 2 * rows), (2, text, rows)):
                file.truncate(self.begins[i] + count * self.row_bytes[i])
                file.seek(0)
                write_fully(file.fileno(), _header(count, self.shapes[i // 2]))
        arrays = {n: sha256_file(self.folder / f".{n}{PART}") for n in (LATENTS, TEXT)}
        self.made = record | {"arrays": arrays}
        self.sync(made=self.made)
        self.publish()

    def publish(self) -> bool:
        """Name what is finished, if it is what `made` says."""
        with disk_errors(self.folder):
            for name, path in ((LATENTS, self.paths[0]), (TEXT, self.paths[2])):
                with contextlib.suppress(FileNotFoundError):  # a kill came right after
                    os.replace(path, self.folder / name)
            sync_folder(self.folder)
        if _checksums(self.folder) != self.made["arrays"]:
            return False
        write_json(self.folder / PREPARED, self.made)
        with disk_errors(self.folder):
            self.progress.unlink(missing_ok=True)
            self.paths[1].unlink(missing_ok=True)
        return True


def _header(count: int, shape: Shape) -> bytes:
    """Of a float16 .npy [count, *shape]; as long for any count, as numpy leaves room for it."""
    buffer = io.BytesIO()
    fields = {"descr": "<f2", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def prepare(settings: Settings, device: str) -> Path:
    """Encode the train split of SOURCE_DIR into DATA_DIR (made if missing), which is returned;
    nothing to do when that was done already, and little when pictures were added since.

    Arrays are float16 and get their names when complete; N (2 C h w + T d) 2 bytes, and N C h w 2
    more until then. A killed run goes on, to the same bytes, with what it had on the disk: a step
    of BATCH_SIZE pictures is encoded again if one of them, or its caption, was changed. Raises
    UserError for unreadable pictures, and a full disk.
    """
    source, folder = settings.source_dir, Path(settings.data_dir)
    if not source:
        kinds = "metadata.jsonl, metadata.csv or captions.txt"
        line = script_hint("abc/run_prepare.sh", SOURCE_DIR="my_pictures", DATA_DIR=folder)
        raise UserError(f"SOURCE_DIR is not set; give a folder of pictures with {kinds}: {line}")
    model_path, dtype = settings.sd_model_path, settings.dtype
    everything = load_folder(source)
    data = everything.split("train")
    model = load_pipeline(model_path, device, dtype, settings.lora_path)
    if told := everything.told_splits():
        print(f"{source}: {len(data)} of {len(everything)} pictures, {told}")
    made_from = {"source": str(Path(source).resolve()), "pictures": data.content_hash()}
    made_by = {"encoders": model.encoder_hash(), "dtype": dtype}
    made_from |= made_by | {"rows": len(data)}
    record = folder / PREPARED
    made_from["digests"] = data.digests()
    before = Encoded({})
    with contextlib.suppress(UserError):  # none, or none that can be used
        known = read_json(record, remove_hint(record))
        if known.get("arrays") == _checksums(folder):
            if made_from.items() <= known.items():
                return folder
            if made_by.items() <= known.items():
                before = Encoded.read(folder, known.get("digests"))
    make_folder(folder)
    shapes = tuple(model.latent_shape), tuple(model.encode_prompts([""]).embeddings.shape[1:])
    with EncodedWriter(folder, made_by, shapes) as parts:
        if made_from.items() <= parts.made.items() and parts.publish():
            return folder
        parts.open()
        encode(model, data, parts, settings.batch_size, before)
        made = {"sd_model_path": model_path, "provenance": provenance()}
        parts.finish(len(data), made_from | made)
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
        paths = (folder / LATENTS, folder / TEXT)
        latents, text = (read_npy(path, remove_hint(path), mmap=True) for path in paths)
        named = isinstance(digests, list) and all(isinstance(name, str) for name in digests)
        if not named or not len(digests) == len(text) == len(latents) / 2:
            raise UserError(
                f"{folder / PREPARED} is not of the arrays beside it; {remove_hint(folder)}"
            )
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
    model: TextToImage, data: ImageCaptionDataset, parts: EncodedWriter, step: int, before: Encoded
) -> None:
    """Write all rows, `step` pictures at a time; what was encoded before is copied where all of a
    step is known. UserError for a disk that is too small.
    """
    n, folder = len(data), parts.folder
    steps = [range(start, min(start + step, n)) for start in range(0, n, step)]
    digests = [data.digests()[rows.start : rows.stop] for rows in steps]
    todo = parts.left(steps, digests)
    wide, narrow = parts.row_bytes[0], parts.row_bytes[2]
    told = f"{n} pictures, {n * (2 * wide + narrow) / 1e6:.0f} MB when complete"
    found = n - sum(len(steps[i]) for i in todo)
    print(f"{folder}: {told}" + (f", {found} encoded before the last stop" if found else ""))
    needed = n * (3 * wide + narrow) - found * (2 * wide + narrow)  # the mirrored ones twice
    if (free := shutil.disk_usage(folder).free) < needed:  # asked before hours of work
        has = f"has {free / 1e6:.0f} MB free but {needed / 1e6:.0f} MB are needed"
        raise UserError(f"{folder} {has}; free some or set DATA_DIR to another folder")
    for i in tqdm(todo, desc="encoding", unit=f" x {step} pictures"):
        known = before.pick(digests[i])
        parts.write(steps[i], digests[i], known or encoded(model, data, steps[i]))


def encoded(
    model: TextToImage, data: ImageCaptionDataset, rows: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents [b, C, h, w], latents of the mirrored pictures, captions [b, T, d])."""
    pixels = data.images(rows, size=model.image_size)
    latents = (model.encode_images(x) for x in (pixels, pixels[:, :, ::-1]))
    return (*latents, model.encode_prompts([data.captions[i] for i in rows]).embeddings)
