"""An answer that was kept, read back from its folder: what is damaged in it, or of an earlier
version, is one line that names it. Needs no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_io import sha256_file
from ..datasets.picture import read_picture
from ..errors import UserError, remove_hint
from ..validated_io import checked_file, misfit, read_json, read_npy, safe_join
from .formatting import damping_name
from .scores import CSV, NPY, npy_of
from .tables import read_csv

PAGE, QUESTION = "report.html", "question.json"
QUERY = "query.png"
OURS = "concept_trak"
KEPT = (".csv", ".json", ".npy", ".png")  # files of which question.json has the checksums
LIKE = {
    **{"prompt": str, "targets": [str], "negatives": [str], "folders": [str], "methods": [str]},
    **{"dampings": [float], "search": str, "warnings": [str], "files": dict},
    "pictures": {"root": str, "digest": str},
    "settings": {"damping": float, "seed": int},
}
EARLIER: dict[str, Any] = {"search": "scan", "warnings": [], "files": {}}  # what it did not write
COLUMNS = ("index", "file_name", "caption")


def checksums(folder: Path) -> dict[str, str]:
    """{path below an answer's folder: sha256} of what is read back of its concepts."""
    found = (path for path in sorted(folder.glob("*/*")) if path.suffix in KEPT)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}


def read_asked(folder: Path) -> dict[str, Any]:
    """question.json of an answer. UserError for one that cannot be used."""
    path, mend = folder / QUESTION, remove_hint(folder, "ask it again")
    asked = EARLIER | read_json(path, mend)
    if place := misfit(asked, LIKE):
        raise UserError(f"{path}: {place} is missing or of another kind; {mend}")
    lengths = {len(asked[name]) for name in ("targets", "negatives", "folders")}
    names = [damping_name(d) for d in asked["dampings"]]
    root = asked["pictures"]["root"]
    if "\0" in root or root != root.encode(errors="replace").decode():
        raise UserError(f"{path}: the root of its pictures is no path; {mend}")
    if len(lengths) > 1 or not min(lengths):
        raise UserError(f"{path} has not one c- and one folder for each target; {mend}")
    if damping_name(asked["settings"]["damping"]) not in names:
        raise UserError(f"{path}: its damping is none of its dampings; {mend}")
    return asked


@dataclass(frozen=True)
class Kept:
    """An answer on disk. asked: its question.json. UserError, from every method, for a file that is
    missing, damaged, or not the one that was written.
    """

    folder: Path
    asked: dict[str, Any]

    @property
    def concepts(self) -> list[tuple[str, str, str]]:
        """(target, c-, folder's name) of each concept."""
        a = self.asked
        return list(zip(a["targets"], a["negatives"], a["folders"], strict=True))

    def mend(self) -> str:
        """How an error ends."""
        return remove_hint(self.folder, "ask it again")

    def path(self, concept: str, name: str) -> Path:
        """Of a file of a concept, after a look at its checksum."""
        path = safe_join(self.folder, f"{concept}/{name}", "the file")
        known = self.asked["files"].get(f"{concept}/{name}")
        checked_file(path, self.mend())
        if known is not None and sha256_file(path) != known:
            raise UserError(f"{path} is not the one that was written; {self.mend()}")
        return path

    def rows(self, concept: str) -> list[dict[str, str]]:
        """Of scores.csv, in the order of the store."""
        path = self.path(concept, CSV)
        rows = read_csv(path, self.mend(), COLUMNS)
        if sorted(row["index"] for row in rows) != sorted(map(str, range(len(rows)))):
            raise UserError(f"{path} does not have each picture once; {self.mend()}")
        if not all(_is_number(row.get("fit", "0")) for row in rows):
            raise UserError(f"{path} holds a fit that is no number; {self.mend()}")
        outside = [r["file_name"] for r in rows if _leads_out(r["file_name"])]
        if outside:
            raise UserError(f"{path} names {outside[0]!r}, outside its pictures; {self.mend()}")
        return sorted(rows, key=lambda row: int(row["index"]))

    def scores(self, concept: str, method: str, count: int) -> np.ndarray:
        """float32 [dampings or 1, count] of a method."""
        path = self.path(concept, NPY if method == OURS else npy_of(method))
        values = read_npy(path, self.mend(), 2)
        if values.shape not in ((1, count), (len(self.asked["dampings"]), count)):
            raise UserError(
                f"{path} is {list(values.shape)}, not the scores of {count} pictures; {self.mend()}"
            )
        if not np.isfinite(values).all():
            raise UserError(f"{path} holds a score that is NaN or infinite; {self.mend()}")
        return values.astype("<f4")

    def query(self) -> Image.Image:
        """The picture that was asked about, RGB."""
        return read_picture(self.path(self.concepts[0][2], QUERY), self.mend())


def answers_in(folders: Iterable[Path]) -> tuple[list[Kept], list[str]]:
    """(the answers of these folders, the newest first, what is wrong with those that cannot be
    read). Answers by an index are among them, though they do not know all scores.
    """
    pages = [page for folder in folders for page in folder.glob(f"*/{PAGE}")]
    pages = [page for page in pages if not page.parent.is_symlink()]
    found, wrong = [], []
    for page in sorted(pages, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            found.append(Kept(page.parent, read_asked(page.parent)))
        except UserError as error:
            wrong.append(str(error))
    return found, wrong


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _leads_out(name: str) -> bool:
    return os.path.normpath(name).split("/")[0] in ("", "..")
