"""Attribution scores of all rows from preconditioned queries.

    score[d, q, i] = w_i x_i . (K + lambda_d I)^-1 q

with x_i row i of the store and w_i its weight (DAS: the residual; else 1). A high score means that
removing sample i would weaken the query's concept (Park et al. 2023, TRAK; Lin et al. 2025, DAS).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import UserError
from ..store.store import Store
from .memory import refuse_scores
from .preconditioner import Preconditioner

# Values of X widened at a time: 4 MB of float64, which two threads take a third faster than 2 MB.
BLOCK_VALUES = 2**19


def precondition_and_score(
    store: Store,
    queries: np.ndarray,
    dampings: Sequence[float],
    preconditioner: Preconditioner,
    row_weight: np.ndarray | None = None,
) -> np.ndarray:
    """Scores of all rows for query gradients [Q, k] at all dampings [D]: [D, Q, N] float32.

    Uses the preconditioner's budget. Raises UserError as `Preconditioner.solve` and `scores`.
    """
    budget, solved = preconditioner.budget, preconditioner.solve(store, queries, dampings)
    return scores(store, solved, row_weight, budget.max_memory, budget.device)


def scores(
    store: Store,
    preconditioned: np.ndarray,
    row_weight: np.ndarray | None = None,
    max_memory: int = 2**30,
    device: str = "cpu",
) -> np.ndarray:
    """Scores of all rows in one pass over the store: [D, Q, N] float32, summed in float64.

    preconditioned: [D, Q, k], from a `Preconditioner`. row_weight: [N] or None. max_memory: bytes
    the result may take; blocks of rows add some MB. Raises UserError for another width, a
    row_weight of another length or not finite, or a result larger than max_memory.
    """
    dampings, queries, dim = np.shape(preconditioned)
    if dim != store.dim:
        raise UserError(
            f"queries of {dim} values do not fit {store.folder}; give preconditioned ones of "
            f"{store.dim}"
        )
    out = allocate_scores(dampings * queries, store, max_memory)
    left = np.asarray(preconditioned, dtype=np.float64).reshape(-1, dim)
    left = torch.from_numpy(left).to(device)
    # many queries do not stay in cache either: larger blocks read them less often
    rows = max(1, BLOCK_VALUES // dim) * min(max(1, len(left) // 16), 16)
    for start, block in store.tensor_blocks(rows, device):
        out[:, start : start + len(block)] = (left @ block.double().T).cpu().numpy()
    if row_weight is not None:
        out *= _checked_weight(row_weight, store)
    return out.reshape(dampings, queries, store.num_rows)


def allocate_scores(count: int, store: Store, max_memory: int) -> np.ndarray:
    """[count, N] float32 to fill with scores. UserError for more than max_memory bytes."""
    refuse_scores(count, store.num_rows, max_memory)
    return np.empty((count, store.num_rows), np.float32)


def _checked_weight(row_weight: np.ndarray, store: Store) -> np.ndarray:
    row_weight = np.asarray(row_weight, dtype=np.float32)
    if row_weight.shape != (store.num_rows,):
        raise UserError(
            f"row weights have shape {list(row_weight.shape)}; give row_weight a value for each of "
            f"the {store.num_rows} rows of {store.folder}"
        )
    if (bad := np.flatnonzero(~np.isfinite(row_weight))).size:
        raise UserError(
            f"the row weight of sample {int(bad[0])} is NaN or infinite; give a finite row_weight"
        )
    return row_weight
