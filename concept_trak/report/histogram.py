"""Score histogram as paths for inline SVG: all training images in one tone, those that carry the
concept in a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formatting import format_score

BINS = 48
WIDTH, HEIGHT, RUG = 480, 96, 10  # of the view box: bars, and the ticks under them
BOX = f"0 0 {WIDTH} {HEIGHT + RUG + 4}"


@dataclass(frozen=True)
class Histogram:
    """SVG paths in the view box BOX, and the words of the axis.

    bars:     one bar a bin over all images
    hits:     the same over the relevant images, "" where truth is not known
    ticks:    one tick a relevant image: they are too few to see as bars when N is large
    zero:     the line at score 0, and `zero_at` its place from the left, e.g. "41.7%"
    low/high: the ends of the axis, "" where that end is 0
    """

    bars: str
    hits: str
    ticks: str
    zero: str
    zero_at: str
    low: str
    high: str


def _bars(counts: np.ndarray, tallest: int) -> str:
    """Path of one bar a bin, a hair of space between them."""
    step = WIDTH / BINS
    heights = counts / max(tallest, 1) * HEIGHT
    return "".join(
        f"M{i * step + 0.5:.1f} {HEIGHT}v{-height:.1f}h{step - 1:.1f}v{height:.1f}z"
        for i, height in enumerate(heights)
        if height
    )


def histogram(scores: np.ndarray, relevant: np.ndarray | None, unit: int) -> Histogram:
    """Histogram of `scores` [N] over BINS equal bins that cover 0; `relevant`: bool [N] or None.

    unit: the ends of the axis are told in units of 10^unit.
    """
    low, high = min(float(scores.min()), 0.0), max(float(scores.max()), 0.0)
    span = (high - low) or 1.0
    counts, edges = np.histogram(scores, BINS, (low, low + span))
    hits = np.sort(scores[relevant]) if relevant is not None else np.zeros(0)
    ticks = np.unique(np.round((hits - low) / span * WIDTH, 1))
    zero = -low / span
    return Histogram(
        bars=_bars(counts, counts.max()),
        hits=_bars(np.histogram(hits, edges)[0], counts.max()),
        ticks="".join(f"M{x:.1f} {HEIGHT + 4}v{RUG - 2}" for x in ticks),
        zero=f"M{zero * WIDTH:.1f} 0v{HEIGHT + RUG + 4}",
        zero_at=f"{zero:.1%}",
        low=format_score(low, unit) if low else "",
        high=format_score(high, unit) if high else "",
    )
