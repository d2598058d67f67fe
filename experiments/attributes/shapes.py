"""Shapes x colours, as in the synthetic benchmark of Concept-TRAK: one shape of one colour with a
black outline on white, somewhere; some combinations held out.

The reference draws 64 x 64 pixels, radius 0.16 of the side, the centre uniform such that the shape
fits, two shapes and two colours without (triangle, red). Here sizes, shapes, colours and held-out
combinations are variables, pictures are drawn larger and reduced (their edges are smooth), and
all is seeded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from concept_trak.errors import UserError
from concept_trak.models.vocabulary import Vocabulary

from .schemes import AttributeScheme, Labels, parse_held_out, write_combinations

SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}  # and a circle, a cross
SHAPES = ("triangle", "circle", "square", "cross", "pentagon", "hexagon")
COLORS = ("red", "blue", "green", "orange", "purple", "cyan", "brown", "pink")
OVERSAMPLING = 4
OUTLINE = 1 / 32  # of the side: 2 pixels of 64, as in the reference


@dataclass(frozen=True)
class SyntheticSettings:
    """size: side, pixels. radius: of a shape, share of the side. count: train pictures.
    held_out_count: pictures of all combinations that are never trained on, which presences are
    measured on.
    """

    shapes: tuple[str, ...] = ("triangle", "circle")
    colors: tuple[str, ...] = ("red", "blue")
    held_out: str = "triangle red"
    size: int = 16
    radius: float = 0.36
    count: int = 900
    held_out_count: int = 96
    seed: int = 0

    def scheme(self) -> AttributeScheme:
        """Attributes and held-out combinations. UserError for what cannot be drawn."""
        for name, chosen, known in (
            ("SHAPES", self.shapes, SHAPES),
            ("COLORS", self.colors, COLORS),
        ):
            if bad := [c for c in chosen if c not in known]:
                raise UserError(
                    f"{name} holds {bad[0]!r}; set {name} to some of {', '.join(known)}"
                )
        vocabulary = Vocabulary({"shape": self.shapes, "color": self.colors})
        return AttributeScheme(vocabulary, parse_held_out(vocabulary, self.held_out))


def draw(labels: Labels, size: int, radius: float, rng: np.random.Generator) -> Image.Image:
    """One picture; the place is drawn from `rng`."""
    big, r = size * OVERSAMPLING, radius * size * OVERSAMPLING
    x, y = rng.uniform(r + 1, big - r - 1, 2)
    picture = Image.new("RGB", (big, big), "white")
    pen = ImageDraw.Draw(picture)
    line = {"fill": labels["color"], "outline": "black", "width": round(OUTLINE * big)}
    shape = labels["shape"]
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), **line)
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in _corners(shape)], **line)
    return picture.resize((size, size), Image.Resampling.BOX)


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":  # the reference's: as wide as high
        return [(0, -1), (-1, 1), (1, 1)]
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "cross":
        a = 1 / 3
        quarter = [(-a, -1), (a, -1), (a, -a)]
        turned = [quarter]
        for _ in range(3):
            turned.append([(-v, u) for u, v in turned[-1]])
        return [corner for part in turned for corner in part]
    n = SIDES[shape]
    angles = (2 * math.pi * i / n - math.pi / 2 for i in range(n))
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def pictures(
    labels: Sequence[Labels], settings: SyntheticSettings, stream: int
) -> Iterator[tuple[Labels, Image.Image]]:
    """Picture i of stream s has a place of its own, drawn by (seed, s, i)."""
    for i, told in enumerate(labels):
        rng = np.random.default_rng([settings.seed, stream, i])
        yield told, draw(told, settings.size, settings.radius, rng)


def build(root: Path, settings: SyntheticSettings) -> None:
    """See `write_combinations`."""
    counts = (settings.count, settings.held_out_count, 2 * settings.count)
    draw_all = functools.partial(pictures, settings=settings)
    write_combinations(root, settings.scheme(), counts, draw_all, asdict(settings))
