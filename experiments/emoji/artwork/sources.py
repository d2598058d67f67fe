"""Emoji art from npm packages: fetch a pinned tarball, read icons out of it, draw them.

Four kinds of package: `iconify` (icons.json with SVG bodies), `svg` (one file per code point),
`webp` (bitmaps), and `font` (glyph outlines). SVG is drawn by resvg: other renderers ignore the
filters that some sets use.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from concept_trak.datasets.picture import decoded
from concept_trak.errors import UserError, remove_hint
from concept_trak.validated_io import parse_json

RENDER_SIZE = 256  # width in pixels; drawings are scaled down from here
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{box}">{body}</svg>'
)
PINNED = "install it: pip install 'concept-trak[build-data]'"
NODE = "install Node.js from https://nodejs.org and run the same again"


def integrity_of(path: Path) -> str:
    """Subresource-integrity string of a file as npm writes it: "sha512-" + base64 of the digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def fetch(name: str, version: str, integrity: str, work: Path) -> Path:
    """Tarball of NAME@VERSION in `work`, downloaded with `npm pack` unless it is there already.

    Raises UserError if npm is missing or fails, or if the tarball is not the one with this sha512.
    """
    tarball = work / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        npm_pack(name, version, tarball)
    found = integrity_of(tarball)
    if found != integrity:
        raise UserError(
            f"{tarball} is not the pinned {name}@{version}: found {found}, expected {integrity}; "
            f"{remove_hint(tarball)}"
        )
    return tarball


def npm_pack(name: str, version: str, tarball: Path) -> None:
    """Download one package; the tarball gets its final name when it is complete."""
    if shutil.which("npm") is None:
        raise UserError(f"npm is needed to build the data and is not on the PATH; {NODE}")
    part = tarball.with_name(tarball.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    packed = list(part.glob("*.tgz"))
    if done.returncode or len(packed) != 1:
        reason = (done.stderr.strip().splitlines() or ["no tarball came back"])[-1]
        raise UserError(
            f"npm could not download {name}@{version} ({reason}); connect and run the same again"
        )
    os.replace(packed[0], tarball)
    shutil.rmtree(part)


def read_members(tarball: Path, names: set[str]) -> dict[str, bytes]:
    """Contents of the named files, in one pass: seeking in a gzip stream means reading it again."""
    with tarfile.open(tarball, "r:gz") as archive:
        wanted = (member for member in archive if member.name in names)
        found = {member.name: archive.extractfile(member).read() for member in wanted}
    for name in sorted(names - found.keys()):
        raise UserError(f"{tarball} holds no file {name}; mend its row of tables/objects.tsv")
    return found


def render_svg(svg: str, name: str) -> Image.Image:
    """SVG text -> RGBA drawing RENDER_SIZE wide. No system fonts: they differ between machines.

    name: what the error should call the icon. Raises UserError if resvg is missing or cannot draw
    it.
    """
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "resvg-py is needed to build the data; install it with: pip install "
            "'concept-trak[build-data]'"
        ) from None
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, skip_system_fonts=True)
    except ValueError as error:
        raise UserError(f"resvg cannot draw {name}: {error}; {PINNED}") from None
    return decoded(bytes(png), name, PINNED).convert("RGBA")


def iconify_svg(icons: dict[str, Any], name: str) -> str:
    """The SVG of one icon of an iconify icons.json (IconifyJSON: sizes default to the set's, then
    to 16).
    """
    parent = icons.get("aliases", {}).get(name, {}).get("parent")
    icon = icons["icons"].get(name) or icons["icons"].get(parent)
    if icon is None:
        raise UserError(
            f"icon {name!r} is not in the iconify set {icons.get('prefix')!r}; mend its row "
            "of tables/objects.tsv"
        )
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = " ".join(str(icon.get(k, icons.get(k, v))) for k, v in defaults.items())
    return SVG.format(box=box, body=icon["body"])


def glyph_svg(font: bytes, codepoint: int) -> str:
    """The outline of one glyph as SVG (y pointing down), in a box a little larger than itself."""
    try:
        from fontTools.pens.boundsPen import BoundsPen
        from fontTools.pens.svgPathPen import SVGPathPen
        from fontTools.ttLib import TTFont
    except ImportError:
        raise UserError(
            "fonttools is needed for the style notomono; install it with: pip install fonttools"
        ) from None
    opened = TTFont(io.BytesIO(font))
    glyphs = opened.getGlyphSet()
    glyph = glyphs[opened.getBestCmap()[codepoint]]
    path, bounds = SVGPathPen(glyphs), BoundsPen(glyphs)
    glyph.draw(path)
    glyph.draw(bounds)
    left, bottom, right, top = bounds.bounds
    margin = 20  # font units; keeps antialiased edges inside
    box = f"{left - margin} {-top - margin} {right - left + 2 * margin} {top - bottom + 2 * margin}"
    return SVG.format(box=box, body=f'<path transform="scale(1,-1)" d="{path.getCommands()}"/>')


def icon_pictures(
    tarball: Path, kind: str, folder: str | None, style: str, items: list[dict[str, str]]
) -> list[Image.Image]:
    """RGBA drawings of `items` (rows of objects.tsv) in one style.

    kind: "iconify", "svg", "webp" or "font"; folder: where in the package the files are (not for
    iconify). Raises UserError naming the file or icon that is missing.
    """
    if kind == "iconify":
        content = read_members(tarball, {"package/icons.json"})["package/icons.json"]
        icons = parse_json(content, f"icons.json of {tarball}", remove_hint(tarball), dict)
        names = [item[style] for item in items]
        return [render_svg(iconify_svg(icons, name), f"{style}/{name}") for name in names]
    # Sets without a column of their own name their files by the code point in capitals.
    names = [
        f"package/{folder}/{item.get(style) or item['unicode'].upper() + '.svg'}" for item in items
    ]
    files = read_members(tarball, set(names))
    if kind == "svg":
        return [render_svg(files[name].decode("utf-8"), name) for name in names]
    if kind == "webp":
        return [decoded(files[name], name, remove_hint(tarball)).convert("RGBA") for name in names]
    if kind == "font":
        points = [item["unicode"] for item in items]
        fonts = [(files[name], point) for name, point in zip(names, points, strict=True)]
        return [render_svg(glyph_svg(font, int(p, 16)), f"{style}/{p}") for font, p in fonts]
    told = f"sources.json: style {style!r} has the unknown kind {kind!r}"
    raise UserError(f"{told}; write svg, webp or font into sources.json")
