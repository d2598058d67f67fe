"""EXPORT: an edited pipeline as a folder of its own, which appears when it is whole.

`export.json` in it says what is in it. A folder is replaced only while it holds that and nothing
else, so that no model, picture or result of the user's is ever lost to an export.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_folder, sha256_file, write_json
from ..errors import UserError
from ..validated_io import read_json

RECORD = "export.json"
MEND = "set EXPORT to a new folder"


def export(pipe: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write a diffusers pipeline, with `facts` (JSON) in its record. UserError as `refuse_taken`,
    and for a disk that does not take it.
    """
    folder = folder.resolve()
    with atomic_folder(folder) as made:
        pipe.save_pretrained(made)
        write_json(made / RECORD, facts | {"sha256": _digests(made)})
        refuse_taken(folder)  # whatever was put there meanwhile


def refuse_place(folder: Path, model: str, used: Iterable[str | Path]) -> None:
    """UserError for a folder that `refuse_taken` refuses, that lies in the model's, or that is, or
    holds, what this run reads or writes.
    """
    target, own = folder.resolve(), Path(model).resolve()
    for place in (own, *(Path(path).resolve() for path in used)):
        if target == place or target in place.parents or _same(target, place):
            raise UserError(f"EXPORT={folder} is, or holds, {place}, which this run uses; {MEND}")
    if own in target.parents:
        raise UserError(f"EXPORT={folder} lies in the folder of the model, {own}; {MEND}")
    refuse_taken(target)


def refuse_taken(folder: Path) -> None:
    """UserError where there is anything but an export that nobody changed since."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    known = read_json(folder / RECORD, MEND) if (folder / RECORD).is_file() else {}
    if not known or known.get("sha256") != _digests(folder):
        raise UserError(f"EXPORT={folder} holds what no export put there; {MEND}")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _digests(folder: Path) -> dict[str, str]:
    """{path: sha256} of all but the record; of what is no file, "" (its digest is never that)."""
    found = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) if _plain(p) else ""
        for p in found
        if p != folder / RECORD
    }


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
