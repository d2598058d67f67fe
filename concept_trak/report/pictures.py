"""Training pictures for the page (each embedded once, as an SVG symbol) and for the JPG grids."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..datasets import ImageCaptionDataset

# px; larger pictures are shrunk to this in the page
EMBED_SIDE = 128
QUERY_SIDE = 512
# px; up to this side a picture is enlarged in whole pixels instead of smoothed
PIXELATED_SIDE = 128
# px; up to this side lossless WebP costs about what lossy does, and flat art stays clean
LOSSLESS_SIDE = 96
TILE, MARGIN, LINE, TEXT_LINES, COLUMNS = 192, 12, 16, 4, 5  # px and counts of the JPG grid


def load_pictures(dataset: ImageCaptionDataset, indices: list[int]) -> dict[int, Image.Image]:
    """{training index: picture}, at the data's own size but at most EMBED_SIDE wide; each index
    read once.
    """
    unique = sorted(set(indices))
    if not unique:
        return {}
    side = dataset.images(unique[:1]).shape[2]
    arrays = dataset.images(unique, size=min(side, EMBED_SIDE))
    return {
        i: Image.fromarray(np.asarray(a, np.uint8)) for i, a in zip(unique, arrays, strict=True)
    }


def data_uri(picture: Image.Image) -> str:
    """WebP data URI, lossless while the picture is small; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    small = max(picture.size) <= LOSSLESS_SIDE
    # When lossless, quality is only the encoder's effort: 50 costs 2 % more bytes than 100 and a
    # thirtieth of the time.
    quality = 50 if small else 82
    picture.convert("RGB").save(buffer, "WEBP", lossless=small, quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """A copy that fits into side x side px (Lanczos); smaller pictures keep their size."""
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Fit into side x side px: whole-pixel enlargement for small pictures, Lanczos reduction for
    large ones.
    """
    factor = side // max(picture.size)
    if factor < 1:
        return shrunk(picture, side)
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


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


def picture_grid(pictures: list[Image.Image], captions: list[str], notes: list[str]) -> Image.Image:
    """White RGB grid, COLUMNS wide: each picture with its note (rank and score) and caption under
    it.
    """
    font = ImageFont.load_default(13)
    rows = max(1, -(-len(pictures) // COLUMNS))
    cell_width, cell_height = TILE + MARGIN, TILE + MARGIN + LINE * TEXT_LINES
    grid = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    cells = zip(pictures, captions, notes, strict=True)
    for place, (picture, caption, note) in enumerate(cells):
        x, y = MARGIN + place % COLUMNS * cell_width, MARGIN + place // COLUMNS * cell_height
        art = enlarge(picture, TILE)
        grid.paste(art, (x + (TILE - art.width) // 2, y + (TILE - art.height) // 2))
        draw.text((x, y + TILE + 2), note, fill=(110, 110, 110), font=font)
        for line, text in enumerate(_wrap(caption, font, TILE, TEXT_LINES - 1), start=1):
            draw.text((x, y + TILE + 2 + line * LINE), text, fill="black", font=font)
    return grid
