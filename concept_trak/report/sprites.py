"""Thumbnails of all pictures of a dataset, PER to a sheet: a browser decodes 40 sheets for 10,000
pictures, and each only when one of its pictures is in sight.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..atomic_io import make_folder, write_bytes
from ..datasets.image_folder import ImageCaptionDataset
from ..errors import UserError
from ..settings import short_hash
from .pictures import LOSSLESS_SIDE

ACROSS = 16  # pictures in a row of a sheet, and rows
PER = ACROSS**2
SIDE, SMALL_SIDE, MANY = 96, 64, 3000  # px of a thumbnail; of one among so many


class SpriteSheets:
    """root/names as sheets, kept under `cache` as long as no file changes.

    side: px of a thumbnail. A picture that is not there, or not readable, is left white.
    """

    across = ACROSS

    def __init__(self, root: Path, names: Sequence[str], cache: Path) -> None:
        records = [{"file_name": name} for name in names]
        self.data = ImageCaptionDataset(root, records, [""] * len(names))
        self.cache = cache

    @cached_property
    def side(self) -> int:
        """That of the pictures themselves where they are small."""
        most = SIDE if len(self.data) <= MANY else SMALL_SIDE
        try:
            return min(most, *self.data.image(0).size)
        except UserError:
            return most

    def encoded(self) -> list[str]:
        """Each sheet as base64 of a WebP."""
        starts = range(0, len(self.data), PER)
        return [
            base64.b64encode(self._sheet(range(start, min(start + PER, len(self.data))))).decode()
            for start in tqdm(starts, desc="thumbnails", unit="sheet")
        ]

    def _sheet(self, rows: range) -> bytes:
        stamps = [[str(self.data.path(i)), *_stamp(self.data.path(i))] for i in rows]
        name = short_hash([self.side, stamps])
        for kept in self.cache.glob(f"{name}-*.webp"):
            if kept.is_file() and kept.stem == f"{name}-{_checksum(known := kept.read_bytes())}":
                return known
        sheet = Image.new("RGB", (ACROSS * self.side, -(-len(rows) // ACROSS) * self.side), "white")
        for place, picture in self._pictures(rows):
            sheet.paste(picture, (place % ACROSS * self.side, place // ACROSS * self.side))
        out = io.BytesIO()
        small = self.side < LOSSLESS_SIDE and len(self.data) <= MANY
        sheet.save(out, "WEBP", lossless=small, quality=20 if small else 78, method=2)
        with contextlib.suppress(UserError):  # it is made again the next time
            make_folder(self.cache)
            write_bytes(self.cache / f"{name}-{_checksum(out.getvalue())}.webp", out.getvalue())
        return out.getvalue()

    def _pictures(self, rows: range) -> Iterator[tuple[int, Image.Image]]:
        for place, i in enumerate(rows):
            try:
                yield place, self.data.image(i, self.side)
            except UserError:
                continue


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]
