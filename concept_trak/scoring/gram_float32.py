"""K = X^T X of a store where float64 does not fit: its head exactly, the rest as half a float32
matrix. 2 k^2 bytes in place of 8 k^2.

With any orthonormal rows U [r, k], P = I - U^T U and W = U K,

    K = P K P + U^T W + W^T U - U^T (W U^T) U

is an identity. U spans the head of the spectrum (subspace iteration, Halko, Martinsson & Tropp
2011), U and W are float64, and the remainder P K P is the Gram matrix of rows without their head:
rounding it to float32 leaves an error of 1e-7 of the remainder's norm, not of K's, which is
thousands of times as large. What error is left, `krylov.krylov_solutions` takes out by refinement.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..store.array_cache import read_cached
from ..store.store import Store
from .gram import GRAM_ROWS, row_product, try_cache
from .preconditioner import Budget

HEAD = 128  # r
SWEEPS = 2  # of subspace iteration, each a pass over the rows, as is W
BAND = 2048  # rows of K in one file


@dataclass(frozen=True)
class Float32Gram:
    """head: U [r, k]. images: W [r, k], both float64. bands: float32, band b holds rows
    [b BAND, (b + 1) BAND) of P K P from its first row's column on.
    """

    head: torch.Tensor
    images: torch.Tensor
    bands: list[torch.Tensor]

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """v -> K v for rows v [n, k] in float64, the remainder's part rounded to float32."""
        along, back = vectors @ self.head.T, vectors @ self.images.T
        back -= along @ (self.images @ self.head.T)
        total = along @ self.images + back @ self.head
        single = vectors.float()
        rest, top = torch.zeros_like(single), 0
        for band in self.bands:
            bottom = top + len(band)
            rest[:, top:] += single[:, top:bottom] @ band
            rest[:, top:bottom] += single[:, bottom:] @ band[:, len(band) :].T
            top = bottom
        return total + rest


def compact_bytes(dim: int) -> int:
    """What a `Float32Gram` takes."""
    return 2 * dim * dim + 2 * BAND * dim + 16 * HEAD * dim


def compact_folder(store: Store) -> Path:
    """Where it is kept: the name carries the store's checksum."""
    return store.folder / f"compact-gram-{store.checksum[:16]}"


def compact_gram(store: Store, budget: Budget) -> Float32Gram:
    """K of a store, from the files beside it as far as they are there; bands that a killed run
    finished are not made again. UserError for one that does not fit in max_memory.
    """
    if (needed := compact_bytes(store.dim)) > 0.6 * budget.max_memory:
        raise UserError(
            f"K takes {needed / 2**30:.1f} GiB in its compact form; raise MAX_MEMORY or use "
            "krylov_rows"
        )
    files = _Files(store, budget)
    rank, dim = min(HEAD, store.dim, store.num_rows), store.dim
    head = files.read("head", {}, "<f8", (2, rank, dim))
    if head is None:
        head = files.write("head", {}, _head(store, budget.device).cpu().numpy())
    made_from = {"head": hashlib.sha256(head.tobytes()).hexdigest()}
    head, images = torch.from_numpy(head).to(budget.device)
    edges = [(top, min(top + BAND, dim)) for top in range(0, dim, BAND)]
    bands = {
        (top, end): files.read(f"band-{top}", made_from, "<f4", (end - top, dim - top))
        for top, end in edges
    }
    missing = [edge for edge in edges if bands[edge] is None]
    for group in _groups(missing, store.dim, budget.max_memory // 4):
        for edge, band in zip(group, _bands(store, head, group, budget.device), strict=True):
            bands[edge] = files.write(f"band-{edge[0]}", made_from, band.cpu().numpy())
    whole = [torch.from_numpy(bands[edge]).to(budget.device) for edge in edges]
    return Float32Gram(head, images, whole)


class _Files:
    """The arrays beside a store. One that cannot be written costs time, not the result."""

    def __init__(self, store: Store, budget: Budget) -> None:
        self.folder, self.cache = compact_folder(store), budget.cache
        of_stores = self.folder.parent.glob("compact-gram-*")
        self.others = [old for old in of_stores if old != self.folder]
        self.identity = {"store": store.checksum, "head": HEAD, "band": BAND, "sweeps": SWEEPS}

    def read(
        self, name: str, made_from: dict, dtype: str, shape: tuple[int, ...]
    ) -> np.ndarray | None:
        """An array that was kept, of exactly this."""
        identity = self.identity | {"made_from": made_from}
        return read_cached(self._path(name), identity, dtype, shape) if self.cache else None

    def write(self, name: str, made_from: dict, array: np.ndarray) -> np.ndarray:
        """Keep an array, and give it back."""
        if self.cache:
            identity = self.identity | {"made_from": made_from}
            self.cache = try_cache(self._path(name), identity, array, self.others)
            self.others = []
        return array

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def _groups(edges: list[tuple[int, int]], dim: int, max_bytes: int) -> list[list[tuple[int, int]]]:
    """Bands that are summed in one pass over the rows."""
    groups: list[list[tuple[int, int]]] = []
    size = 0
    for top, bottom in edges:
        own = 4 * (bottom - top) * (dim - top)
        if not groups or size + own > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append((top, bottom))
        size += own
    return groups


def _head(store: Store, device: str) -> torch.Tensor:
    """U and W, [2, r, k] float64."""
    rank, product = min(HEAD, store.dim, store.num_rows), row_product(store)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(rank, store.dim, generator=generator, dtype=torch.float64).to(device)
    for sweep in tqdm(range(SWEEPS + 1), desc="head of K", unit="pass"):
        rows = torch.linalg.qr(rows.T)[0].T.contiguous()
        images = product(rows)
        rows = images if sweep < SWEEPS else rows
    return torch.stack([rows, images])


def _bands(
    store: Store, head: torch.Tensor, edges: list[tuple[int, int]], device: str
) -> list[torch.Tensor]:
    """Bands of P K P [bottom - top, k - top], float32, by one pass over the rows."""
    bands = [torch.zeros(b - t, store.dim - t, device=device) for t, b in edges]
    bar = tqdm(total=store.num_rows, desc=f"K, from column {edges[0][0]}", unit="row")
    with bar:
        for _, block in store.tensor_blocks(GRAM_ROWS, device):
            rest = torch.cat([_without(head, part) for part in block.split(GRAM_ROWS // 8)])
            for band, (top, bottom) in zip(bands, edges, strict=True):
                band.addmm_(rest[:, top:bottom].T, rest[:, top:])
            bar.update(len(block))
    return bands


def _without(head: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x P of rows x [n, k], float32."""
    wide = rows.double()
    return (wide - (wide @ head.T) @ head).float()
