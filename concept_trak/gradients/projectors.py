"""The protocol of a projection, and the kinds that work on a whole parameter vector."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..errors import UserError
from .cuda_mask import generator_name, gpu_mask
from .sample_grads import DenseGrad, OuterProductGrad

# Columns drawn from one seed: the block size of dattri and trak, part of what their seed means.
COLUMN_BLOCK = 100
# A dense R up to this size is kept; a larger one is redrawn at every call.
DENSE_CACHE_BYTES = 2**30
DENSE_MAX_ENTRIES = 2**34  # beyond this a dense R takes minutes to draw for every batch
# Coordinates signed and scattered at a time: 32 samples of them stay in cache.
SCATTER_COORDINATES = 2**14
CPU_GENERATOR = "torch mt19937 (CPU)"
GRASS_MULTIPLIER = 4  # width of the intermediate mask in multiples of k, as in dattri


@dataclass(frozen=True)
class ProjectionSpec:
    """What decides R, and where it is: P = input_dim, k = proj_dim.

    mask: of random_mask, "portable" or a key of cuda_mask.GPUS. nonzeros: of sjlt and grass,
    features each coordinate is added to; more lowers the variance at proportional cost.
    """

    kind: str
    input_dim: int
    proj_dim: int
    seed: int
    device: torch.device
    mask: str = "portable"
    nonzeros: int = 1


class Projection:
    """The P x k matrix R, never materialised whole. Attributes: kind, input_dim (P), proj_dim (k),
    seed, device, and

    widths: features of each of the blocks in which gradients are unit-normed and preconditioned;
    here one block, of all k.

    A batch's gradient comes tensor by tensor: `add` each to one `out`, then `finish(out)` once.
    """

    def __init__(self, spec: ProjectionSpec) -> None:
        self.spec, self.kind, self.seed, self.device = spec, spec.kind, spec.seed, spec.device
        self.input_dim, self.proj_dim = spec.input_dim, spec.proj_dim
        self.widths = [spec.proj_dim]

    def block_of(self, offset: int) -> int:
        """Number of the block that the tensor with this first coordinate is in."""
        return 0

    @cached_property
    def block_of_feature(self) -> torch.Tensor:
        """[k] numbers of the blocks that the features are in, on the device."""
        widths = torch.tensor(self.widths)
        return torch.arange(len(widths)).repeat_interleave(widths).to(self.device)

    def add(self, out: torch.Tensor, grad: OuterProductGrad | DenseGrad) -> None:
        """Add a tensor's share, given as a per-sample gradient (`vjp`); kinds that need not form it
        do not.
        """
        self.accumulate(out, grad.dense(), grad.offset)

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        """Add one parameter tensor's share: ``out += grads @ R[offset : offset + n]``, in place.

        out: [B, k] float32. grads: [B, n] of any floating dtype, the flattened tensor whose first
        coordinate is `offset`.
        """
        raise NotImplementedError

    def finish(self, out: torch.Tensor) -> None:
        """Bring `out` up to date, once all shares of its batch are added.

        Nothing to do for kinds that project at once; one that needs the whole gradient only keeps
        the shares until this call.
        """

    def project(self, grads: torch.Tensor) -> torch.Tensor:
        """grads [B, P] -> [B, k] float32."""
        if grads.shape[1] != self.input_dim:
            raise UserError(
                f"projection {self.kind} was made for other parameters than these rows of "
                f"{grads.shape[1]}; give grads of {self.input_dim} coordinates"
            )
        out = torch.zeros(len(grads), self.proj_dim, dtype=torch.float32, device=grads.device)
        self.accumulate(out, grads, 0)
        self.finish(out)
        return out

    def describe(self) -> dict:
        """JSON-ready identity of R for a store's manifest."""
        names = ("kind", "input_dim", "proj_dim", "seed")
        return {name: getattr(self, name) for name in names}


class Identity(Projection):
    """Keeps all P coordinates."""

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        out[:, offset : offset + grads.shape[1]] += grads


class RandomMask(Projection):
    """Keeps k fixed coordinates, unscaled. `indices`: sorted LongTensor [k]."""

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__(spec)
        if spec.mask == "portable":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(self.input_dim, generator=generator)[: self.proj_dim]
            self._cpu_indices = drawn.sort().values
        else:
            kept = gpu_mask(spec.mask, self.input_dim, self.proj_dim, self.seed)
            self._cpu_indices = torch.from_numpy(kept.copy())
        self.indices = self._cpu_indices.to(self.device)

    def within(self, offset: int, length: int) -> tuple[int, int]:
        """(first, last + 1) feature whose coordinate lies in [offset, offset + length)."""
        bounds = torch.tensor([offset, offset + length])
        start, stop = torch.searchsorted(self._cpu_indices, bounds).tolist()
        return start, stop

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        start, stop = self.within(offset, grads.shape[1])
        out[:, start:stop] += grads.index_select(1, self.indices[start:stop] - offset)

    def add(self, out: torch.Tensor, grad: OuterProductGrad | DenseGrad) -> None:
        """Reads the kept entries only."""
        start, stop = self.within(grad.offset, grad.numel)
        out[:, start:stop] += grad.gather(self.indices[start:stop] - grad.offset)

    def describe(self) -> dict:
        digest = hashlib.sha256(self._cpu_indices.numpy().astype("<i8").tobytes()).hexdigest()
        portable = self.spec.mask == "portable"
        generator = CPU_GENERATOR if portable else generator_name(self.spec.mask, self.input_dim)
        return {**super().describe(), "generator": generator, "indices_sha256": digest}


def refuse_large_dense(spec: ProjectionSpec) -> None:
    """UserError for a dense R that would have to be drawn for minutes."""
    if spec.input_dim * spec.proj_dim > DENSE_MAX_ENTRIES:
        raise UserError(
            f"a dense {spec.kind} projection of {spec.input_dim} x {spec.proj_dim} is too large to "
            "draw for every batch; set PROJ_TYPE to sjlt, grass or random_mask, or lower PROJ_DIM"
        )


class Dense(Projection):
    """Gaussian or Rademacher entries, drawn [P, 100] at a time with dattri's and trak's seeds (peak
    400 P bytes, as there).

    Gradients of one tensor at a time need rows of R, and the generators cannot skip ahead, so an R
    above `DENSE_CACHE_BYTES` is redrawn for every call: prefer `sjlt` or `random_mask` for anything
    but a small network.
    """

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__(spec)
        refuse_large_dense(spec)
        self._rademacher = self.kind.endswith("rademacher")
        self._scale = 1.0 if self.kind.startswith("trak_") else self.proj_dim**-0.5
        self._kept: list[tuple[int, torch.Tensor]] | None = None

    def _column_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first column, block [P, <=100]), unscaled."""
        width = min(COLUMN_BLOCK, self.proj_dim)
        for block, start in enumerate(range(0, self.proj_dim, width)):
            generator = torch.Generator().manual_seed(self.seed + 1000 * block)
            matrix = torch.empty(self.input_dim, width)
            if self._rademacher:
                matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            else:
                matrix.normal_(generator=generator)
            # The last block is drawn at full width because the generator fills row by row.
            yield start, matrix[:, : self.proj_dim - start].to(self.device)

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        blocks = self._kept or self._column_blocks()
        if self._kept is None and 4 * self.input_dim * self.proj_dim <= DENSE_CACHE_BYTES:
            blocks = self._kept = list(blocks)
        grads = grads.float()
        for start, matrix in blocks:
            rows = matrix[offset : offset + grads.shape[1]]
            out[:, start : start + rows.shape[1]].add_(grads @ rows, alpha=self._scale)

    def describe(self) -> dict:
        drawn = {"generator": CPU_GENERATOR, "column_block": COLUMN_BLOCK, "scale": self._scale}
        return {**super().describe(), **drawn}


class SparseJL(Projection):
    """Sparse Johnson-Lindenstrauss: a coordinate adds +-1/sqrt(c) of itself to c features, one in
    each of c ranges of features.

    Bucket and sign of coordinate p come from word p of the Philox4x64 stream keyed (seed, range), a
    counter-based generator: they do not depend on how the gradient is cut into tensors, on the
    batch or on the device. Hashes are kept: 4 c P bytes.
    """

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__(spec)
        self.nonzeros = spec.nonzeros
        if not 1 <= self.nonzeros <= self.proj_dim:
            raise UserError(
                f"sjlt cannot put {self.nonzeros} values a coordinate into {self.proj_dim} "
                "features; "
                f"give nonzeros between 1 and {self.proj_dim}, or raise PROJ_DIM"
            )
        self._codes: list[torch.Tensor] | None = None

    def _draw(self, part: int) -> torch.Tensor:
        """int32 [P]: 2 * feature + (1 if the sign is negative), features in range `part` of
        `nonzeros`.
        """
        key = np.array([self.seed % 2**64, part], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(self.input_dim)
        low = part * self.proj_dim // self.nonzeros
        width = (part + 1) * self.proj_dim // self.nonzeros - low
        # High half of the word picks the feature (multiply-shift, bias below width / 2^32), lowest
        # bit the sign.
        half = np.uint64(32)
        feature = low + ((words >> half) * np.uint64(width) >> half).astype(np.int64)
        negative = (words & np.uint64(1)).astype(np.int64)
        return torch.from_numpy((2 * feature + negative).astype(np.int32))

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        if self._codes is None:
            self._codes = [self._draw(part).to(self.device) for part in range(self.nonzeros)]
        scale = self.nonzeros**-0.5
        for codes in self._codes:
            for start in range(0, grads.shape[1], SCATTER_COORDINATES):
                piece = grads[:, start : start + SCATTER_COORDINATES]
                code = codes[offset + start : offset + start + piece.shape[1]]
                signs = 1 - 2 * (code & 1)
                out.scatter_add_(1, (code >> 1).long().expand(piece.shape), piece * (scale * signs))

    def describe(self) -> dict:
        drawn = {"generator": "philox4x64-10 counter", "nonzeros": self.nonzeros}
        return {**super().describe(), **drawn}


class Grass(Projection):
    """Random mask to min(4k, P) coordinates, then a sparse JL of those to k."""

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__(spec)
        middle = min(GRASS_MULTIPLIER * self.proj_dim, self.input_dim)
        self.mask = RandomMask(replace(spec, kind="random_mask", proj_dim=middle))
        self.sjlt = SparseJL(replace(spec, kind="sjlt", input_dim=middle))

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        start, stop = self.mask.within(offset, grads.shape[1])
        kept = grads.index_select(1, self.mask.indices[start:stop] - offset)
        self.sjlt.accumulate(out, kept, start)

    def add(self, out: torch.Tensor, grad: OuterProductGrad | DenseGrad) -> None:
        """As `RandomMask.add`."""
        start, stop = self.mask.within(grad.offset, grad.numel)
        if stop > start:
            kept = grad.gather(self.mask.indices[start:stop] - grad.offset)
            self.sjlt.accumulate(out, kept, start)

    def describe(self) -> dict:
        return {**super().describe(), "mask": self.mask.describe(), "sjlt": self.sjlt.describe()}


KINDS: dict[str, type[Projection]] = {
    "identity": Identity,
    "random_mask": RandomMask,
    "normal": Dense,
    "rademacher": Dense,
    "trak_normal": Dense,
    "trak_rademacher": Dense,
    "sjlt": SparseJL,
    "grass": Grass,
}
