"""Build the embedded benchmark: 64 x 64 pictures of emoji art, objects x styles, from pinned npm
packages.

Which picture is drawn is frozen in `data/emoji/tables/`:
    sources.json   packages (version, sha512), styles (caption words, licence, credit), style sets
    objects.tsv    one row per object: code point, caption phrase, group, smallest subset, and the
                   icon's name in each style
    held_out.tsv   one column per preset: the style in which the object is kept out of training
                   ("-": in none)

Framing: draw 256 px wide, crop to alpha > 16, put on white, scale the longest side to 92 % of the
canvas (Lanczos), centre. So neither padding nor scale is a cue for the style.

    python -m experiments.emoji.artwork.build --preset s8-n128 --out data/emoji --work build/emoji
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concept_trak.atomic_io import write_bytes
from concept_trak.datasets.labels import caption
from concept_trak.errors import UserError, git_restore_hint
from concept_trak.validated_io import read_json

from .sources import PINNED, fetch, icon_pictures

TABLES = Path(__file__).resolve().parents[3] / "data" / "emoji" / "tables"
DEFAULT_PRESET = "s8-n128"
FILL = 0.92  # longest side of the drawing as a fraction of the canvas
ALPHA_THRESHOLD = 16  # what is fainter (of 255) does not count as drawing
MIN_INK = 0.02  # smallest share of non-white pixels of a sound picture
DIGEST_FILE = "tree.sha256"

Row = dict[str, Any]


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header line."""
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))


def preset_rows(preset: str, tables: Path = TABLES) -> tuple[list[Row], list[Row], Row]:
    """The cells of a preset, object-major.

    Returns (rows, icons, sources): rows are the metadata rows; icons[i] is the row of objects.tsv
    for rows[i]; sources is sources.json. Raises UserError if the preset is unknown.
    """
    sources = read_json(tables / "sources.json", git_restore_hint(tables / "sources.json"))
    held_out = {row["object"]: row for row in read_table(tables / "held_out.tsv")}
    known = [name for name in next(iter(held_out.values())) if name != "object"]
    if preset not in known:
        raise UserError(f"unknown preset {preset!r}; set PRESET to one of {', '.join(known)}")
    style_set, size = preset.split("-n")
    styles = sources["style_sets"][style_set]
    rows, icons = [], []
    for item in read_table(tables / "objects.tsv"):
        if int(item["subset"]) <= int(size):
            held = held_out[item["object"]][preset]
            rows += [metadata_row(item, style, held, styles, sources) for style in styles]
            icons += [item] * len(styles)
    return rows, icons, sources


def metadata_row(
    item: Row, style: str, held_out_style: str, styles: list[str], sources: Row
) -> Row:
    """One row of metadata.jsonl.

    `twin_in_train` names, for a held-out cell, the training styles of the same drawing family:
    there the object has the same outline, so a near copy of the held-out picture is in the training
    set.
    """
    info, held = sources["styles"][style], style == held_out_style
    family = [s for s in styles if sources["styles"][s]["family"] == info["family"]]
    return {
        "file_name": f"images/{style}/{item['unicode']}.png",
        "text": caption(item["object_phrase"], info["phrase"]),
        "object": item["object"],
        "object_phrase": item["object_phrase"],
        "style": style,
        "style_phrase": info["phrase"],
        "group": item["group"],
        "split": "held_out" if held else "train",
        "twin_in_train": [s for s in family if s != style] if held else [],
        "unicode": item["unicode"],
        "family": info["family"],
        "source": f"{info['package']} {sources['packages'][info['package']]['version']}",
        "license": info["license"],
    }


def crop_and_center(drawing: Image.Image, size: int) -> Image.Image:
    """RGBA drawing -> RGB picture [size, size]: cropped, on white, longest side FILL * size,
    centred.

    An empty drawing gives a white picture (which `check_pictures` refuses by name).
    """
    picture = Image.new("RGB", (size, size), (255, 255, 255))
    ys, xs = np.nonzero(np.asarray(drawing)[..., 3] > ALPHA_THRESHOLD)
    if not len(ys):
        return picture
    cropped = drawing.crop((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
    # White first, then scale: colours hidden under transparent pixels must not bleed into the
    # edges.
    paper = Image.new("RGBA", cropped.size, (255, 255, 255, 255))
    paper.alpha_composite(cropped)
    scale = FILL * size / max(cropped.size)
    width, height = (max(1, round(side * scale)) for side in cropped.size)
    scaled = paper.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    picture.paste(scaled, ((size - width) // 2, (size - height) // 2))
    return picture


def check_pictures(rows: list[Row], pictures: list[Image.Image]) -> None:
    """Refuse pictures that are nearly empty, and two objects with the same picture in one style."""
    seen: dict[tuple[str, bytes], str] = {}
    for row, picture in zip(rows, pictures, strict=True):
        pixels = np.asarray(picture)
        if (pixels.min(axis=2) < 250).mean() < MIN_INK:
            raise UserError(
                f"{row['file_name']} is nearly empty, so the source package or the renderer is not "
                f"the pinned one; {PINNED}"
            )
        key = (row["style"], pixels.tobytes())
        if key in seen:
            raise UserError(
                f"{row['file_name']} shows the same picture as {seen[key]}; mend its row of "
                "tables/objects.tsv"
            )
        seen[key] = row["file_name"]


def attribution(sources: Row, styles: list[str]) -> str:
    """The credits page, one line per style."""
    lines = [
        "# Image credits",
        "",
        "All pictures are resized copies, converted to RGB on white, of icons from these sets. "
        "Each file keeps its own",
        "licence (`license` in `metadata.jsonl`); the texts are in `LICENSES/`.",
        "",
        "| style | npm package | licence | credit |",
        "| --- | --- | --- | --- |",
    ]
    for style in styles:
        info = sources["styles"][style]
        package = f"{info['package']} {sources['packages'][info['package']]['version']}"
        lines.append(f"| {style} | {package} | {info['license']} | {info['credit']} |")
    return "\n".join(lines) + "\n"


def tree_digest(root: Path) -> str:
    """sha256 hex over names and contents of what is built: metadata, credits, pictures."""
    digest = hashlib.sha256()
    pictures = [p.relative_to(root).as_posix() for p in (root / "images").rglob("*.png")]
    for name in sorted(["metadata.jsonl", "ATTRIBUTION.md", *pictures]):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def write_dataset(out: Path, rows: list[Row], pictures: list[Image.Image], sources: Row) -> str:
    """Write pictures, metadata, credits, licence texts and, last, the digest, which is returned."""
    out.mkdir(parents=True, exist_ok=True)
    (out / DIGEST_FILE).unlink(missing_ok=True)
    part = out / "images.part"
    shutil.rmtree(part, ignore_errors=True)
    for row, picture in zip(rows, pictures, strict=True):
        target = part / Path(row["file_name"]).relative_to("images")
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, optimize=True)
    shutil.rmtree(out / "images", ignore_errors=True)
    os.replace(part, out / "images")
    metadata = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(out / "metadata.jsonl", metadata.encode())
    credits = attribution(sources, list(dict.fromkeys(row["style"] for row in rows)))
    write_bytes(out / "ATTRIBUTION.md", credits.encode())
    licences = TABLES.parent / "LICENSES"
    if licences.resolve() != (out / "LICENSES").resolve():
        shutil.copytree(licences, out / "LICENSES", dirs_exist_ok=True)
    digest = tree_digest(out)
    write_bytes(out / DIGEST_FILE, f"{digest}\n".encode())
    return digest


def build(preset: str, out: Path, work: Path, size: int = 64) -> str:
    """Fetch, draw, check, write; returns the digest of the tree.

    preset: a column of held_out.tsv. out: dataset folder. work: download cache. size: side of the
    pictures in pixels. Raises UserError for an unknown preset, a failed or altered download, or a
    picture that cannot be drawn.
    """
    rows, icons, sources = preset_rows(preset)
    pictures: list[Image.Image | None] = [None] * len(rows)
    for style in dict.fromkeys(row["style"] for row in rows):
        info = sources["styles"][style]
        package = sources["packages"][info["package"]]
        tarball = fetch(info["package"], package["version"], package["integrity"], work)
        wanted = [i for i, row in enumerate(rows) if row["style"] == style]
        items = [icons[i] for i in wanted]
        drawings = icon_pictures(tarball, info["kind"], info.get("folder"), style, items)
        for i, drawing in zip(wanted, drawings, strict=True):
            pictures[i] = crop_and_center(drawing, size)
        print(f"{style}: {len(wanted)} pictures", file=sys.stderr)
    check_pictures(rows, pictures)
    return write_dataset(out, rows, pictures, sources)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 2 with one line on standard error for a UserError."""
    says = "Build the emoji dataset; prints the sha256 of the finished tree."
    parser = argparse.ArgumentParser(description=says)
    flag = parser.add_argument
    flag("--preset", default=DEFAULT_PRESET)
    flag("--out", type=Path, required=True, help="dataset folder to write")
    flag("--work", type=Path, required=True, help="folder for the downloaded packages")
    flag("--size", type=int, default=64, help="side of the pictures in pixels")
    args = parser.parse_args(argv)
    try:
        print(build(args.preset, args.out, args.work, args.size))
    except UserError as error:
        print(f"build_emoji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
