"""Every picture that the program reads: which files may be one, and their colours on white paper.

All of it goes through `decoded`. Nothing else opens a picture.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ..errors import UserError
from ..validated_io import checked_file, file_errors

# What may be read, by its content: formats that are decoded without another program and without a
# language of their own. Pillow would hand EPS to Ghostscript, whatever the file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".ppm", ".pgm"),
}
# what Pillow raises for a file that is no picture
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error),
    *(OverflowError, ZeroDivisionError, MemoryError, AttributeError, RuntimeError),
    Image.DecompressionBombError,
)
MAX_PIXELS = 150_000_000  # of a picture: 450 MB once decoded; the largest cameras make as many
# Texts and colour profiles are no pixels, and programs put whole workflows there; Pillow's own
# limit is 1 MB. A bomb of them still takes less than a picture may.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**27
BITS, ORIGIN, KIND = 258, 262, 339  # TIFF: of a sample, what its 0 means, which kind of number
# Samples of few bits are spread over 0 to 255 when read, but not the one that stands for clear.
CLEAR_STEPS = {"L;2": 85, "L;4": 17}


def refuse_bomb(what: object, size: tuple[int, int], mend: str) -> None:
    """UserError for a picture whose header, all that was read yet, promises too many pixels."""
    if size[0] * size[1] > MAX_PIXELS:
        given = f"{size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}"
        raise UserError(f"{what} has {given}; {mend}")


def decoded(content: bytes | BinaryIO, what: object, mend: str) -> Image.Image:
    """The picture of a file's content, upright, 8 bits a channel; the first one of several.

    what: whose, for the message. UserError, which ends with `mend`, for what is none of `FORMATS`,
    is damaged, too large, or has values whose range nobody can tell.
    """
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(source) as opened:
                refuse_bomb(what, opened.size, mend)
                return _eight_bits(opened)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be read as a picture ({reason}); {mend}") from None


def media_type(file: BinaryIO, what: object, mend: str) -> str:
    """ "image/png" of an open file. UserError as `decoded`, of what its header tells."""
    try:
        return Image.MIME[_opened(file).format or ""]
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} is no picture ({reason}); {mend}") from None


def read_picture(path: Path, mend: str) -> Image.Image:
    """An RGB picture of a file, on white. UserError as `decoded`, or for one that is no file."""
    checked_file(path, mend)
    with file_errors(path, mend):
        return on_white(decoded(path.read_bytes(), path, mend))


def on_white(picture: Image.Image) -> Image.Image:
    """RGB copy; transparent pixels show white paper."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    paper.alpha_composite(layer)
    return paper.convert("RGB")


def _opened(source: BinaryIO) -> Image.Image:
    Image.init()  # a build of Pillow may lack some
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def _eight_bits(opened: Image.Image) -> Image.Image:
    """The upright picture; numbers of more bits are scaled by their range, and none is clipped."""
    tags, form = getattr(opened, "tag_v2", {}), opened.tile[0][3] if opened.tile else ""
    form = form[0] if isinstance(form, tuple) else form  # how the samples lie in the file
    wide = opened.mode.startswith("I") or opened.mode == "F"
    most = _largest(opened.mode, tags) if wide else 255
    opened.load()
    try:
        picture = ImageOps.exif_transpose(opened)
    except UNREADABLE:  # of the EXIF alone: the pixels are there
        picture = opened.copy()
    clear = picture.info.get("transparency")
    if wide:
        values = np.asarray(picture).astype(np.uint32)
        scaled = ((values * 255 + most // 2) // most).astype(np.uint8)
        picture = Image.fromarray(255 - scaled if tags.get(ORIGIN) == 0 else scaled)  # 0 is white
        if isinstance(clear, int):
            picture.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif isinstance(clear, int):
        picture.info["transparency"] = clear * CLEAR_STEPS.get(form, 1)
    elif isinstance(clear, tuple) and form == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    return picture


def _largest(mode: str, tags: Any) -> int:
    """What a wide sample is at most. ValueError for kinds of which nobody can tell."""
    bits = tags.get(BITS, (16,))[0]  # only TIFF has others
    if mode == "F" or bits > 16 or tags.get(KIND, (1,))[0] != 1:
        kind = "fractions" if mode == "F" else f"signed, or of {bits} bits"
        raise ValueError(f"its values are {kind}, and which is white nobody can tell")
    return 2**bits - 1
