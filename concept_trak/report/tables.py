"""Tables as files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import UserError
from ..validated_io import read_text

FORMULA = re.compile("'*[=+\\-@\\t\\r\\n\uff1d\uff0b\uff0d\uff20]")  # how a spreadsheet's begins


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV in UTF-8; what of a file's name is no text is escaped, and see `cell`."""
    lines: list[str] = []
    # a lone \r is quoted only where the line ends in one, too
    writer = csv.writer(SimpleNamespace(write=lambda line: lines.append(line[:-2])))
    writer.writerow(header)
    writer.writerows([cell(value) for value in row] for row in rows)
    return "\n".join([*lines, ""]).encode(errors="backslashreplace")


def cell(value: Any) -> Any:
    """A value that no spreadsheet runs: a text that begins as a formula does gets an apostrophe
    before it, which `read_csv` takes away again. Numbers stay.
    """
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def read_csv(path: Path, mend: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file of `csv_bytes`. UserError for one that is none, lacks one of the
    `columns`, or has a row that is longer or shorter than its header.
    """
    text = read_text(path, mend)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        header, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error}); {mend}") from None
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{path} has no column {missing[0]!r}; {mend}")
    if bad := next((i for i, row in enumerate(rows) if len(row) != len(header)), None):
        raise UserError(f"{path}, row {bad + 1}: {len(rows[bad])} values of {len(header)}; {mend}")
    texts = ([v[1:] if FORMULA.match(v) and v[0] == "'" else v for v in row] for row in rows)
    return [dict(zip(header, row, strict=True)) for row in texts]
