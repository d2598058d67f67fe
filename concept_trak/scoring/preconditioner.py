"""What turns query gradients into directions to score along: an approximate inverse Fisher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..errors import UserError
from ..store.store import Store


@dataclass(frozen=True)
class Budget:
    """What solving and scoring may use.

    max_memory: bytes to hold at a time. cache: keep the Gram matrix beside the store, named by the
    store's checksum.
    """

    max_memory: int = 2**30
    device: str = "cpu"
    cache: bool = True


class Preconditioner(Protocol):
    """(F + lambda I)^-1 for one approximation F of the Fisher, at all dampings at once."""

    budget: Budget

    def solve(self, store: Store, queries: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """(F + lambda_d I)^-1 q: [D, Q, k] float64.

        queries: [Q, k]. dampings: [D], relative to the mean eigenvalue of F. Raises UserError as
        `checked_queries`, and for what the method itself cannot do.
        """


def checked_queries(
    store: Store, queries: np.ndarray, dampings: Sequence[float], device: str
) -> torch.Tensor:
    """The queries [Q, k] as float64 on the device.

    Raises UserError for another width than the store's, a NaN or infinite value and a damping that
    is not positive.
    """
    asked = torch.as_tensor(np.asarray(queries, dtype=np.float64), device=device)
    if asked.ndim != 2 or asked.shape[1] != store.dim:
        raise UserError(
            f"the query gradient has shape {list(asked.shape)}; give queries of {store.dim} "
            "values, "
            f"as {store.folder} holds them"
        )
    if not asked.isfinite().all():
        raise UserError(
            "the query gradient is NaN or infinite; make it again with "
            "FORCE_RECOMPUTE_CONCEPT_GRAD=1"
        )
    if min(dampings) <= 0:
        raise UserError(f"a damping of {min(dampings)} divides by nothing; give dampings above 0")
    return asked
