"""Numbers as the page says them: powers of ten, dampings, scores, rates."""

from __future__ import annotations

import math

import numpy as np

SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(SUPERSCRIPT)


def damping_name(damping: float) -> str:
    """A damping as DAMPING has it, in mean eigenvalues: 1, 0.001, 1e-05."""
    return f"{damping:g}"


def score_unit(scores: np.ndarray) -> int:
    """Exponent e so that scores read well in units of 10^e: that of the largest, 0 where it is
    within 10^±2.
    """
    largest = float(np.abs(scores).max())
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 0 if -2 <= exponent <= 2 else exponent


def format_score(score: float, unit: int) -> str:
    """Signed, in units of 10^unit, two decimals (three for plain scores); a true minus sign."""
    return f"{score / 10.0**unit:+.{2 if unit else 3}f}".replace("-", "−")


def rate(value: float) -> str:
    """A rate with two decimals, more where they would read 0.00."""
    decimals = 2 if value == 0 or value >= 0.005 else min(6, -math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"
