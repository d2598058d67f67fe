"""Drawn faces with exact attributes: "Pixel Art" by DiceBear, CC0 1.0.

Definition and composer are the PyPI packages dicebear-styles and dicebear-core (extra `faces`);
their art is fetched with them and none of it is in this repository. A face is 16 x 16 pixels, each
part chosen by us: what an attribute says is exact, all else (skin, eyes, mouth, the part's own
variant and colour) is drawn at random, so that a class has many looks.

    hair     short | long | bald
    top      red_top | blue_top | green_top
    glasses  glasses | no_glasses
    hat      hat | no_hat
    beard    beard | no_beard
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concept_trak.datasets.picture import decoded, on_white
from concept_trak.errors import UserError
from concept_trak.models.vocabulary import Vocabulary

from .schemes import AttributeScheme, Labels, parse_held_out, write_combinations

STYLE, CANVAS = "pixel-art.json", 16  # pixels
CLASSES = {
    "hair": ("short", "long", "bald"),
    "top": ("red_top", "blue_top", "green_top"),
    "glasses": ("glasses", "no_glasses"),
    "hat": ("hat", "no_hat"),
    "beard": ("beard", "no_beard"),
}
TOPS = {"red_top": "#d11141", "blue_top": "#428bca", "green_top": "#00b159"}
BACKGROUND = "white"
LICENSE = "CC0 1.0"
INSTALL = "pip install 'concept-trak[faces]'"
PINNED = "pip install dicebear-styles==10.6.0"


@dataclass(frozen=True)
class FaceSettings:
    """attributes: of `CLASSES`, empty: all. held_out_count: pictures of all combinations that are
    never trained on. size: side, pixels; a multiple of 16 enlarges without blur.
    """

    attributes: tuple[str, ...] = ()
    held_out: str = "hat beard|glasses bald|long beard"
    size: int = CANVAS
    count: int = 2400
    held_out_count: int = 144
    seed: int = 0

    def scheme(self) -> AttributeScheme:
        """Attributes and held-out combinations. UserError for an attribute that there is not."""
        if bad := [a for a in self.attributes if a not in CLASSES]:
            raise UserError(
                f"unknown attribute {bad[0]!r}; set ATTRIBUTES to some of {', '.join(CLASSES)}"
            )
        chosen = self.attributes or tuple(CLASSES)
        vocabulary = Vocabulary({name: CLASSES[name] for name in chosen})
        return AttributeScheme(vocabulary, parse_held_out(vocabulary, self.held_out))


@functools.cache
def definition() -> dict[str, Any]:
    """Of the style. UserError when the package is not there, or its art has another licence now."""
    from importlib import resources

    try:
        text = resources.files("dicebear_styles").joinpath(STYLE).read_text("utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(f"dicebear-styles is not installed; {INSTALL}") from None
    found = json.loads(text)
    if (name := found["meta"]["license"]["name"]) != LICENSE:
        raise UserError(f"the licence of {STYLE} is {name!r}, not {LICENSE}; {PINNED}")
    return found


def variants(part: str, prefix: str = "") -> list[str]:
    """The names of a part's drawings that begin so, in their order."""
    return sorted(v for v in definition()["components"][part]["variants"] if v.startswith(prefix))


def options_of(labels: Labels, rng: np.random.Generator) -> dict[str, Any]:
    """DiceBear options of one face: every part is named, nothing is left to its own chance."""

    def one(names: Sequence[str]) -> str:
        return str(names[rng.integers(len(names))])

    def color(part: str) -> str:
        return one(definition()["colors"][part]["values"])

    hair, top = labels.get("hair", "short"), labels.get("top", "blue_top")
    shown = {part: labels.get(part, f"no_{part}") == part for part in ("glasses", "hat", "beard")}
    options: dict[str, Any] = {
        "size": CANVAS,
        "backgroundColor": BACKGROUND,
        "skinColor": color("skin"),
        "hairColor": color("hair"),
        "clothingColor": TOPS[top],
        "glassesColor": color("glasses"),
        "hatColor": color("hat"),
        "clothesVariant": one(variants("clothes")),
        "eyesVariant": one(variants("eyes")),
        "mouthVariant": one(variants("mouth")),
        "hairVariant": one(variants("hair", "long" if hair == "long" else "short")),
        "hairProbability": 0 if hair == "bald" else 100,
        "glassesVariant": one(variants("glasses", "dark")),
        "hatVariant": one(variants("hat")),
        "beardVariant": one(variants("beard")),
        "accessoriesProbability": 0,
    }
    return options | {f"{part}Probability": 100 * there for part, there in shown.items()}


def draw(labels: Labels, size: int, rng: np.random.Generator) -> Image.Image:
    """One face. UserError when a package is not there."""
    try:
        import resvg_py
        from dicebear import Avatar
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; {INSTALL}") from None
    options = options_of(labels, rng)
    options.pop("backgroundColor")
    svg = re.sub(r"<metadata.*?</metadata>", "", Avatar(_style(), options).to_string(), flags=re.S)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS, height=CANVAS)
    picture = on_white(decoded(bytes(png), "the drawn face", INSTALL))
    return picture.resize((size, size), Image.Resampling.NEAREST)


@functools.cache
def _style() -> Any:
    from dicebear import Style

    return Style(definition())


def pictures(
    labels: Sequence[Labels], settings: FaceSettings, stream: int
) -> Iterator[tuple[Labels, Image.Image]]:
    """Face i of stream s is drawn by (seed, s, i)."""
    for i, told in enumerate(labels):
        rng = np.random.default_rng([settings.seed, stream, i])
        yield told, draw(told, settings.size, rng)


def make(root: Path, settings: FaceSettings) -> None:
    """See `write_combinations`."""
    counts = (settings.count, settings.held_out_count, settings.count)
    made_from = json.loads(json.dumps(asdict(settings)))
    write_combinations(
        root, settings.scheme(), counts, functools.partial(pictures, settings=settings), made_from
    )
