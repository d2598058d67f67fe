"""Build the exemplars of the small AbC benchmark: art that the embedded model never saw.

Which icon is drawn is frozen in `data/emoji/tables/`:
    exemplars.tsv             one row a picture: its token, split, kind, object, style and icon
    exemplar_sources.json     packages (version, sha512) and styles (licence, credit)

A token of kind "object" has one object in several styles, one of kind "style" several objects in
one style. Framing is that of `build`; the pictures are written as one `.npz`, row i being row i of
the table.

    python -m experiments.emoji.artwork.exemplars --out data/emoji --work build/emoji
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.atomic_io import write_bytes
from concept_trak.errors import UserError, git_restore_hint
from concept_trak.validated_io import read_json

from .build import TABLES, check_pictures, crop_and_center, read_table
from .sources import fetch, icon_pictures

PICTURES, CREDITS = "exemplars.npz", "EXEMPLARS.md"


def build(out: Path, work: Path, size: int = 64, tables: Path = TABLES) -> Path:
    """Fetch, draw, check, write; returns the path of the pictures, uint8 [n, size, size, 3].

    UserError for a failed or altered download, or a picture that cannot be drawn.
    """
    rows = read_table(tables / "exemplars.tsv")
    sources = read_json(
        tables / "exemplar_sources.json", git_restore_hint(tables / "exemplar_sources.json")
    )
    pictures: list[Any] = [None] * len(rows)
    for style in dict.fromkeys(row["style"] for row in rows):
        info = sources["styles"][style]
        package = sources["packages"][info["package"]]
        tarball = fetch(info["package"], package["version"], package["integrity"], work)
        wanted = [i for i, row in enumerate(rows) if row["style"] == style]
        items = [rows[i] | {style: rows[i]["icon"]} for i in wanted]
        drawings = icon_pictures(tarball, info["kind"], info.get("folder"), style, items)
        for i, drawing in zip(wanted, drawings, strict=True):
            pictures[i] = crop_and_center(drawing, size)
        print(f"{style}: {len(wanted)} pictures", file=sys.stderr)
    check_pictures([{"file_name": f"{r['token']}/{r['object']}", **r} for r in rows], pictures)
    content = io.BytesIO()
    np.savez_compressed(content, pictures=np.stack([np.asarray(p) for p in pictures]))
    write_bytes(out / PICTURES, content.getvalue())
    write_bytes(out / CREDITS, credits_page(sources).encode())
    return out / PICTURES


def credits_page(sources: dict[str, Any]) -> str:
    """The credits of the exemplars, one line a style."""
    lines = [
        "# Credits of the exemplars",
        "",
        f"The pictures of `{PICTURES}` are resized copies, converted to RGB on white, of icons",
        "from these sets; each keeps its own licence. The texts are in `LICENSES/`. Which row is",
        "of which style: `tables/exemplars.tsv`.",
        "",
        "| style | npm package | licence | credit |",
        "| --- | --- | --- | --- |",
    ]
    for style, info in sources["styles"].items():
        package = f"{info['package']} {sources['packages'][info['package']]['version']}"
        lines.append(f"| {style} | {package} | {info['license']} | {info['credit']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 2 with one line on standard error for a UserError."""
    parser = argparse.ArgumentParser(description="Build the exemplars of the small AbC benchmark.")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to write into")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloaded packages")
    args = parser.parse_args(argv)
    try:
        print(build(args.out, args.work))
    except UserError as error:
        print(f"build_exemplars: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
