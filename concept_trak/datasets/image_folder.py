"""Any folder of images and captions.

These layouts are read; of the first three, the first that is there counts:
    metadata.jsonl or metadata.csv   Hugging Face `imagefolder`: one row an image with `file_name`,
                                     `text` (or `caption`) and any other columns
    captions.txt                     one caption a line, for the images of the folder in lexical
                                     order of their relative paths
    a.png and a.txt (or a.caption)   beside each other: a caption of its own for each image
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import posixpath
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..parsing import no_character, normalized
from ..validated_io import file_errors, open_unlinked, safe_join
from .metadata import OnDisk, Record, Row, is_data, read_rows, refuse_container
from .picture import IMAGE_SUFFIXES, decoded, media_type, on_white

REPLACE = "put another picture there, or remove its row from the metadata.jsonl"
HEAD_BYTES = 4096  # of a picture's file, that its looks are told by
HELD_OUT = "held_out"
# The benchmark's labels: a folder that has the phrases has all of them, in every row.
LABELS = ("object", "object_phrase", "style", "style_phrase")
PHRASES = ("object_phrase", "style_phrase")
ATTRIBUTES = "attributes.json"  # of pictures that are labelled by attributes
FIRST = (
    "import json, sys; rows = map(json.loads, open(sys.argv[1])); open(sys.argv[2], 'w')"
    ".writelines(json.dumps({k: v[0] if k in ('text', 'caption') and isinstance(v, list) else v "
    "for k, v in r.items()}) + '\\n' for r in rows)"
)


class ImageCaptionDataset:
    """Captioned images on disk; pictures are decoded when asked for.

    records: the metadata rows, each with "file_name", a path below root. Links are followed as they
    are now: where one stands in a picture's way later, that picture is refused.
    """

    splits = False  # whether every split is a part of its own

    def __init__(self, root: str | Path, records: list[Record], captions: list[str]) -> None:
        self.root, self.records, self.captions = Path(root), records, captions
        self._files = _real_paths(self.root, (record["file_name"] for record in records))

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> Path:
        """Of one picture, to be named and linked to; to read it, see `open_file`."""
        return self.root / self.records[index]["file_name"]

    def open_file(self, index: int, mend: str = REPLACE) -> BinaryIO:
        """One picture's file. UserError, which ends with `mend`, for one that is none, or another
        than was listed.
        """
        return open_unlinked(self._files[index], self.path(index), mend)

    def media_type(self, index: int) -> str:
        """ "image/png" of one picture, by its content. UserError if it is none."""
        with self.open_file(index) as file:
            return media_type(file, self.path(index), REPLACE)

    def image(self, index: int, size: int | None = None) -> Image.Image:
        """One picture, RGB on white. size: side in pixels; the largest centred square is resized to
        it (Lanczos).

        Raises UserError if the file is not a readable picture.
        """
        with self.open_file(index) as file:
            picture = on_white(decoded(file, self.path(index), REPLACE))
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
        part = copy.copy(self)
        part.__dict__.pop("_hashes", None)
        part.records = [self.records[i] for i in chosen]
        part.captions = [self.captions[i] for i in chosen]
        part._files = [self._files[i] for i in chosen]
        return part

    def split(self, name: str) -> ImageCaptionDataset:
        """Rows whose "split" equals name; "train" are all but those that are held out.

        Raises UserError if there is no such row.
        """
        given = [_split_of(value) for value in self.column("split")]
        if name != "train" or self.splits:
            indices = [i for i, value in enumerate(given) if value == name]
        else:
            indices = [i for i, value in enumerate(given) if value != HELD_OUT]
        if not indices and name == "train":
            raise UserError(
                f"{self.root} has no picture to train on: all are held out; write train into the "
                "column split of its metadata.jsonl or metadata.csv"
            )
        if not indices:
            known = sorted(set(given))
            raise UserError(f"{self.root} has no split {name!r}; give name one of {known}")
        return self if len(indices) == len(self) else self.subset(indices)

    def told_splits(self) -> str:
        """ "by split: train 3, held_out 1 (kept out)"; "" where all pictures are of one."""
        counts = Counter(_split_of(value) for value in self.column("split"))
        told = (f"{k} {n}{' (kept out)' * (k == HELD_OUT)}" for k, n in sorted(counts.items()))
        return f"by split: {', '.join(told)}" if counts.keys() - {"train"} else ""

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
        with self.open_file(index) as file:
            parts = (self.captions[index].encode(), file.read())
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


@functools.lru_cache(maxsize=4)
def looks(data: ImageCaptionDataset, mend: str = REPLACE) -> str:
    """sha256 over names, sizes, first bytes and captions: to read all of 100,000 photos (265 GB)
    would take an hour. UserError, which ends with `mend`, for a file that is not there.
    """
    whole = hashlib.sha256()
    for i, (record, caption) in enumerate(zip(data.records, data.captions, strict=True)):
        with file_errors(data.path(i), mend), data.open_file(i, mend) as file:
            head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
            size = os.fstat(file.fileno()).st_size
        whole.update(json.dumps([record["file_name"], size, head, caption]).encode())
    return whole.hexdigest()


def _real_paths(root: Path, names: Iterable[str]) -> list[Path]:
    """Of the files as they are now, links followed."""
    folders: dict[str, str] = {}  # to follow each once

    def real(name: str) -> Path:
        folder, last = os.path.split(os.path.join(root, name))
        if folder not in folders:
            folders[folder] = os.path.realpath(folder) if "\0" not in folder else folder
        path = os.path.join(folders[folder], last)
        return Path(os.path.realpath(path) if os.path.islink(path) else path)

    return [real(name) for name in names]


def _split_of(value: str | None) -> str:
    """The split of a row as it is meant: a row without one, or of a blank one, is trained on."""
    word = (value or "").strip()
    plain = word.casefold().replace("-", "_").replace(" ", "_")
    return HELD_OUT if plain in (HELD_OUT, "heldout") else word or "train"


def read_images(paths: list[str | Path], prompt: str) -> ImageCaptionDataset:
    """Pictures of folders (their own, sorted by name) and files, as listed, captioned with the
    prompt.

    UserError when there is none or a file does not exist.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            names = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            found += sorted(p for p in names if is_data(Path(p.name)))
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
    """Read a folder in a layout of this module.

    Raises UserError if the folder or its captions are missing, or a row is none: without a file
    that is there, with one of another row, without a caption, with what is no text.
    """
    root = Path(root)
    if not root.is_dir():
        refuse_container(root, [root])
        raise UserError(
            f"data folder {root} does not exist; give a folder with metadata.jsonl, metadata.csv "
            "or captions.txt, DATA_DIR=my_pictures"
        )
    rows, disk, seen = read_rows(root), OnDisk(root), dict[str, Row]()
    declared = any(all(name in row.record for name in PHRASES) for row in rows)
    captions = []
    for row in rows:
        _check_file(row, root, disk, seen)
        captions.append(_checked_caption(row))
        _check_texts(row, ("split", *LABELS) if declared else ("split",))
        if declared:
            _check_labels(row)
    data = ImageCaptionDataset(root, [row.record for row in rows], captions)
    data.splits = (root / ATTRIBUTES).is_file()
    return data


def _check_file(row: Row, root: Path, disk: OnDisk, seen: dict[str, Row]) -> None:
    """UserError for a row whose file is not there, or is that of a row `seen` before."""
    where, path, name = row.where, row.path, row.record.get("file_name")
    if not isinstance(name, str) or not name:
        there = f" (its columns: {', '.join(row.record)[:80]})" if row.record else ""
        raise UserError(f"{where}: no file_name{there}; write one into that row of {path.name}")
    _check_texts(row, ("file_name",))
    if not safe_join(root, name, f"{where}: the file", links=True).is_file():
        name = row.record["file_name"] = disk.name(name)
    if not (root / name).is_file():
        lost = f"does not exist in {root}"
        if (root / name).is_symlink():
            lost = f"is a link to {os.readlink(root / name)}, which is not there"
        raise UserError(
            f"{where}: the file {name} {lost}; put it there, or remove the row from {path.name}"
        )
    before = seen.setdefault(normalized(posixpath.normpath(name)), row)
    if before is not row:
        raise UserError(
            f"{where}: the file {name} is that of row {before.number}, too; a picture is one row: "
            f"remove one from {path.name}"
        )


def _checked_caption(row: Row) -> str:
    """Of a row. UserError for one that has none."""
    where, path, name = row.where, row.path, row.record["file_name"]
    given = {k: row.record[k] for k in ("text", "caption") if row.record.get(k) is not None}
    if not given:
        there = ", ".join(row.record)[:80]
        remedy = f"write it into the column text of {path.name}"
        raise UserError(f"{where}: no caption for {name} (its columns: {there}); {remedy}")
    blank = [k for k, v in given.items() if v == [] or (isinstance(v, str) and not v.strip())]
    column = next((k for k in given if k not in blank), None)
    if column is None:
        remedy = f"write one into the column text of {path.name}"
        raise UserError(f"{where}: empty caption for {name}; {remedy}")
    caption = given[column]
    if isinstance(caption, list):
        old, new = shlex.quote(str(path)), shlex.quote(f"{path}.old")
        raise UserError(
            f"{where}: {column} is a list of {len(caption)}, but a picture has one; to keep "
            f'the first of each: mv {old} {new} && python -c "{FIRST}" {new} {old}'
        )
    _check_texts(row, (column,))
    return caption


def _check_texts(row: Row, columns: Iterable[str]) -> None:
    """UserError for a value that is no text, or has a character that no text has."""
    where, path = row.where, row.path
    for key in columns:
        value = row.record.get(key)
        if not isinstance(value, str | None):
            shown = repr(value)[:40]
            raise UserError(
                f"{where}: {key} is {shown}, not text; mend it, or leave it out of {path.name}"
            )
        if bad := no_character(value or ""):
            raise UserError(
                f"{where}: {key} holds {bad!r}, which is no character of a text; mend it in "
                f"{path.name}"
            )


def _check_labels(row: Row) -> None:
    """UserError for a row without the labels that other rows have."""
    path = row.path
    if lost := [name for name in LABELS if not row.record.get(name)]:
        raise UserError(
            f"{row.where} has no {lost[0]}: {', '.join(PHRASES)} say that every row has labels; "
            f"write all of {', '.join(LABELS)}, or remove the phrases from {path.name}"
        )
