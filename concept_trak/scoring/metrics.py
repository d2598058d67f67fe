"""How well a ranking of N training images finds the R that carry a concept.

    Recall@k = (relevant images among the k highest scores) / min(k, R)  (or / R, see `denominator`)
    least-k  = the same on the k lowest scores; as rich as the top k where a method has no sign
    AP       = 1/R sum over relevant i of (relevant images ranked no lower than i) / rank(i)
    mAP      = mean of AP over queries

Recall@k over min(k, R) is the convention of the AbC benchmark as Concept-TRAK evaluates it, over R
that of the generative data attribution benchmark. Chance levels are exact expectations under a
uniformly random order. Equal scores are ranked by index, as in the listings, so that a metric
always describes the list that is shown.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from .ranking import ranking

DENOMINATORS = ("min", "relevant")


def _ranked_relevance(
    scores: np.ndarray, relevant: np.ndarray, largest: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Relevance in rank order [..., N] and the number of relevant images [...]."""
    order = ranking(scores, largest)
    relevant = np.asarray(relevant, dtype=bool)
    if relevant.shape[-1:] != order.shape[-1:]:
        raise UserError(
            f"scores are for {order.shape[-1]} images but truth is for {relevant.shape[-1]}; give "
            "scores and relevant of the same images"
        )
    relevant = np.broadcast_to(relevant, order.shape)
    count = relevant.sum(-1)
    if (count == 0).any():
        raise UserError(
            "no relevant image, so recall and average precision are undefined; give relevant a row "
            "of a concept that some image carries"
        )
    return np.take_along_axis(relevant, order, axis=-1), count


def _divisor(count: np.ndarray, k: int, denominator: str) -> np.ndarray:
    if denominator not in DENOMINATORS:
        raise UserError(
            f"denominator {denominator!r} is unknown; give denominator one of "
            f"{', '.join(DENOMINATORS)}"
        )
    if k < 1:
        raise UserError(f"recall at {k} is undefined; give k >= 1")
    return np.minimum(count, k) if denominator == "min" else count


def recall_at_k(
    scores: np.ndarray,
    relevant: np.ndarray,
    k: int = 10,
    denominator: str = "min",
    largest: bool = True,
) -> np.ndarray:
    """Recall@k = hits in the top k / min(k, R), or / R with `denominator="relevant"`.

    scores: [..., N]. relevant: bool, broadcastable to scores. Returns float64 [...] (0-d for one
    ranking). `largest=False` looks at the other end (least-k). Raises UserError on NaN scores or
    when nothing is relevant.
    """
    ranked, count = _ranked_relevance(scores, relevant, largest)
    return np.asarray(ranked[..., :k].sum(-1) / _divisor(count, k, denominator))


def recall_curve(scores: np.ndarray, relevant: np.ndarray, most: int = 20) -> np.ndarray:
    """Mean Recall@k of rankings [Q, N] at k = 1, ..., most: [most]. UserError as `recall_at_k`."""
    ranked, count = _ranked_relevance(scores, relevant)
    hits = ranked[..., :most].cumsum(-1)
    return (hits / np.minimum(count[..., None], np.arange(1, hits.shape[-1] + 1))).mean(0)


def least_k_recall(
    scores: np.ndarray, relevant: np.ndarray, k: int = 10, denominator: str = "min"
) -> np.ndarray:
    """Recall@k among the k lowest scores (ties by index); arguments as in `recall_at_k`."""
    return recall_at_k(scores, relevant, k, denominator, largest=False)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """AP = 1/R sum_{r: item at rank r relevant} (hits in the top r) / r. Shapes and errors as in
    `recall_at_k`.
    """
    ranked, count = _ranked_relevance(scores, relevant)
    precision = np.cumsum(ranked, axis=-1) / np.arange(1, ranked.shape[-1] + 1)
    return np.asarray((precision * ranked).sum(-1) / count)


def chance_recall_at_k(
    num_items: int, num_relevant: int, k: int = 10, denominator: str = "min"
) -> float:
    """Expected Recall@k of a random order: hits ~ Hypergeometric(N, R, k), so E[hits] = k R / N (k
    at most N).
    """
    _check_counts(num_items, num_relevant)
    expected_hits = min(k, num_items) * num_relevant / num_items
    return float(expected_hits / _divisor(np.asarray(num_relevant), k, denominator))


def chance_average_precision(num_items: int, num_relevant: int) -> float:
    """Expected AP of a random order of N items with R relevant.

    At rank r an item is relevant with probability R/N, and then (r-1)(R-1)/(N-1) of the items above
    it are expected to be relevant too, so with the harmonic number H = sum_r 1/r

        E[AP] = 1/N sum_r (1 + (r-1)(R-1)/(N-1)) / r = (H + (R-1)/(N-1) (N - H)) / N
    """
    _check_counts(num_items, num_relevant)
    if num_items == 1:
        return 1.0
    harmonic = float((1.0 / np.arange(1, num_items + 1)).sum())
    return (harmonic + (num_relevant - 1) / (num_items - 1) * (num_items - harmonic)) / num_items


def _check_counts(num_items: int, num_relevant: int) -> None:
    if not 1 <= num_relevant <= num_items:
        raise UserError(
            f"{num_relevant} relevant of {num_items} images have no chance; give num_relevant "
            "from 1 "
            "to num_items"
        )


def resampled_means(values: np.ndarray, seed: int = 0, n: int = 10_000) -> np.ndarray:
    """[..., n]: means of `values` [..., Q] over n resamples of the Q; one seed, one set of them."""
    # How often each query is drawn is all a mean needs: [n, Q] counts in place of [n, Q] indices
    # and their gather.
    size = values.shape[-1]
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n)
    return values @ counts.T / size


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, n: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of `values` [Q] over queries (Efron
    1979).

    Draws Q queries with replacement n times; low and high are the (1-level)/2 and (1+level)/2
    quantiles of the n means. The same seed gives the same resamples for every method with the same
    Q. Raises UserError if a value is not finite or there is none.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise UserError(
            f"no bootstrap of shape {values.shape}; give values a finite number a query, and "
            "one at "
            "least"
        )
    if not 0 < level < 1 or n < 1:
        raise UserError(f"no bootstrap of level {level} and n {n}; give 0 < level < 1 and n >= 1")
    means = resampled_means(values, seed, n)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
