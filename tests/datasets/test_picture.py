"""What may be a picture, and its colours on white."""

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import concept_trak
from concept_trak.datasets import ImageCaptionDataset
from concept_trak.datasets.picture import decoded, media_type, on_white, read_picture
from concept_trak.errors import UserError

MEND = "put another picture there, or remove its row from the metadata.jsonl"
RAMP = np.arange(64).reshape(8, 8) / 63


def rgb(content):
    return np.asarray(on_white(decoded(content, "p.png", MEND)))


def saved(picture, kind, **about):
    out = io.BytesIO()
    picture.save(out, kind, **about)
    return out.getvalue()


def png(bits, color, row, clear=b""):
    """One row of pixels: Pillow writes no such depths."""
    width = len(row) * 8 // bits // (3 if color == 2 else 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))]
    chunks += [(b"tRNS", clear)] if clear else []
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    whole = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def tiff(values, bits, white=1, order="<"):
    """An uncompressed grey TIFF of whole numbers. white: 0 where a 0 is white."""
    data, (height, width) = values, (1, len(values) * 8 // bits)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, white)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    made = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data)) + data
    made += struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        made += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return made + b"\0\0\0\0"


WIDE = (RAMP * 65535).round().astype(np.uint16)
WIDE_FILES = {
    "png": saved(Image.fromarray(WIDE), "PNG"),
    "tiff": saved(Image.fromarray(WIDE), "TIFF"),
    "lzw tiff": saved(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"),
    "jpeg2000": saved(Image.fromarray(WIDE), "JPEG2000"),
    "ppm": b"P5 8 8 65535\n" + WIDE.astype(">u2").tobytes(),
    "ppm of 10 bits": b"P5 8 8 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes(),
    "big-endian tiff": tiff(WIDE.astype(">u2").tobytes(), 16, order=">"),
    "tiff, 0 is white": tiff((65535 - WIDE).astype("<u2").tobytes(), 16, white=0),
    "colour png": png(16, 2, np.repeat(WIDE.reshape(-1, 1), 3, 1).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("kind", WIDE_FILES)
def test_numbers_of_more_bits_are_scaled_by_their_range(kind):
    """1.5 of 255: colour loses its lower byte, JPEG 2000 some accuracy."""
    found = rgb(WIDE_FILES[kind]).reshape(8, 8, 3) / 255
    assert np.abs(found - RAMP[..., None]).max() <= 1.5 / 255
    assert found[0, 0, 0] == 0 and found[-1, -1, 0] == 1


def test_twelve_bits_are_scaled_by_twelve_bits():
    assert rgb(tiff(bytes([0xFF, 0xF8, 0x00]), 12))[0, :, 0].tolist() == [255, 128]


def test_a_wide_picture_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = rgb(saved(Image.fromarray(WIDE), "PNG", exif=exif))[..., 0]
    assert (turned == np.rot90(rgb(WIDE_FILES["png"])[..., 0], -1)).all()


@pytest.mark.parametrize(
    "picture, kind",
    [
        (Image.fromarray(RAMP.astype(np.float32)), "fractions"),
        (Image.fromarray((RAMP * 2**30).astype(np.int32)), "of 32 bits"),
        (Image.fromarray((RAMP * 300).astype(np.int32)), "of 32 bits"),
    ],
)
def test_numbers_whose_range_nobody_can_tell_are_refused_by_name(picture, kind):
    with pytest.raises(UserError, match=f"^p.png cannot be read.*{kind}.*; {MEND}$"):
        rgb(saved(picture, "TIFF"))


def test_a_float_map_is_refused_and_not_clipped():
    with pytest.raises(UserError, match="fractions"):
        rgb(b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.5, 1))


CLEAR = {  # bits, colour type, row, the clear one; which of its pixels are clear
    "grey of 1 bit": ((1, 0, b"\x55", b"\0\1"), [0, 1] * 4),
    "grey of 2 bits": ((2, 0, bytes([0b00011011]), b"\0\1"), [0, 1, 0, 0]),
    "grey of 4 bits": ((4, 0, b"\x1f", b"\0\1"), [1, 0]),
    "grey of 8 bits": ((8, 0, bytes([7, 9]), b"\0\7"), [1, 0]),
    "grey of 16 bits": ((16, 0, struct.pack(">3H", 9, 300, 9), b"\0\x09"), [1, 0, 1]),
    "colour of 8 bits": ((8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3)), [1, 0]),
    "colour of 16 bits": (
        (16, 2, struct.pack(">6H", 9999, 2, 3, 4000, 5, 6), struct.pack(">3H", 9999, 2, 3)),
        [1, 0],
    ),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_the_colour_that_stands_for_clear_becomes_white(kind):
    (*drawn, clear), which = CLEAR[kind]
    found, plain = rgb(png(*drawn, clear))[0], rgb(png(*drawn))[0]
    for pixel, before, white in zip(found, plain, which, strict=True):
        assert pixel.tolist() == ([255] * 3 if white else before.tolist())


def test_colours_of_other_models_are_those_of_a_viewer():
    red = Image.new("RGB", (4, 4), (200, 30, 60))
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for picture in (lab, *map(red.convert, ("CMYK", "YCbCr", "RGBA", "RGBX"))):
        found = rgb(saved(picture, "TIFF"))[0, 0].astype(int)
        assert np.abs(found - (200, 30, 60)).max() <= 3, picture.mode
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(int(rgb(saved(half, "PNG"))[0, 0, 0]) - 127) <= 1
    assert abs(int(rgb(saved(half.convert("LA"), "PNG"))[0, 0, 0]) - 127) <= 1


def long_text(size):
    about = PngImagePlugin.PngInfo()
    about.add_text("workflow", "x" * size, zip=True)
    return {"pnginfo": about}


@pytest.mark.parametrize(
    "about",
    [
        long_text(3_000_000),
        {"icc_profile": b"p" * 3_000_000},
        {"pnginfo": PngImagePlugin.PngInfo(), "exif": b"Exif\0\0" + b"e" * 2_000_000},
    ],
    ids=["text", "profile", "exif"],
)
def test_long_text_and_profiles_are_no_reason_to_refuse_a_picture(about):
    assert (rgb(saved(Image.new("RGB", (4, 4), "red"), "PNG", **about)) == (255, 0, 0)).all()


def test_a_bomb_of_text_is_refused():
    data = b"workflow\0\0" + zlib.compress(bytes(2**27 + 1), 1)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data
    bomb = chunk + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = png(8, 0, b"\7")
    with pytest.raises(UserError, match="p.png cannot be read"):
        rgb(whole[:33] + bomb + whole[33:])  # after its header


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
FOREIGN = {
    "eps": EPS,
    "eps with a DOS head": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0) + EPS,
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(40),
    "pcx": saved(Image.new("RGB", (4, 4)), "PCX"),
    "pdf": b"%PDF-1.4\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "tga": saved(Image.new("RGB", (4, 4)), "TGA"),
    "ico": saved(Image.new("RGB", (16, 16)), "ICO"),
    "html": b"<html><script>alert(1)</script>",
    "text": b"root:x:0:0:root:/root:/bin/bash\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_a_picture_is_told_by_content_from_a_list(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"{a} was started"))
    (tmp_path / "p.png").write_bytes(FOREIGN[kind])
    data = ImageCaptionDataset(tmp_path, [{"file_name": "p.png"}], ["a cat"])
    for read in (data.image, data.media_type, lambda _: read_picture(tmp_path / "p.png", MEND)):
        with pytest.raises(UserError, match="p.png (cannot be read as a|is no) picture"):
            read(0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_pictures_of_the_list_are_read_whatever_their_name(kind):
    content = saved(Image.new("RGB", (16, 16), (255, 0, 0)), kind)
    assert np.abs(rgb(content).astype(int) - (255, 0, 0)).max() <= 3
    assert media_type(io.BytesIO(content), "p.png", MEND).startswith("image/")


def test_the_first_of_several_pictures_is_read():
    both = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        content = saved(both[0], kind, save_all=True, append_images=both[1:])
        assert np.abs(rgb(content)[8, 8].astype(int) - (255, 0, 0)).max() <= 3, kind


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(UserError, match="p.png is not a regular file"):
        read_picture(tmp_path / "p.png", MEND)
    data = ImageCaptionDataset(tmp_path, [{"file_name": "p.png"}], ["a cat"])
    with pytest.raises(UserError, match="p.png is not a regular file"):
        data.image(0)


def test_nothing_else_opens_a_picture():
    users = {
        str(path.relative_to(Path(concept_trak.__file__).parent))
        for path in Path(concept_trak.__file__).parent.rglob("*.py")
        if "Image.open(" in path.read_text()
    }
    assert users == {"datasets/picture.py"}
