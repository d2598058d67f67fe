"""Score histogram as inline SVG: all training images in one tone, those that carry the concept in a
second.
"""

from __future__ import annotations

import math

import numpy as np

BINS, WIDTH, HEIGHT, RUG = (
    48,
    480,
    96,
    10,
)  # bins; px of the view box; px of the ticks under the bars
SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(SUPERSCRIPT)


def score_unit(scores: np.ndarray) -> int:
    """Exponent e so that scores read well in units of 10^e: 0 for scores around one, else that of
    the largest.
    """
    largest = float(np.abs(scores).max())
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 0 if -2 <= exponent <= 2 else exponent


def format_score(score: float, unit: int) -> str:
    """Signed, in units of 10^unit, two decimals (three for plain scores); a true minus sign."""
    return f"{score / 10.0**unit:+.{2 if unit else 3}f}".replace("-", "−")


def _bars(counts: np.ndarray, tallest: int) -> str:
    """Path of one bar a bin, a hair of space between them."""
    step = WIDTH / BINS
    heights = counts / max(tallest, 1) * HEIGHT
    return "".join(
        f"M{i * step + 0.5:.1f} {HEIGHT}v{-height:.1f}h{step - 1:.1f}v{height:.1f}z"
        for i, height in enumerate(heights)
        if height
    )


def histogram_svg(scores: np.ndarray, relevant: np.ndarray | None, unit: int, label: str) -> str:
    """Bars of `scores` [N] over BINS equal bins, with the `relevant` [N] ones in front and as ticks
    beneath.

    The ticks show single relevant images, which are too few to see as bars when N is large. `label`
    (already escaped) is what a screen reader says.
    """
    low, high = min(float(scores.min()), 0.0), max(float(scores.max()), 0.0)
    span = (high - low) or 1.0
    counts, edges = np.histogram(scores, BINS, (low, low + span))
    paths = [f'<path class="all" d="{_bars(counts, counts.max())}"/>']
    if relevant is not None:
        hits = np.sort(scores[relevant])
        ticks = np.unique(np.round((hits - low) / span * WIDTH, 1))
        paths.append(f'<path class="hit" d="{_bars(np.histogram(hits, edges)[0], counts.max())}"/>')
        paths.append(
            f'<path class="rug" d="{"".join(f"M{x:.1f} {HEIGHT + 4}v{RUG - 2}" for x in ticks)}"/>'
        )
    zero = -low / span
    paths.append(f'<path class="zero" d="M{zero * WIDTH:.1f} 0v{HEIGHT + RUG + 4}"/>')
    box = f"0 0 {WIDTH} {HEIGHT + RUG + 4}"
    svg = f'<svg viewBox="{box}" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(paths)}</svg>'
    ends = f"<span>{format_score(low, unit) if low else ''}</span><span>{format_score(high, unit) if high else ''}</span>"
    return f'{svg}<p class="axis">{ends}<b style="left:{zero:.1%}">0</b></p>'
