"""Training pictures for the page (each embedded once, as an SVG symbol) and for the JPG grids."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EMBED_SIDE = 128  # px; larger training pictures are shrunk to this in the page
QUERY_SIDE = 512  # px; larger query pictures are shrunk to this in the page
PIXELATED_SIDE = (
    128  # px; up to this side a picture is enlarged in whole pixels instead of smoothed
)
LOSSLESS_SIDE = (
    96  # px; up to this side lossless WebP costs about what lossy does, and flat art stays clean
)
TILE, MARGIN, LINE, TEXT_LINES, COLUMNS = 192, 12, 16, 4, 5  # px and counts of the JPG grid


def load_pictures(dataset, indices: list[int]) -> dict[int, Image.Image]:
    """{training index: picture}, at the data's own size but at most EMBED_SIDE wide; each index
    read once.
    """
    unique = sorted(set(indices))
    if not unique:
        return {}
    side = dataset.images(unique[:1]).shape[2]
    arrays = dataset.images(unique, size=min(side, EMBED_SIDE))
    return {
        index: Image.fromarray(np.asarray(array, dtype=np.uint8))
        for index, array in zip(unique, arrays)
    }


def data_uri(picture: Image.Image) -> str:
    """The picture as a WebP data URI, lossless while small; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    small = max(picture.size) <= LOSSLESS_SIDE
    # When lossless, quality is only the encoder's effort: 50 costs 2 % more bytes than 100 and a
    # thirtieth of the time.
    picture.convert("RGB").save(
        buffer, "WEBP", lossless=small, quality=50 if small else 82, method=4
    )
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def query_figure(picture: Image.Image, caption: str) -> str:
    """The query as an <img>, enlarged in whole pixels when it is small."""
    picture = picture.convert("RGB")
    picture.thumbnail((QUERY_SIDE, QUERY_SIDE), Image.Resampling.LANCZOS)
    kind = "pixels" if max(picture.size) <= PIXELATED_SIDE else "photo"
    return f'<img class="{kind}" src="{data_uri(picture)}" alt="{escape(caption)}">'


def symbol_sheet(pictures: dict[int, Image.Image]) -> str:
    """One <symbol> a picture: cards at every damping point to it with <use>, so that its bytes
    stand in the page once.
    """
    symbols = []
    for index, picture in pictures.items():
        width, height = picture.size
        image = f'<image width="{width}" height="{height}" href="{data_uri(picture)}"/>'
        symbols.append(f'<symbol id="i{index}" viewBox="0 0 {width} {height}">{image}</symbol>')
    return (
        '<svg class="sheet" width="0" height="0" aria-hidden="true">'
        + "\n".join(symbols)
        + "</svg>"
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break text at spaces to fit `width` px; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + " …"]
    return lines


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Fit into side x side px: whole-pixel enlargement for small pictures, Lanczos reduction for
    large ones.
    """
    factor = side // max(picture.size)
    if factor >= 1:
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def picture_grid(pictures: list[Image.Image], captions: list[str], notes: list[str]) -> Image.Image:
    """White RGB grid, COLUMNS wide: each picture with its note (rank and score) and caption under
    it.
    """
    font = ImageFont.load_default(13)
    rows = max(1, -(-len(pictures) // COLUMNS))
    cell_width, cell_height = TILE + MARGIN, TILE + MARGIN + LINE * TEXT_LINES
    grid = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for place, (picture, caption, note) in enumerate(zip(pictures, captions, notes)):
        x, y = MARGIN + place % COLUMNS * cell_width, MARGIN + place // COLUMNS * cell_height
        art = enlarge(picture, TILE)
        grid.paste(art, (x + (TILE - art.width) // 2, y + (TILE - art.height) // 2))
        draw.text((x, y + TILE + 2), note, fill=(110, 110, 110), font=font)
        for line, text in enumerate(_wrap(caption, font, TILE, TEXT_LINES - 1), start=1):
            draw.text((x, y + TILE + 2 + line * LINE), text, fill="black", font=font)
    return grid
