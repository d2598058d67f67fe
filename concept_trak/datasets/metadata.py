"""Which pictures a folder has and what is said of each: the layouts of `datasets.image_folder`.

What a layout cannot say without doubt is refused with its file and line, never guessed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..parsing import normalized
from ..validated_io import file_errors, parse_json, read_text
from .picture import IMAGE_SUFFIXES

Record = dict[str, Any]  # a metadata row
MEND = (
    "write in it the file_name and text of each picture (metadata.jsonl, metadata.csv), or one "
    "caption a line (captions.txt)"
)
COLUMNS = ("file_name", "text", "caption", "split")  # known in any case, blanks around them
NOT_DATA = ("__MACOSX", "@eaDir")  # what archives of a Mac and network disks add, beside dot files
SIDECARS = (".txt", ".caption")  # of one picture, as trainers of LoRAs keep captions
NEW = "my_pictures"
# What other programs keep pictures in, and the lines that make a folder of it: {0} is the file, {1}
# its folder.
UNPACK = f"unpack all of them into one folder and give that: mkdir {NEW} &&"
PARQUET = (
    "import pathlib as p, sys, pyarrow.parquet as q; o = p.Path('my_pictures'); o.mkdir(); "
    "[((o / f'{{i:08}}.png').write_bytes(r['image']['bytes']), (o / f'{{i:08}}.txt').write_text("
    "' '.join(r['text'].split()))) for i, r in enumerate(r for f in sorted(p.Path(sys.argv[1])."
    "glob('*.parquet')) for r in q.read_table(f).to_pylist())]"
)
OTHERS = {
    ".tar": f"{UNPACK} tar -xf {{0}} -C {NEW}",
    ".tar.gz": f"{UNPACK} tar -xf {{0}} -C {NEW}",
    ".tgz": f"{UNPACK} tar -xf {{0}} -C {NEW}",
    ".zip": f"{UNPACK} unzip {{0}} -d {NEW}",
    "metadata.parquet": "make metadata.jsonl of it: pip install pandas pyarrow && python -c "
    "\"import sys, pandas; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records'"
    ', lines=True)" {0} {1}/metadata.jsonl',
    ".parquet": f"make {NEW} of its columns image and text, and give that: pip install pyarrow "
    f'&& python -c "{PARQUET}" {{1}}',
    ".arrow": "make Parquet files of it: pip install datasets && python -c "
    '"import sys, datasets; datasets.load_from_disk(sys.argv[1]).to_parquet(sys.argv[2])" {1} '
    f"{NEW}.parquet",
}


@dataclass(frozen=True)
class Row:
    """What a file says of a picture. number: of the row in it, from 1; 0: the file is one row's."""

    path: Path
    number: int
    record: Record

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path}, row {self.number}" if self.number else str(self.path)


def read_rows(root: Path) -> list[Row]:
    """Of the first layout that the folder has. UserError for none, and for one that is damaged."""
    for name, reader in READERS.items():
        if (root / name).is_file():
            records = reader(root / name)
            if not records:
                raise UserError(f"{root / name} has no rows; {MEND}")
            return [Row(root / name, i, record) for i, record in enumerate(records, 1)]
    return _read_sidecars(root) or _refuse_layout(root)


def is_data(path: Path) -> bool:
    """Whether a file may be one of the user's: no copy or note that a system left there."""
    return not any(part.startswith(".") or part in NOT_DATA for part in path.parts)


def picture_names(root: Path) -> list[str]:
    """Paths below root of all pictures, in lexical order, also of those in linked folders."""
    base, seen, names = os.path.realpath(root), set(), []
    with file_errors(root, "make it readable, or give another folder: set DATA_DIR"):
        for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
            here = Path(folder).relative_to(root)
            folders[:] = [f for f in folders if is_data(Path(f))]
            for name in [f for f in folders if os.path.islink(os.path.join(folder, f))]:
                real = os.path.realpath(os.path.join(folder, name))
                if f"{real}/".startswith(f"{base}/") or real in seen:  # it is met by itself
                    folders.remove(name)
                seen.add(real)
            names += [
                (here / f).as_posix()
                for f in files
                if Path(f).suffix.lower() in IMAGE_SUFFIXES and is_data(Path(f))
            ]
    return sorted(names, key=normalized)


def _raise(error: OSError) -> None:
    raise error


class OnDisk:
    """Names as a folder has them: an accent is one letter there, or a letter and a mark."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Path, dict[str, list[str]]] = {}

    def name(self, name: str) -> str:
        """Of the same file, if there is one."""
        if os.path.lexists(self.root / name):
            return name
        place = self.root
        for part in Path(name).parts:
            if place not in self.folders:
                self.folders[place] = {}
                with contextlib.suppress(OSError):
                    for entry in os.listdir(place):
                        self.folders[place].setdefault(normalized(entry), []).append(entry)
            same = self.folders[place].get(normalized(part), [])
            place = place / (same[0] if len(same) == 1 else part)
        return place.relative_to(self.root).as_posix()


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(read_text(path, MEND).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            found = parse_json(line, where, MEND, dict, gaps=True)
            names = _column_names(list(found), where, path)
            records.append(dict(zip(names, found.values(), strict=True)))
    return records


def _column_names(given: list[str], where: str, path: Path) -> list[str]:
    """Those of `COLUMNS` as they are spelt there. UserError for a name that is there twice."""
    found = []
    for name in map(str.strip, given):
        plain = name.casefold()
        found.append(plain if plain in COLUMNS and plain not in given else name)
    twice = [name for name in found if name and found.count(name) > 1]
    if twice:
        raise UserError(f"{where}: the column {twice[0]} is there twice; mend it in {path.name}")
    return found


def _read_csv(path: Path) -> list[Record]:
    """UserError for a line that is no row: other fields than the columns, quotes left open."""
    text = read_text(path, MEND)
    lines = _csv_lines(text, path)
    number, head = next(lines, (1, []))
    columns = _column_names(head, f"{path}, line {number}", path)
    records = []
    for number, fields in lines:
        where = f"{path}, line {number}"
        if len(fields) != len(columns):
            raise UserError(
                f"{where} has {len(fields)} fields and not {len(columns)}, as the first line; put "
                f'quotes round a text with commas: mend "a cat, asleep" in {path.name}'
            )
        # the first may be the number of the row, as pandas writes it
        if any(value and not name for name, value in list(zip(columns, fields, strict=True))[1:]):
            raise UserError(
                f"{where} has a value in a column without a name; put quotes round a text with "
                f"commas, or name the column in {path.name}"
            )
        if any(_holds_rows(value) for value in fields):
            raise UserError(
                f"{where}: a quote is left open there, or closed some rows later; mend it in "
                f"{path.name}"
            )
        records.append({k: v for k, v in zip(columns, fields, strict=True) if k and v != ""})
    return records


def _holds_rows(value: str) -> bool:
    """Whether lines of a field begin with a picture's name: rows that an open quote swallowed."""
    return any(
        Path(part.strip(' "')).suffix.lower() in IMAGE_SUFFIXES
        for line in value.splitlines()[1:]
        for part in line.replace(";", ",").replace("\t", ",").split(",")[:1]
    )


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each row. The first line tells how they are parted."""
    head = text.splitlines()[0] if text.strip() else ""
    parted = next((d for d in ",;\t" if _names_file(head.split(d))), ",")
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=parted,
        skipinitialspace=f"{parted} " in head,
        strict=True,
    )
    while True:
        number = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            told = f"line {number} is not CSV, or a quote is left open there ({error})"
            raise UserError(f"{path}, {told}; mend it in {path.name}") from None
        if fields:
            yield number, fields


def _names_file(heads: list[str]) -> bool:
    return len(heads) > 1 and "file_name" in [h.strip(' "').casefold() for h in heads]


def _read_captions(path: Path) -> list[Record]:
    text = io.StringIO(read_text(path, MEND), newline=None).read()
    captions, names = text.rstrip("\n").split("\n"), picture_names(path.parent)
    if len(captions) != len(names):
        counts = f"has {len(captions)} captions but the folder has {len(names)} images"
        remedy = "write one caption a line, in lexical order of the paths, into captions.txt"
        raise UserError(f"{path} {counts}; {remedy}")
    pairs = zip(names, captions, strict=True)
    return [{"file_name": name, "text": caption} for name, caption in pairs]


def _read_sidecars(root: Path) -> list[Row]:
    """A caption from the text beside each picture; [] where there are none.

    UserError for a picture without one among others that have one, and for several lines.
    """
    disk, found, rows = OnDisk(root), {}, []
    names = picture_names(root)
    for name in names:
        stem, _ = posixpath.splitext(name)
        there = (root / disk.name(stem + ending) for ending in SIDECARS)
        found[name] = next((path for path in there if path.is_file()), None)
    if not any(found.values()):
        return []
    for name, path in found.items():
        if path is None:
            raise UserError(
                f"{root / name} has no caption beside it, as other pictures there have; write it "
                "there, as a.txt is that of a.png"
            )
        lines = [s for s in map(str.strip, read_text(path, MEND).splitlines()) if s]
        if len(lines) > 1:
            raise UserError(f"{path} has {len(lines)} lines; leave one caption in {path.name}")
        rows.append(Row(path, 0, {"file_name": name, "text": "".join(lines)}))
    return rows


def _refuse_layout(root: Path) -> list[Row]:
    """UserError for a folder without captions, which names what is there instead."""
    inner = sorted(
        path
        for folder in root.iterdir()
        if is_data(Path(folder.name)) and folder.is_dir()
        for path in map(folder.joinpath, READERS)
        if path.is_file()
    )
    if inner:
        mend = f"give the folder {shlex.quote(str(inner[0].parent))}, or write one for all into"
        raise UserError(f"{root} has no captions itself, but {inner[0]} is there; {mend} {root}")
    refuse_container(root, sorted(p for p in root.rglob("*") if is_data(p.relative_to(root))))
    files = "metadata.jsonl, metadata.csv (file_name, text) or captions.txt"
    raise UserError(f"{root} has no captions; put into it {files}")


def refuse_container(root: Path, paths: list[Path]) -> None:
    """UserError for a file that holds pictures and is no folder of them: how to make one of it."""
    for path in paths:
        kind = next((k for k in OTHERS if path.name.endswith(k)), None)
        if kind is not None and path.is_file():
            raise UserError(f"{path} is not read as it is; {line(kind, path)}")


def line(kind: str, path: Path) -> str:
    """What makes a folder of the file; see `OTHERS`."""
    return OTHERS[kind].format(*(shlex.quote(str(p)) for p in (path, path.parent)))


READERS = {  # the first of these files that is there counts
    "metadata.jsonl": _read_jsonl,
    "metadata.csv": _read_csv,
    "captions.txt": _read_captions,
}
