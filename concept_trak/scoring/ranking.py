"""The one ranking, with one tie rule, behind every listing and every metric."""

from __future__ import annotations

import numpy as np

from ..errors import UserError


def ranking(scores: np.ndarray, largest: bool = True, k: int | None = None) -> np.ndarray:
    """Indices [..., min(k, N)] (all N without k) from the highest (or lowest) score on; equal
    scores by lower index, in both directions.

    scores: [..., N], any real dtype. Raises UserError on NaN, which has no rank.
    """
    scores = np.asarray(scores)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    if (bad := np.isnan(scores)).any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(f"score {first} is NaN, which cannot be ranked; give scores without")
    # Negation is exact, and a stable ascending sort keeps the lower index first in both directions.
    return np.argsort(-scores if largest else scores, axis=-1, kind="stable")[..., :k]
