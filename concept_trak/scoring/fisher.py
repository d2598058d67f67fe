"""Damped inverse Fisher, applied to the queries: (K + lambda I)^-1 q with K = X^T X, X [N, k] the
rows of a store.

lambda = damping * trace(K) / k, i.e. dampings are relative to the mean eigenvalue. No centring and
no 1/N (Park et al. 2023, TRAK; Park et al. 2025, Concept-TRAK). All dampings come from one
factorisation or one Krylov run; everything is float64.

| method | what it does | for |
|---|---|---|
| primal | K = Q L Q^T, z = Q (L + lambda)^-1 Q^T q | k of a few thousand at most |
| dual | X X^T = U S U^T, z = (q - X^T U (S + lambda)^-1 U^T X q) / lambda | N < k, N as small |
| krylov_gram | block Lanczos, K in memory, cached beside the store | middling k |
| krylov_compact | the same, K in a quarter of that (`compact`), refined from the rows | large k |
| krylov_rows | block Lanczos, v -> X^T (X v) from disk, K never formed | K does not fit |
| (blocks) | primal in each block, K taken as block-diagonal | BLOCKS=module |

Blocks are those of K-FAC (Martens & Grosse 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from ..store.array_cache import read_cached
from ..store.store import Store
from .block_lanczos import gram_solutions, krylov_solutions
from .gram import (
    GRAM_TILE,
    damping_to_lambda,
    gram,
    gram_path,
    gram_rows,
    row_product,
    save_gram,
    trace,
)
from .gram_float32 import compact_bytes, compact_folder, compact_gram
from .memory import dual_bytes, primal_bytes, refuse_blocks, told
from .preconditioner import Budget, Preconditioner, checked_queries

METHODS = ("auto", "primal", "dual", "krylov", "krylov_gram", "krylov_compact", "krylov_rows")
# Largest side "auto" gives to a full eigendecomposition: seconds on one core, Krylov is faster
# beyond.
DIRECT_MAX = 2048
# Values of a store from which the blocks of its K are kept: a pass over fewer takes a second.
KEPT_FROM = 2**28


def fisher_for(widths: Sequence[int], budget: Budget) -> Preconditioner:
    """The Fisher of a projection: block-diagonal where its features are in several blocks.

    widths: features of each block (`projection.Projection`).
    """
    return BlockFisher(budget, tuple(widths)) if len(widths) > 1 else FullFisher(budget)


@dataclass(frozen=True)
class FullFisher:
    """All of K, by one of METHODS. UserError also for a method that does not fit in max_memory and
    a Krylov run that does not converge.
    """

    budget: Budget
    method: str = "auto"

    def solve(self, store: Store, queries: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """As `Preconditioner.solve`."""
        asked = checked_queries(store, queries, dampings, self.budget.device)
        method = choose_method(store, len(asked), self.budget.max_memory, self.method)
        solvers = {
            "primal": _primal,
            "dual": _dual,
            "krylov_gram": _krylov_gram,
            "krylov_compact": _krylov_compact,
            "krylov_rows": _krylov_rows,
        }
        return solvers[method](store, asked, dampings, self.budget).cpu().numpy()


@dataclass(frozen=True)
class BlockFisher:
    """K taken to be zero between blocks of features, each solved as primal with a lambda of its
    own. A block without any gradient has no say.

    widths: features of each block, side by side. UserError also for widths that are not the
    store's, and, when it is made, for blocks that do not fit in max_memory.
    """

    budget: Budget
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        refuse_blocks(self.widths, self.budget.max_memory)

    def solve(self, store: Store, queries: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """As `Preconditioner.solve`."""
        asked = checked_queries(store, queries, dampings, self.budget.device)
        self._check(store)
        kernels = self._kernels(store)
        damping_to_lambda(
            dampings, sum(k.trace() for k in kernels), store.dim
        )  # refuses a store of zeros
        solved = [
            _eigh_solve(kernel, part, dampings)
            if kernel.trace() > 0
            else part.new_zeros(len(dampings), *part.shape)
            for kernel, part in zip(kernels, asked.split(self.widths, 1), strict=True)
        ]
        return torch.cat(solved, 2).cpu().numpy()

    def _check(self, store: Store) -> None:
        if sum(self.widths) != store.dim:
            raise UserError(
                f"blocks of {sum(self.widths)} features do not fit {store.folder}; give widths "
                f"that add up to the {store.dim} of its rows"
            )

    def _kernels(self, store: Store) -> list[torch.Tensor]:
        """The diagonal blocks of K, float64: those kept beside a large store, else summed in one
        pass over the rows.
        """
        kept = self.budget.cache and store.num_rows * store.dim >= KEPT_FROM
        if not kept:
            return self._summed(store)
        sizes = [w * w for w in self.widths]
        path = store.folder / f"gram-blocks-{store.checksum[:16]}.npy"
        identity = {"store": store.checksum, "widths": list(self.widths)}
        flat = read_cached(path, identity, "<f8", (sum(sizes),))
        if flat is None:
            flat = torch.cat([kernel.flatten() for kernel in self._summed(store)]).cpu().numpy()
            save_gram(path, identity, torch.from_numpy(flat))
        parts = torch.from_numpy(flat).to(self.budget.device).split(sizes)
        return [part.view(w, w) for part, w in zip(parts, self.widths, strict=True)]

    def _summed(self, store: Store) -> list[torch.Tensor]:
        budget, like = self.budget, {"dtype": torch.float64, "device": self.budget.device}
        kernels = [torch.zeros(w, w, **like) for w in self.widths]
        for _, rows in store.tensor_blocks(gram_rows(store.dim, budget.max_memory), budget.device):
            for kernel, part in zip(kernels, rows.split(self.widths, 1), strict=True):
                part = part.double()
                kernel.addmm_(part.T, part)
        return kernels


def choose_method(store: Store, num_queries: int, max_memory: int, method: str = "auto") -> str:
    """The concrete method: dual or primal when the smaller side is at most DIRECT_MAX, else Krylov
    with the cheaper product.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; give method one of {', '.join(METHODS)}")
    rows, dim = store.num_rows, store.dim
    if method == "auto":
        if rows < dim and rows <= DIRECT_MAX and dual_bytes(rows, dim) <= max_memory:
            return "dual"
        method = "primal" if dim <= DIRECT_MAX and primal_bytes(dim) <= max_memory else "krylov"
    if method == "krylov":
        if 8 * dim * dim <= max_memory // 2:
            pays = gram_path(store).exists() or _gram_pays(dim, num_queries, 5e-11)
            return "krylov_gram" if pays else "krylov_rows"
        pays = compact_folder(store).exists() or _gram_pays(dim, num_queries, 1.2e-11)
        fits = compact_bytes(dim) <= 0.6 * max_memory
        return "krylov_compact" if fits and pays else "krylov_rows"
    needed = {"dual": dual_bytes(rows, dim), "primal": primal_bytes(dim)}.get(method, 0)
    if needed > max_memory:
        raise UserError(f"method {method} needs {told(needed)}; raise MAX_MEMORY or use krylov")
    return method


def _gram_pays(
    dim: int, num_queries: int, seconds: float, products: int = 100, runs: int = 4
) -> bool:
    """Is forming K cheaper than streaming X? Both cost N k times something, so N drops out.

    Seconds per value of X, measured on one 2020s server core: one multiply-add of the Gram matrix
    `seconds` (5e-11 in float64, 1.2e-11 in float32 and half of it), used by `runs` calls; reading
    and widening 1.5e-9 and multiplying twice 0.5e-9 a query, each for about `products` Lanczos
    iterations.
    """
    return dim * seconds / runs < products * (1.5e-9 + 0.5e-9 * num_queries)


# ---- (store, queries [Q, k], dampings [D], budget) -> [D, Q, k], one for each concrete method


def _primal(
    store: Store, queries: torch.Tensor, dampings: Sequence[float], budget: Budget
) -> torch.Tensor:
    return _eigh_solve(gram(store, budget).double(), queries, dampings)


def _eigh_solve(
    kernel: torch.Tensor, queries: torch.Tensor, dampings: Sequence[float]
) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(kernel)
    lambdas = damping_to_lambda(dampings, kernel.trace(), len(kernel), queries.device)
    scaled = (queries @ vectors) / (values.clamp_min(0) + lambdas[:, None, None])
    return scaled @ vectors.T


def _dual(
    store: Store, queries: torch.Tensor, dampings: Sequence[float], budget: Budget
) -> torch.Tensor:
    """float64 throughout: at small lambda, q minus its projection on the rows is a difference of
    nearly equal numbers.
    """
    rows = torch.cat([block for _, block in store.tensor_blocks(store.num_rows, queries.device)])
    tiles = rows.split(GRAM_TILE, 1)  # widened one after the other
    inner = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=queries.device)
    for tile in tiles:
        wide = tile.double()
        inner.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(inner)
    lambdas = damping_to_lambda(dampings, inner.trace(), store.dim, queries.device)[:, None, None]
    pairs = zip(queries.split(GRAM_TILE, 1), tiles, strict=True)
    along = sum(part @ tile.double().T for part, tile in pairs)  # X q: [Q, N]
    weights = ((along @ vectors) / (values.clamp_min(0) + lambdas)) @ vectors.T  # [D, Q, N]
    back = torch.cat([weights @ tile.double() for tile in tiles], dim=2)
    return (queries - back) / lambdas


def _krylov_gram(
    store: Store, queries: torch.Tensor, dampings: Sequence[float], budget: Budget
) -> torch.Tensor:
    kernel = gram(store, budget)
    lambdas = damping_to_lambda(
        dampings, kernel.diagonal().double().sum(), store.dim, queries.device
    )
    return gram_solutions(kernel, queries, lambdas, budget.max_memory)


def _krylov_compact(
    store: Store, queries: torch.Tensor, dampings: Sequence[float], budget: Budget
) -> torch.Tensor:
    kernel = compact_gram(store, budget)
    lambdas = damping_to_lambda(dampings, trace(store, budget.device), store.dim, queries.device)
    left = budget.max_memory - compact_bytes(store.dim)
    return krylov_solutions(kernel.product, queries, lambdas, left, exact=row_product(store))


def _krylov_rows(
    store: Store, queries: torch.Tensor, dampings: Sequence[float], budget: Budget
) -> torch.Tensor:
    lambdas = damping_to_lambda(dampings, trace(store, budget.device), store.dim, queries.device)
    return krylov_solutions(row_product(store), queries, lambdas, budget.max_memory)
