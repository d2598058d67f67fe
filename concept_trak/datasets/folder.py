"""Any folder of images and captions.

Two layouts are read:
    metadata.jsonl or metadata.csv   Hugging Face `imagefolder`: one row an image with `file_name`,
                                     `text` (or `caption`) and any other columns
    captions.txt                     one caption a line, for the images of the folder in lexical
                                     order of their relative paths
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import struct
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..reading import checked_file, inside, named, parse_json, read_text

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# what Pillow raises for a file that is no picture
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error),
    *(OverflowError, ZeroDivisionError, MemoryError, AttributeError, Image.DecompressionBombError),
)
MEND = (
    "write in it the file_name and text of each picture (metadata.jsonl, metadata.csv), or one "
    "caption a line (captions.txt)"
)
REPLACE = "put another picture there, or remove its row from the metadata.jsonl"
TEXTS = ("split", "object", "object_phrase", "style", "style_phrase")  # columns of words
HEAD_BYTES = 4096  # of a picture's file, that its looks are told by
MAX_PIXELS = 150_000_000  # of a picture: 450 MB once decoded; the largest cameras make as many

Record = dict[str, Any]  # a metadata row


class ImageCaptionDataset:
    """Captioned images on disk; pictures are decoded when asked for.

    records: the metadata rows, each with "file_name", a path below root.
    """

    def __init__(self, root: str | Path, records: list[Record], captions: list[str]) -> None:
        self.root, self.records, self.captions = Path(root), records, captions

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> Path:
        """Of one picture."""
        return self.root / self.records[index]["file_name"]

    def image(self, index: int, size: int | None = None) -> Image.Image:
        """One picture, RGB on white. size: side in pixels; the largest centred square is resized to
        it (Lanczos).

        Raises UserError if the file is not a readable picture.
        """
        path = self.path(index)
        checked_file(path, REPLACE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    refuse_bomb(path, opened.size)
                    picture = _on_white(ImageOps.exif_transpose(opened))
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as a picture ({reason}); {REPLACE}") from None
        if size is None or picture.size == (size, size):
            return picture
        return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)

    def images(self, indices: Sequence[int], size: int | None = None) -> np.ndarray:
        """uint8 [len(indices), H, W, 3], RGB on white; see `image` for size.

        Raises UserError if a picture is unreadable, or if size is None and the pictures differ in
        size.
        """
        pictures = [np.asarray(self.image(int(i), size)) for i in indices]
        if len({picture.shape for picture in pictures}) > 1:
            remedy = "give the size to bring them to"
            raise UserError(f"the pictures of {self.root} differ in size; {remedy}")
        return np.stack(pictures) if pictures else np.zeros((0, size or 0, size or 0, 3), np.uint8)

    def column(self, name: str) -> list[Any]:
        """The values of one metadata column, None where a row has none."""
        return [record.get(name) for record in self.records]

    def subset(self, indices: Sequence[int]) -> ImageCaptionDataset:
        """The rows at these positions (not a boolean mask), in this order."""
        chosen = [int(i) for i in indices]
        records = [self.records[i] for i in chosen]
        return ImageCaptionDataset(self.root, records, [self.captions[i] for i in chosen])

    def split(self, name: str) -> ImageCaptionDataset:
        """Rows whose "split" equals name; a dataset without splits is all "train".

        Raises UserError if there is no such split.
        """
        splits = self.column("split")
        if name == "train" and not any(splits):
            return self
        indices = [i for i, value in enumerate(splits) if value == name]
        if not indices:
            known = sorted({s for s in splits if s}) or ["train"]
            raise UserError(f"{self.root} has no split {name!r}; give name one of {known}")
        return self.subset(indices)

    def content_hash(self) -> str:
        """sha256 hex over captions and file contents in row order, not names; computed once."""
        return self._hashes[0]

    def digests(self) -> list[str]:
        """sha256 hex of each row's caption and file content; computed once."""
        return self._hashes[1]

    @cached_property
    def _hashes(self) -> tuple[str, list[str]]:
        whole, rows = hashlib.sha256(), []
        for content in map(self._content, range(len(self))):
            whole.update(content)
            rows.append(hashlib.sha256(content).hexdigest())
        return whole.hexdigest(), rows

    def _content(self, index: int) -> bytes:
        path = self.path(index)
        checked_file(path, REPLACE)
        with named(path, REPLACE):
            parts = (self.captions[index].encode(), path.read_bytes())
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


@functools.lru_cache(maxsize=4)
def looks(data: ImageCaptionDataset, mend: str = REPLACE) -> str:
    """sha256 over names, sizes, first bytes and captions: to read all of 100,000 photos (265 GB)
    would take an hour. UserError, which ends with `mend`, for a file that is not there.
    """
    whole = hashlib.sha256()
    for record, caption, path in zip(
        data.records, data.captions, map(data.path, range(len(data))), strict=True
    ):
        size = checked_file(path, mend)
        with named(path, mend), open(path, "rb") as file:
            head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
        whole.update(json.dumps([record["file_name"], size, head, caption]).encode())
    return whole.hexdigest()


def refuse_bomb(path: Path, size: tuple[int, int]) -> None:
    """UserError for a picture whose header, all that was read yet, promises too many pixels."""
    if size[0] * size[1] > MAX_PIXELS:
        given = f"{size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}"
        raise UserError(f"{path} has {given}; {REPLACE}")


def pictures(paths: list[str | Path], prompt: str) -> ImageCaptionDataset:
    """Pictures of folders (their own, sorted by name) and files, as listed, captioned with the
    prompt.

    UserError when there is none or a file does not exist.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            remedy = "give --images a folder or picture files"
            raise UserError(f"the picture {path} does not exist; {remedy}")
    if not found:
        where, kinds = " ".join(map(str, paths)) or "--images", ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{where} holds no picture ({kinds}); give --images exemplars")
    return ImageCaptionDataset("", [{"file_name": str(p)} for p in found], [prompt] * len(found))


def load_folder(root: str | Path) -> ImageCaptionDataset:
    """Read a folder in either layout of this module.

    Raises UserError if the folder or its captions are missing, a row names no file or a missing
    one, a caption is empty, or captions.txt and the images differ in number.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"data folder {root} does not exist; give a folder with metadata.jsonl, metadata.csv "
            "or captions.txt, DATA_DIR=my_pictures"
        )
    path = next((root / name for name in READERS if (root / name).is_file()), None)
    if path is None:
        files = "metadata.jsonl, metadata.csv (file_name, text) or captions.txt"
        raise UserError(f"{root} has no captions; put into it {files}")
    records = READERS[path.name](path)
    if not records:
        raise UserError(f"{path} has no rows; {MEND}")
    captions = [_checked_caption(path, i, row) for i, row in enumerate(records, 1)]
    return ImageCaptionDataset(root, records, captions)


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB copy; transparent pixels show white paper."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    paper.alpha_composite(layer)
    return paper.convert("RGB")


def _checked_caption(path: Path, number: int, record: Record) -> str:
    """The caption of row `number` (from 1) of the file `path`, after checking the row."""
    where, root, name = f"{path}, row {number}", path.parent, record.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no file_name; write one into that row of {path.name}")
    if not inside(root, name, f"{where}: the file").is_file():
        raise UserError(
            f"{where}: the file {name} does not exist in {root}; "
            f"put it there, or remove the row from {path.name}"
        )
    if wrong := [key for key in TEXTS if not isinstance(record.get(key), str | None)]:
        value = repr(record[wrong[0]])[:40]
        raise UserError(
            f"{where}: {wrong[0]} is {value}, not text; mend it, or leave it out of {path.name}"
        )
    given = (record.get(key) for key in ("text", "caption"))
    caption = next((text for text in given if text is not None), None)
    if not isinstance(caption, str) or not caption.strip():
        remedy = f"write one into the column text of {path.name}"
        raise UserError(f"{where}: empty caption for {name}; {remedy}")
    return caption


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(read_text(path, MEND).split("\n"), 1):
        if not line.strip():
            continue
        records.append(parse_json(line, f"{path}, line {number}", MEND, dict))
    return records


def _read_csv(path: Path) -> list[Record]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, MEND), newline="")))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error}); {MEND}") from None
    return [{key: value for key, value in row.items() if key and value != ""} for row in rows]


def _read_captions(path: Path) -> list[Record]:
    text = io.StringIO(read_text(path, MEND), newline=None).read()
    captions = text.rstrip("\n").split("\n")
    images = (p for p in path.parent.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(p.relative_to(path.parent).as_posix() for p in images)
    if len(captions) != len(names):
        counts = f"has {len(captions)} captions but the folder has {len(names)} images"
        remedy = "write one caption a line, in lexical order of the paths, into captions.txt"
        raise UserError(f"{path} {counts}; {remedy}")
    pairs = zip(names, captions, strict=True)
    return [{"file_name": name, "text": caption} for name, caption in pairs]


READERS = {  # the first of these files that is there counts
    "metadata.jsonl": _read_jsonl,
    "metadata.csv": _read_csv,
    "captions.txt": _read_captions,
}
