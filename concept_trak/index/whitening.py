"""The space in which rows are compressed: whitened by the damped curvature, then rotated.

    y = R P S V^T g         for rows g [k]
    v = R P S^-1 V^T u      for solved queries u = (K + lambda)^-1 q

with K = V L V^T (in each block), S a scaling of the coordinates, P what keeps `dim` of them, R a
rotation. <y, v> is the score <g, u> but for the coordinates left out. A code is of y less the mean
of all y, and wrong by an e in every direction alike with |e| proportional to its length; in the
score that is |e| |v| / sqrt(dim). So S should make E|y - mean|^2 E|v|^2 = sum(s^2 c) sum(a / s^2)
least, c being the variance of the rows in a coordinate and a the mean square of the solved queries:
by Cauchy and Schwarz s = (a / c)^1/4. For queries that are distributed as rows are,
a = l / (l + lambda)^2; without a mean c = l, and s is (l + lambda)^-1/2, half of the inverse
curvature on either side. A direction that all rows share, on the other hand, is given to the rows:
there queries are long, and c is small. The coordinates that are left out have the least
sqrt(a c), their share of that sum.

R spreads every row over all coordinates, as one-bit codes need (Gao & Long 2024, RaBitQ): signs, a
permutation, and the Kronecker product of two random rotations, which costs k^1.5 instead of k^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ..atomic_io import write_bytes
from ..errors import UserError
from ..store.store import Store
from ..validated_io import read_safetensors

SAMPLE_ROWS = 16_384  # rows from which the curvature is estimated, at most
SAMPLE_BYTES = 2**29  # and what they may take as float32
EIGEN_MAX = 8192  # widest block whose eigenvectors are taken; beyond, its diagonal stands for it
LEAST_VARIANCE = 1e-6  # of a coordinate, over the mean of its block: a sample may have none
BIT_PADDING = 64  # coordinates, so that a code with its two numbers takes 1 bit a value of the row
SEED = 0


@dataclass(frozen=True)
class Whitening:
    """The map of the module's docstring, in float32.

    vectors: eigenvectors [w, w] in columns, one a block; [0, 0] where the block keeps its own
    coordinates. kept: int64 [dim], the coordinates in the order of the rotation. scale: [dim],
    S with the signs. left, right: the rotations [a, a] and [b, b], a b = dim.
    mean: [dim], of all y.
    """

    vectors: tuple[torch.Tensor, ...]
    widths: tuple[int, ...]
    kept: torch.Tensor
    scale: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor

    @property
    def dim(self) -> int:
        """Values of a whitened row."""
        return len(self.kept)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """y - mean [n, dim] of rows [n, k]."""
        return self._rotated(rows, self.scale) - self.mean

    def queries(self, solved: torch.Tensor) -> torch.Tensor:
        """v [n, dim] of solved queries [n, k]."""
        return self._rotated(solved, 1 / self.scale)

    def _rotated(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        parts = values.float().split(self.widths, 1)
        pairs = zip(parts, self.vectors, strict=True)
        along = torch.cat([part @ v if len(v) else part for part, v in pairs], 1)
        grid = (along[:, self.kept] * scale).view(-1, len(self.left), len(self.right))
        return (self.left @ (grid @ self.right)).flatten(1)

    def save(self, path: Path) -> None:
        """Write it as safetensors. UserError for a full disk."""
        named = {f"vectors.{i}": v for i, v in enumerate(self.vectors)}
        named |= {name: getattr(self, name) for name in ("kept", "scale", "left", "right", "mean")}
        named = {name: value.contiguous() for name, value in named.items()}
        write_bytes(path, save(named, {"widths": json.dumps(self.widths)}))

    @classmethod
    def load(cls, path: Path, widths: Sequence[int], *, mend: str) -> Whitening:
        """What `save` wrote. UserError, ended by `mend`, for a file that is not that."""
        named = read_safetensors(path, mend)
        if {k: (v.dtype, v.shape) for k, v in named.items()} != _forms(widths, named.get("kept")):
            raise UserError(f"{path} does not hold the space of blocks of {list(widths)}; {mend}")
        vectors = tuple(named.pop(f"vectors.{i}") for i in range(len(widths)))
        return cls(vectors, tuple(widths), **named)


def _forms(
    widths: Sequence[int], kept: torch.Tensor | None
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """{name: (dtype, shape)} of what `Whitening.save` writes; {} where `kept` cannot be that of
    these blocks.
    """
    if kept is None or kept.dtype != torch.int64 or kept.ndim != 1 or not len(kept):
        return {}
    if kept.min() < 0 or kept.max() >= sum(widths):
        return {}
    dim, (a, b) = len(kept), factors(len(kept))
    shapes = {"scale": (dim,), "left": (a, a), "right": (b, b), "mean": (dim,)}
    for i, width in enumerate(widths):
        shapes[f"vectors.{i}"] = (width, width) if width <= EIGEN_MAX else (0, 0)
    forms = {name: (torch.float32, torch.Size(shape)) for name, shape in shapes.items()}
    return forms | {"kept": (kept.dtype, kept.shape)}


def whitening(store: Store, widths: Sequence[int], damping: float, share: float = 1.0) -> Whitening:
    """Of a store whose features stand in blocks of these widths, at one damping (in mean
    eigenvalues of a block), from a sample of the rows of its finished shards. share: of the
    coordinates that 1 bit each allows, see `kept_dim`.

    UserError for widths that are not the store's.
    """
    if sum(widths) != store.dim:
        raise UserError(
            f"blocks of {sum(widths)} features do not fit {store.folder}, whose rows have "
            f"{store.dim}; give widths that make up that"
        )
    sample = sampled_rows(store)
    vectors, scales, shares = [], [], []
    for part in sample.split(list(widths), 1):
        square, variance, basis = _moments(part)
        vectors.append(basis.float())
        damped = square + damping * square.mean()
        if not square.any():  # a block without any gradient has no say
            damped = torch.ones_like(square)
        variance = variance.clamp_min(LEAST_VARIANCE * variance.mean()).clamp_min(1e-30)
        asked = square.clamp_min(LEAST_VARIANCE * square.mean()) / damped.square()
        scales.append((asked / variance).clamp_min(1e-30) ** 0.25)
        shares.append((asked * variance).sqrt())
    generator = torch.Generator().manual_seed(SEED)
    dim = kept_dim(store.dim, share)
    kept = torch.cat(shares).argsort(descending=True, stable=True)[:dim]
    kept = kept[torch.randperm(dim, generator=generator)]
    signs = 2.0 * torch.randint(0, 2, (dim,), generator=generator) - 1
    a, b = factors(dim)
    left, right = _rotation(a, generator), _rotation(b, generator)
    scale = (torch.cat(scales)[kept] * signs).float()
    space = Whitening(tuple(vectors), tuple(widths), kept, scale, left, right, torch.zeros(dim))
    return replace(space, mean=space.rows(sample.mean(0, keepdim=True))[0])


def kept_dim(dim: int, share: float = 1.0) -> int:
    """Coordinates kept of `dim`: a share of them less LEFT_OUT, in multiples of that, for the bits
    and the rotation; all of a few.
    """
    if dim < 4 * BIT_PADDING:
        return dim
    return max(1, int(share * (dim - BIT_PADDING)) // BIT_PADDING) * BIT_PADDING


def factors(dim: int) -> tuple[int, int]:
    """(a, b) with a b = dim and a <= b, as near to each other as can be."""
    a = next(a for a in range(math.isqrt(dim), 0, -1) if dim % a == 0)
    return a, dim // a


def sampled_rows(store: Store) -> torch.Tensor:
    """float32 [n, k]: rows at even distances over the finished shards, n as the constants say."""
    ranges = [store.shard_range(i) for i in range(store.num_split) if store.finished(i)]
    there = np.concatenate([np.arange(*bounds) for bounds in ranges])
    count = min(len(there), SAMPLE_ROWS, max(1, SAMPLE_BYTES // (4 * store.dim)))
    return store.tensor_rows(there[np.linspace(0, len(there) - 1, count).astype(np.int64)])


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean squares [w], variances [w], V [w, w]) of rows [n, w] along the eigenvectors of the mean
    of g g^T; of a wide block, along its own features, with V [0, 0].
    """
    width, count = rows.shape[1], len(rows)
    if width > EIGEN_MAX:
        wide = rows.double()
        return wide.square().mean(0), wide.var(0, correction=0), torch.zeros(0, 0)
    kernel = torch.zeros(width, width, dtype=torch.float64)
    for part in rows.split(1024):
        wide = part.double()
        kernel.addmm_(wide.T, wide)
    values, basis = torch.linalg.eigh(kernel / count)
    values = values.clamp_min(0)
    along = rows.double().mean(0) @ basis
    return values, (values - along.square()).clamp_min(0), basis


def _rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """[size, size], a random rotation."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis, upper = torch.linalg.qr(normal)
    return (basis * upper.diagonal().sign()).float()
