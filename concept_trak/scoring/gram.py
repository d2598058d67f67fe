"""K = X^T X of a store's rows X [N, k]: its trace, its products with vectors, and K itself [k, k],
cached beside the store.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.linalg.blas import dsymv

from ..atomic_io import disk_errors
from ..errors import UserError
from ..store.array_cache import read_cached, write_cached
from ..store.store import Store
from .preconditioner import Budget

# Values of X widened at a time in a product: 2 MB of float64 stay in cache (1.5 times faster than
# 16 MB).
STREAM_VALUES = 2**18
# Vectors up to which one symv each is faster than one matrix product for all (k = 4096, two cores).
SYMV_MAX = 3
GRAM_ROWS, GRAM_TILE = 2048, 1024  # rows and columns of X in one matrix product of the Gram matrix

Product = Callable[[torch.Tensor], torch.Tensor]  # [n, k] -> [n, k], each row v -> K v


def damping_to_lambda(
    dampings: Sequence[float], trace: float | torch.Tensor, dim: int, device: str = "cpu"
) -> torch.Tensor:
    """lambda = damping * trace(K) / k: [D] float64. UserError for a store of zeros."""
    if not trace > 0:
        raise UserError(
            "every row of the store is zero, so nothing can be attributed; set GRAD_DIR to another"
        )
    return torch.tensor(dampings, dtype=torch.float64, device=device) * (float(trace) / dim)


def trace(store: Store, device: str = "cpu") -> float:
    """trace(K) = sum of the squares of all rows, one pass."""
    blocks = store.tensor_blocks(stream_rows(store.dim), device)
    return sum(block.double().square().sum().item() for _, block in blocks)


def stream_rows(dim: int) -> int:
    """Rows of X to widen at a time."""
    return max(1, STREAM_VALUES // dim)


# ---- products


def row_product(store: Store) -> Product:
    """v -> X^T (X v) in float64 for v [n, k], streaming the store once a call."""

    def product(vectors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(vectors)
        # many vectors do not stay in cache either: larger blocks read them less often
        rows = stream_rows(store.dim) * min(max(1, len(vectors) // 8), 32)
        for _, block in store.tensor_blocks(rows, vectors.device):
            block = block.double()
            total.addmm_(vectors @ block.T, block)
        return total

    return product


def gram_product(kernel: torch.Tensor) -> Product:
    """v -> K v for rows v [n, k] and K [k, k], float64."""
    if kernel.device.type == "cpu":
        return lambda vectors: _symmetric_product(kernel.numpy(), vectors.numpy())
    return lambda vectors: vectors @ kernel


def _symmetric_product(kernel: np.ndarray, vectors: np.ndarray) -> torch.Tensor:
    """vectors @ kernel. A few vectors cost the time of reading K from memory, and symv reads half
    of it; torch has no symv.
    """
    if len(vectors) > SYMV_MAX:
        return torch.from_numpy(vectors @ kernel)
    vectors = np.ascontiguousarray(vectors)
    transpose = kernel.T  # Fortran-ordered, so it is not copied
    return torch.from_numpy(np.stack([dsymv(1.0, transpose, vector) for vector in vectors]))


# ---- the matrix


def gram_path(store: Store) -> Path:
    """Where K is cached: the name carries the store's checksum, so a changed store never meets an
    old K.
    """
    return store.folder / f"gram-float64-{store.checksum[:16]}.npy"


def gram(store: Store, budget: Budget) -> torch.Tensor:
    """K = X^T X [k, k] float64, read from the cache if it is there. UserError if it takes more than
    0.8 of max_memory.
    """
    values, memory = store.dim**2, budget.max_memory
    if 8 * values > 0.8 * memory:
        raise UserError(
            f"K takes {8 * values / 2**30:.1f} GiB; raise MAX_MEMORY or use krylov_compact"
        )
    path, identity = gram_path(store), {"store": store.checksum, "dtype": "torch.float64"}
    known = read_cached(path, identity, "<f8", (store.dim,) * 2) if budget.cache else None
    if known is not None:
        return torch.from_numpy(known).to(budget.device)
    kernel = compute_gram(store, memory, budget.device)
    if budget.cache:
        save_gram(path, identity, kernel)
    return kernel


def gram_rows(dim: int, max_memory: int) -> int:
    """Rows of X in one product of a Gram matrix."""
    return max(1, min(GRAM_ROWS, max_memory // 32 // (8 * dim)))


def compute_gram(store: Store, max_memory: int, device: str = "cpu") -> torch.Tensor:
    """K summed over the blocks of X in float64; only the upper half is computed."""
    dim = store.dim
    kernel = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    strips = [(s, min(s + GRAM_TILE, dim)) for s in range(0, dim, GRAM_TILE)]
    for _, block in store.tensor_blocks(gram_rows(dim, max_memory), device):
        block = block.double()
        for start, stop in strips:
            kernel[start:stop, start:].addmm_(block[:, start:stop].T, block[:, start:])
    for start, stop in strips:  # columns of the lower half
        kernel[stop:, start:stop] = kernel[start:stop, stop:].T
    return kernel


def save_gram(path: Path, identity: dict, kernel: torch.Tensor) -> None:
    """Keep K in the place of any other store's."""
    others = [old for old in path.parent.glob("gram-*") if old.stem != path.stem]
    try_cache(path, identity, kernel.cpu().numpy(), others)


def try_cache(path: Path, identity: dict, array: np.ndarray, others: Iterable[Path]) -> bool:
    """Keep an array once `others`, files or folders, are removed. One that cannot be written costs
    time, not the result: False, and a warning.
    """
    try:
        with disk_errors(path):
            for old in others:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_cached(path, identity, array)
    except UserError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        warnings.warn(f"the Gram matrix could not be cached at {path}: {reason}", stacklevel=2)
        return False
    return True
