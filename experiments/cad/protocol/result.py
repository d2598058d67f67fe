"""What a protocol found: rows with 95 % intervals over pictures, and how they are shown.

Means and totals have bootstrap intervals. Shares have Wilson's, and changes of shares Bonett and
Price's (2012), for a bootstrap of pictures that are all hits, or all none, has no width at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from concept_trak.scoring.metrics import resampled_means

from ..result_cache import mean_ci

Figure = dict[str, Any]  # {"value", "ci95": [low, high]}


@dataclass
class ProtocolResult:
    """columns: names of a row's figures, in order. rows: {"of", "role", "pictures", column: Figure
    or None}. line: the summary. scores: {name: a number a picture}. notes: what a reader must know.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    line: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Sequence[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, of: str, role: str, pictures: int, **figures: Figure | None) -> None:
        """One more row."""
        self.rows.append({"of": of, "role": role, "pictures": pictures, **figures})

    def markdown(self) -> str:
        """The table."""
        head = ["", "", "pictures", *self.columns]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            figures = [format_figure(row.get(column)) for column in self.columns]
            lines.append([row["of"], row["role"], str(row["pictures"]), *figures])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_figure(figure: Figure | None) -> str:
    """ "0.50 [0.40, 0.60]" """
    if figure is None:
        return ""
    return f"{figure['value']:.3g} [{figure['ci95'][0]:.3g}, {figure['ci95'][1]:.3g}]"


def paired(before: np.ndarray, after: np.ndarray, total: bool = False) -> dict[str, Figure]:
    """Means (or totals) over the same n pictures of both pipelines, and their change, each with its
    bootstrap interval over pictures.
    """
    each = {"original": before, "edited": after, "change": np.asarray(after) - np.asarray(before)}
    return {name: times(mean_ci(v), len(v) if total else 1) for name, v in each.items()}


def share(hits: np.ndarray) -> Figure:
    """Share of hits, 0 or 1 a picture [n], with Wilson's interval."""
    hits = np.asarray(hits, dtype=bool)
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return {"value": float(hits.mean()), "ci95": [float(found.low), float(found.high)]}


def shares(before: np.ndarray, after: np.ndarray) -> dict[str, Figure]:
    """Shares of hits [n] among the same pictures of both pipelines, and their change.

    Of n pairs g gained and l lost the hit; with p = (g + 1) / (n + 2), q = (l + 1) / (n + 2) the
    change's interval is p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2)).
    """
    one, other = (np.asarray(hits, dtype=bool) for hits in (before, after))
    n = len(one)
    p, q = (other & ~one).sum() + 1, (one & ~other).sum() + 1
    p, q = p / (n + 2), q / (n + 2)
    half = norm.ppf(0.975) * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    ends = [float(np.clip(p - q + sign * half, -1, 1)) for sign in (-1, 1)]
    change = {"value": float(other.mean() - one.mean()), "ci95": ends}
    return {"original": share(one), "edited": share(other), "change": change}


def times(figure: Figure, factor: float) -> Figure:
    """A figure in another unit."""
    low, high = figure["ci95"]
    return {"value": figure["value"] * factor, "ci95": [low * factor, high * factor]}


def unpaired_difference(one: np.ndarray, other: np.ndarray) -> Figure:
    """mean(one) - mean(other) of different pictures, each redrawn by itself."""
    means = resampled_means(one, 0, 10_000) - resampled_means(other, 1, 10_000)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean(one) - np.mean(other))
    return {"value": value, "ci95": [float(low), float(high)]}
