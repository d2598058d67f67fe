"""The highest and lowest scores by the index: candidates at both ends, then their exact scores.

An index estimates s_i = x_i . u; the score is w_i s_i, with a row weight that may be negative. So
both ends of s are looked at, and the candidates are those with the highest and lowest w_i s_i by
the estimates. A row that was not looked at has an s between the last of either end, but for the
estimates' error, for which a margin is left. So its score is at most

    b = max(max(w, 0) s_high, max(-w, 0) (-s_low)),   w over all rows

and where the wanted scores do not reach b, more rows are looked at (the threshold algorithm of
Fagin, Lotem & Naor 2003).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .rabitq import Index

GROWTH, MOST = 4, 64  # rows looked at grow by the one, to the other times the candidates
MARGIN = 2.0  # standard deviations of the estimates' errors
ROWS_AT_ONCE = 128  # candidates read at a time: as much as stays in cache


@dataclass(frozen=True)
class Candidates:
    """Exact scores of the candidates of one query.

    rows: int64 [M], ascending. scores: float32 [D, M].
    """

    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Search:
    """How to search. candidates: from each end at each damping. wanted: how many of each end must
    be right, as far as weights can tell.
    """

    candidates: int
    wanted: int = 10

    def find(
        self, index: Index, solved: np.ndarray, row_weight: np.ndarray | None = None
    ) -> Candidates:
        """Of one query solved at all dampings [D, k]; row_weight: [N] or None.

        Memory: the estimates of the rows looked at, ROWS_AT_ONCE rows, and the scores.
        """
        store, looked = index.store, self.candidates
        while True:
            looked = min(looked, store.num_rows)
            high, low = index.search(solved, looked), index.search(-solved, looked)
            if row_weight is None:
                rows = np.unique(np.concatenate([high[1], low[1]]))
                return Candidates(rows, exact(index, rows, solved, None))
            rows = self._promising(high, low, row_weight)
            products = exact(index, rows, solved, None)
            ends = [_score_bound(high, rows, products), _score_bound(low, rows, -products)]
            found = Candidates(rows, products * row_weight[rows].astype(np.float32))
            most = looked >= min(store.num_rows, MOST * self.candidates)
            if most or self._settled(found.scores, *ends, row_weight):
                return found
            looked *= GROWTH

    def _promising(
        self,
        high: tuple[np.ndarray, np.ndarray],
        low: tuple[np.ndarray, np.ndarray],
        weight: np.ndarray,
    ) -> np.ndarray:
        """int64 [M], ascending: the candidates of either end of w s by the estimates, at any
        damping. high, low: (estimates, rows) [D, C] of s and of -s.
        """
        rows = np.concatenate([high[1], low[1]], 1)
        weighted = np.concatenate([high[0], -low[0]], 1) * weight[rows]
        order = np.argsort(weighted, 1, kind="stable")
        chosen = np.concatenate([order[:, : self.candidates], order[:, -self.candidates :]], 1)
        return np.unique(np.take_along_axis(rows, chosen, 1))

    def _settled(
        self, scores: np.ndarray, high: np.ndarray, low: np.ndarray, weight: np.ndarray
    ) -> bool:
        """Whether no row outside the candidates can be among the wanted of either end.

        high, low: [D], the greatest s, and -s, that one outside may have.
        """
        place = min(self.wanted, scores.shape[1])
        ordered = np.sort(scores, 1)
        up, down = max(float(weight.max()), 0), max(-float(weight.min()), 0)
        high, low = np.maximum(high, 0), np.maximum(low, 0)
        above = np.maximum(up * high, down * low)
        below = np.maximum(up * low, down * high)
        return bool((ordered[:, -place] >= above).all() and (ordered[:, place - 1] <= -below).all())


def _score_bound(
    end: tuple[np.ndarray, np.ndarray], rows: np.ndarray, products: np.ndarray
) -> np.ndarray:
    """[D]: what s may be, at most, outside the candidates of an end: the last estimate, and MARGIN
    times the error that estimates are seen to have.

    end: (estimates, rows) [D, C]. products: [D, M] exact s of `rows`.
    """
    estimates, of_end = end
    places = np.minimum(np.searchsorted(rows, of_end), len(rows) - 1)
    errors = estimates - np.take_along_axis(products, places, 1)
    known = rows[places] == of_end
    pairs = zip(errors, known, strict=True)
    error = np.array([found[there].std() if there.any() else 0 for found, there in pairs])
    return estimates[:, -1] + MARGIN * error


def exact(
    index: Index, rows: np.ndarray, solved: np.ndarray, row_weight: np.ndarray | None
) -> np.ndarray:
    """float32 [D, M] scores of some rows, as `scoring.scores` has them of all. UserError as
    `Index.rows`.
    """
    out = np.empty((len(solved), len(rows)), np.float32)
    left = torch.as_tensor(np.asarray(solved, np.float64))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        out[:, part] = (left @ index.rows(rows[part]).double().T).numpy()
    return out if row_weight is None else out * row_weight[rows].astype(np.float32)
