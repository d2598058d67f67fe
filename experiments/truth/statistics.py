"""Rankings against what retraining measured. dattri's metrics where it has them.

lds        Spearman correlation, over subsets, of sum_{i kept} score_i with J_c (dattri's `lds`)
partial    the same given n_c, the number of labelled pictures kept, and n, that of all: the
           correlation of the residuals of both ranks on the ranks of n_c and n. What counting
           explains is taken out, so that a ranker that counts labels has exactly 0, and one that
           gives every picture the same, or random positive numbers, learns nothing from the sizes
           of subsets
auc        that a picture of one group is ranked below one of another (as dattri's
           `mislabel_detection_auc`, which counts anew at every rank)
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from dattri.metric import lds as dattri_lds
from scipy.stats import ConstantInputWarning, rankdata

from concept_trak.errors import UserError, script_hint

TRAIN = f"train more (some six minutes each): {script_hint('truth/run_lds.sh', RETRAIN=1)}"


def lds(scores: np.ndarray, presences: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[C] Spearman correlations over S subsets.

    scores [C, N]. presences [S, C]. kept: bool [S, N]. A concept whose predictions are all equal
    has 0. UserError for fewer than three subsets.
    """
    if len(kept) < 3:
        raise UserError(f"{len(kept)} subsets give no correlation; {TRAIN}")
    nothing = scores.shape[1]  # a row without a score fills subsets up to one size
    most = int(kept.sum(1).max())
    rows = [np.flatnonzero(k) for k in kept]
    padded = np.stack([np.pad(r, (0, most - len(r)), constant_values=nothing) for r in rows])
    table = torch.from_numpy(np.pad(scores, ((0, 0), (0, 1))).T.astype(np.float64))
    truth = torch.from_numpy(np.asarray(presences, dtype=np.float64)), torch.from_numpy(padded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)  # NaN is its word for that
        found, _ = dattri_lds(table, truth)
    return np.nan_to_num(found.numpy())


def partial_lds(
    scores: np.ndarray, presences: np.ndarray, kept: np.ndarray, relevant: np.ndarray
) -> np.ndarray:
    """[C] partial Spearman correlations given the pictures kept, labelled ones (relevant: bool
    [C, N]) and all.
    """
    predicted, counts = kept @ scores.T.astype(np.float64), kept @ relevant.T.astype(np.float64)
    first, second, labelled = (_ranks(v) for v in (predicted, presences, counts))
    size = _ranks(kept.sum(1))
    columns = zip(first.T, second.T, labelled.T, strict=True)
    return np.array([_partial(x, y, np.stack([n, size], 1)) for x, y, n in columns])


def partial(x: np.ndarray, y: np.ndarray, *given: np.ndarray) -> float:
    """Partial Spearman correlation of x and y [S] given others [S]; 0 where they leave nothing."""
    first, second, *others = (_ranks(v) for v in (x, y, *given))
    return _partial(first, second, np.stack(others, 1))


def _partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Of centred ranks x and y [S], given others [S, G]."""
    left = [_residual(rank, given) for rank in (x, y)]
    norm = float(np.linalg.norm(left[0]) * np.linalg.norm(left[1]))
    return 0.0 if norm < 1e-9 * len(x) ** 2 else float(left[0] @ left[1] / norm)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks down the first axis. Sums in another order differ in their last bits, which
    must not break ties.
    """
    scale = np.abs(values).max(0)
    ranks = rankdata(np.round(values / np.where(scale, scale, 1.0), 9), axis=0)
    return ranks - ranks.mean(0)


def _residual(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    return values - given @ np.linalg.lstsq(given, values, rcond=None)[0]


def auc_below(scores: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """P(a picture of `low` is scored below one of `high`); both bool [N], scores [N]."""
    both = low | high
    # sorted as dattri does, so that it is the same where scores are equal
    order = torch.argsort(torch.from_numpy(-scores[both].astype(np.float64))).flip(0).numpy()
    found = low[both][order]
    true, false = (np.cumsum(hits) / hits.sum() for hits in (found, ~found))
    rates = (torch.from_numpy(np.concatenate([[0.0], rate])).float() for rate in (true, false))
    return float(torch.trapz(*rates))
