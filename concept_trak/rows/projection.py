"""Random projections R from P parameter coordinates to k features, applied as ``grads @ R``.

| kind | entries of R | E[||x R||^2] | origin of the numbers |
|---|---|---|---|
| identity | I | ||x||^2 | |
| random_mask | k unit columns | (k/P) ||x||^2 | dattri 0.3.0: sort(randperm(P)[:k]), on CPU or as a named GPU draws it |
| normal, rademacher | N(0,1)/sqrt(k), +-1/sqrt(k) | ||x||^2 | dattri 0.3.0 on CPU: 100 columns a seed, seed + 1000 a block |
| trak_normal, trak_rademacher | N(0,1), +-1 | k ||x||^2 | trak's BasicProjector: the same blocks without the scale |
| sjlt | `nonzeros` entries +-1/sqrt(nonzeros) a row | ||x||^2 | own: word p of a Philox4x64 stream for coordinate p |
| grass | random_mask to 4k, then sjlt to k | (4k/P) ||x||^2 | as above |
| logra | L (x) R for each weight matrix, entries N(0, 1/columns) in either | ||x||^2 | own: a seed for each module |

Features of logra, and of every kind with BLOCKS=module, stand side by side: each module has some k
/ modules of its own.

Every number is drawn on the CPU and then moved, so a seed means the same on every device. (dattri
on CUDA draws other numbers, and its masks even depend on the GPU model: `mask` names the one to
rebuild, see gpu_mask.py.) Sources: sjlt: Kane & Nelson 2014, "Sparser Johnson-Lindenstrauss
transforms" (block construction); grass: Hu et al. 2025, "GraSS"; dense kinds: Park et al. 2023,
"TRAK"; logra: Choe et al. 2024, "What is your data worth to GPT?".
"""

import bisect
import dataclasses
import hashlib
import itertools
import math

import numpy as np
import torch

from ..errors import UserError
from .gpu_mask import generator_name, gpu_mask
from .vjp import OuterProductGrad, module_layout

# columns drawn from one seed: the block size of dattri and trak, part of what their seed means
COLUMN_BLOCK = 100
DENSE_CACHE_BYTES = (
    2**30
)  # a dense R up to this size is kept; a larger one is redrawn at every call
DENSE_MAX_ENTRIES = 2**34  # beyond this a dense R takes minutes to draw for every batch
SCATTER_COORDINATES = (
    2**14
)  # coordinates signed and scattered at a time: 32 samples of them stay in cache
CPU_GENERATOR = "torch mt19937 (CPU)"
GRASS_MULTIPLIER = 4  # width of the intermediate mask in multiples of k, as in dattri


class Projection:
    """The P x k matrix R, never materialised whole. Attributes: kind, input_dim (P), proj_dim (k),
    seed, device, and

    widths: features of each of the blocks in which gradients are unit-normed and preconditioned;
    here one block, of all k.
    """

    def __init__(self, kind, input_dim, proj_dim, seed, device):
        self.kind, self.input_dim, self.proj_dim, self.seed, self.device = (
            kind,
            input_dim,
            proj_dim,
            seed,
            torch.device(device),
        )
        self.widths = [proj_dim]

    def block_of(self, offset):
        """Number of the block that the tensor with this first coordinate is in."""
        return 0

    def add(self, out, grad):
        """Add a tensor's share, given as a per-sample gradient (`gradients`); kinds that need not
        form it do not.
        """
        self.accumulate(out, grad.dense(), grad.offset)

    def accumulate(self, out, grads, offset):
        """Add one parameter tensor's share: ``out += grads @ R[offset : offset + n]``, in place.

        out: [B, k] float32. grads: [B, n] of any floating dtype, the flattened tensor whose first
        coordinate is `offset`.
        """
        raise NotImplementedError

    def project(self, grads):
        """grads [B, P] -> [B, k] float32."""
        if grads.shape[1] != self.input_dim:
            raise UserError(
                f"projection {self.kind} expects {self.input_dim} coordinates a row but was given "
                f"{grads.shape[1]}"
            )
        out = torch.zeros(grads.shape[0], self.proj_dim, dtype=torch.float32, device=grads.device)
        self.accumulate(out, grads, 0)
        return out

    def describe(self):
        """JSON-ready identity of R for a store's manifest."""
        return {
            "kind": self.kind,
            "input_dim": self.input_dim,
            "proj_dim": self.proj_dim,
            "seed": self.seed,
        }


class Identity(Projection):
    """Keeps all P coordinates."""

    def accumulate(self, out, grads, offset):
        out[:, offset : offset + grads.shape[1]] += grads


class RandomMask(Projection):
    """Keeps k fixed coordinates, unscaled. `indices`: sorted LongTensor [k]; `mask`: "portable" or
    a key of gpu_mask.GPUS.
    """

    def __init__(self, *args, mask="portable"):
        super().__init__(*args)
        self.mask = mask
        if mask == "portable":
            generator = torch.Generator().manual_seed(self.seed)
            self._cpu_indices = (
                torch.randperm(self.input_dim, generator=generator)[: self.proj_dim].sort().values
            )
        else:
            self._cpu_indices = torch.from_numpy(
                gpu_mask(mask, self.input_dim, self.proj_dim, self.seed).copy()
            )
        self.indices = self._cpu_indices.to(self.device)

    def within(self, offset, length):
        """(first, last + 1) feature whose coordinate lies in [offset, offset + length)."""
        bounds = torch.tensor([offset, offset + length])
        return torch.searchsorted(self._cpu_indices, bounds).tolist()

    def accumulate(self, out, grads, offset):
        start, stop = self.within(offset, grads.shape[1])
        out[:, start:stop] += grads.index_select(1, self.indices[start:stop] - offset)

    def add(self, out, grad):
        """Reads the kept entries only."""
        start, stop = self.within(grad.offset, grad.numel)
        out[:, start:stop] += grad.gather(self.indices[start:stop] - grad.offset)

    def describe(self):
        digest = hashlib.sha256(self._cpu_indices.numpy().astype("<i8").tobytes()).hexdigest()
        generator = (
            CPU_GENERATOR if self.mask == "portable" else generator_name(self.mask, self.input_dim)
        )
        return {**super().describe(), "generator": generator, "indices_sha256": digest}


class Dense(Projection):
    """Gaussian or Rademacher entries, drawn [P, 100] at a time with dattri's and trak's seeds (peak
    400 P bytes, as there).

    Gradients of one tensor at a time need rows of R, and the generators cannot skip ahead, so an R
    above `DENSE_CACHE_BYTES` is redrawn for every call: prefer `sjlt` or `random_mask` for anything
    but a small network.
    """

    def __init__(self, *args):
        super().__init__(*args)
        if self.input_dim * self.proj_dim > DENSE_MAX_ENTRIES:
            raise UserError(
                f"a dense {self.kind} projection of {self.input_dim} x {self.proj_dim} is too "
                "large to draw for every batch: "
                "use sjlt, grass or random_mask, or a smaller proj_dim"
            )
        trak = self.kind.startswith("trak_")
        self._rademacher = self.kind.endswith("rademacher")
        self._scale = 1.0 if trak else self.proj_dim**-0.5
        self._kept = None

    def _column_blocks(self):
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

    def accumulate(self, out, grads, offset):
        blocks = self._kept or self._column_blocks()
        if self._kept is None and 4 * self.input_dim * self.proj_dim <= DENSE_CACHE_BYTES:
            blocks = self._kept = list(blocks)
        grads = grads.float()
        for start, matrix in blocks:
            rows = matrix[offset : offset + grads.shape[1]]
            out[:, start : start + rows.shape[1]].add_(grads @ rows, alpha=self._scale)

    def describe(self):
        return {
            **super().describe(),
            "generator": CPU_GENERATOR,
            "column_block": COLUMN_BLOCK,
            "scale": self._scale,
        }


class SparseJL(Projection):
    """Sparse Johnson-Lindenstrauss: a coordinate adds +-1/sqrt(c) of itself to c features, one in
    each of c ranges of features.

    Bucket and sign of coordinate p come from word p of the Philox4x64 stream keyed (seed, range), a
    counter-based generator: they do not depend on how the gradient is cut into tensors, on the
    batch or on the device. Hashes are kept: 4 c P bytes.
    """

    def __init__(self, *args, nonzeros=1):
        super().__init__(*args)
        if not 1 <= nonzeros <= self.proj_dim:
            raise UserError(
                f"sjlt needs between 1 and proj_dim={self.proj_dim} nonzeros a coordinate, not "
                f"{nonzeros}"
            )
        self.nonzeros = nonzeros
        self._codes = None

    def _draw(self, part):
        """int32 [P]: 2 * feature + (1 if the sign is negative), features in range `part` of
        `nonzeros`.
        """
        words = np.random.Philox(
            key=np.array([self.seed % 2**64, part], dtype=np.uint64)
        ).random_raw(self.input_dim)
        low = part * self.proj_dim // self.nonzeros
        width = (part + 1) * self.proj_dim // self.nonzeros - low
        # High half of the word picks the feature (multiply-shift, bias below width / 2^32), lowest
        # bit the sign.
        feature = low + ((words >> np.uint64(32)) * np.uint64(width) >> np.uint64(32)).astype(
            np.int64
        )
        return torch.from_numpy(
            (2 * feature + (words & np.uint64(1)).astype(np.int64)).astype(np.int32)
        )

    def accumulate(self, out, grads, offset):
        if self._codes is None:
            self._codes = [self._draw(part).to(self.device) for part in range(self.nonzeros)]
        scale = self.nonzeros**-0.5
        for codes in self._codes:
            for start in range(0, grads.shape[1], SCATTER_COORDINATES):
                piece = grads[:, start : start + SCATTER_COORDINATES]
                code = codes[offset + start : offset + start + piece.shape[1]]
                signs = 1 - 2 * (code & 1)
                out.scatter_add_(1, (code >> 1).long().expand(piece.shape), piece * (scale * signs))

    def describe(self):
        return {
            **super().describe(),
            "generator": "philox4x64-10 counter",
            "nonzeros": self.nonzeros,
        }


class Grass(Projection):
    """Random mask to min(4k, P) coordinates, then a sparse JL of those to k."""

    def __init__(self, *args, nonzeros=1):
        super().__init__(*args)
        middle = min(GRASS_MULTIPLIER * self.proj_dim, self.input_dim)
        self.mask = RandomMask("random_mask", self.input_dim, middle, self.seed, self.device)
        self.sjlt = SparseJL(
            "sjlt", middle, self.proj_dim, self.seed, self.device, nonzeros=nonzeros
        )

    def accumulate(self, out, grads, offset):
        start, stop = self.mask.within(offset, grads.shape[1])
        self.sjlt.accumulate(
            out, grads.index_select(1, self.mask.indices[start:stop] - offset), start
        )

    def add(self, out, grad):
        """As `RandomMask.add`."""
        start, stop = self.mask.within(grad.offset, grad.numel)
        if stop > start:
            self.sjlt.accumulate(
                out, grad.gather(self.mask.indices[start:stop] - grad.offset), start
            )

    def describe(self):
        return {**super().describe(), "mask": self.mask.describe(), "sjlt": self.sjlt.describe()}


class LoGra(Projection):
    """One module's gradient: of a weight, G [out, in] to L^T G R, flattened; a vector by a Gaussian
    matrix to the same features.

    A gradient known by its factors, sum_p delta_p a_p^T, is never formed: L^T delta and R^T a are
    enough.
    """

    def __init__(self, kind, shapes, proj_dim, seed, device):
        matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1]
        sizes = [math.prod(shape) for shape in shapes]
        left = min(math.isqrt(proj_dim), *(out for out, _ in matrices)) if matrices else 1
        right = (
            min(proj_dim // left, *(width for _, width in matrices))
            if matrices
            else min(proj_dim, max(sizes))
        )
        super().__init__(kind, sum(sizes), left * right, seed, device)
        generator = torch.Generator().manual_seed(seed)

        def draw(rows, columns):
            return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(self.device)

        self._maps = {}  # first coordinate: (size, L, R), L None for a vector
        for shape, size, start in zip(shapes, sizes, itertools.accumulate(sizes, initial=0)):
            is_matrix = len(shape) > 1
            self._maps[start] = (size, draw(shape[0], left) if is_matrix else None,
                                 draw(size // shape[0], right) if is_matrix else draw(size, left * right))  # fmt: skip

    def accumulate(self, out, grads, offset):
        """As for every kind, but only whole tensors."""
        for start, (size, left, right) in self._maps.items():
            if offset <= start < offset + grads.shape[1]:
                piece = grads[:, start - offset : start - offset + size].float()
                out += (
                    piece @ right
                    if left is None
                    else (left.T @ piece.view(len(piece), len(left), -1) @ right).flatten(1)
                )

    def add(self, out, grad):
        _, left, right = self._maps[grad.offset]
        if left is None or not isinstance(grad, OuterProductGrad):
            super().add(out, grad)
        else:
            out += ((grad.delta @ left).mT @ (grad.a @ right)).flatten(1)


class Blockwise(Projection):
    """A projection of its own for each module, their features side by side.

    layout: the shapes of each module's tensors (`gradients.module_layout`). separate: whether the
    modules are blocks (`widths`).
    """

    def __init__(self, kind, layout, proj_dim, seed, device, separate, **options):
        if proj_dim < len(layout) and kind != "identity":
            raise UserError(
                f"PROJ_DIM={proj_dim} leaves no feature for each of {len(layout)} modules; raise "
                "it or set BLOCKS=all"
            )
        sizes = [sum(math.prod(shape) for shape in shapes) for shapes in layout]
        seeds, width = (
            (seed * 1_000_003 + block for block in range(len(layout))),
            proj_dim // len(layout),
        )
        self.parts = [LoGra(kind, shapes, width, own, device) if kind == "logra"
                      else KINDS[kind](kind, size, size if kind == "identity" else min(width, size), own, device, **options)
                      for shapes, size, own in zip(layout, sizes, seeds)]  # fmt: skip
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._columns = list(
            itertools.accumulate((part.proj_dim for part in self.parts), initial=0)
        )
        super().__init__(kind, self._starts[-1], self._columns[-1], seed, device)
        self.widths = [part.proj_dim for part in self.parts] if separate else [self.proj_dim]

    def _part(self, offset):
        return bisect.bisect_right(self._starts, offset) - 1

    def block_of(self, offset):
        return self._part(offset) if len(self.widths) > 1 else 0

    def accumulate(self, out, grads, offset):
        end = offset + grads.shape[1]
        for part, start, stop, column in zip(
            self.parts, self._starts, self._starts[1:], self._columns
        ):
            low, high = max(offset, start), min(end, stop)
            if low < high:
                part.accumulate(
                    out[:, column : column + part.proj_dim],
                    grads[:, low - offset : high - offset],
                    low - start,
                )

    def add(self, out, grad):
        block = self._part(grad.offset)
        columns = out[:, self._columns[block] : self._columns[block + 1]]
        self.parts[block].add(
            columns, dataclasses.replace(grad, offset=grad.offset - self._starts[block])
        )

    def describe(self):
        return {
            **super().describe(),
            "modules": [part.proj_dim for part in self.parts],
            "blocks": len(self.widths),
        }


KINDS = {
    "identity": Identity,
    "random_mask": RandomMask,
    "normal": Dense,
    "rademacher": Dense,
    "trak_normal": Dense,
    "trak_rademacher": Dense,
    "sjlt": SparseJL,
    "grass": Grass,
}


def projection_for(parameters, settings, device, mask="auto"):
    """The settings' projection of selected parameters (name: parameter, in coordinate order)."""
    s, count = settings, sum(p.numel() for p in parameters.values())
    dim = 0 if s.proj_type == "identity" else s.proj_dim
    layout = module_layout(parameters) if s.proj_type == "logra" or s.blocks == "module" else None
    return make_projection(
        s.proj_type, count, dim, s.proj_seed, device, mask, layout, s.blocks == "module"
    )


def make_projection(
    kind,
    input_dim,
    proj_dim,
    seed,
    device="cpu",
    mask="portable",
    layout=None,
    separate=False,
    **options,
):
    """The projection of `kind` (a key of KINDS, or logra) from input_dim = P to proj_dim = k, or a
    little less with a layout.

    mask (random_mask only): "portable" or "auto", the CPU's generator, or the GPU (a key of
    gpu_mask.GPUS) whose draw to rebuild. layout: the shapes of each module's tensors
    (`gradients.module_layout`), for a projection module by module; logra needs it. separate: let
    the modules be blocks of their own, see `Projection`. options: `nonzeros` (sjlt, grass),
    features each coordinate is added to; more lowers the variance at proportional cost. Raises
    UserError for an unknown kind or mask, a GPU's mask for another kind, a mask wider than P, or
    identity with proj_dim other than P (0 or None means P). ValueError for logra without a layout.
    """
    if kind == "logra" and layout is None:
        raise ValueError("logra needs the layout of the modules")
    mask = "portable" if mask == "auto" else mask
    if kind not in (*KINDS, "logra"):
        raise UserError(f"unknown projection {kind!r}: choose one of {', '.join(KINDS)}, logra")
    if kind == "identity":
        proj_dim = proj_dim or input_dim
        if proj_dim != input_dim:
            raise UserError(
                f"projection identity keeps all {input_dim} coordinates: set proj_dim to 0, not "
                f"{proj_dim}"
            )
    if not proj_dim or proj_dim < 1:
        raise UserError(f"proj_dim must be at least 1, not {proj_dim}")
    if kind == "random_mask" and proj_dim > input_dim:
        raise UserError(
            f"random_mask cannot keep {proj_dim} of {input_dim} coordinates: lower proj_dim"
        )
    if kind == "random_mask" and layout is None:
        options["mask"] = mask
    elif mask != "portable":
        own = "random_mask module by module" if kind == "random_mask" else kind
        raise UserError(
            f"projection {own} has no mask of a GPU: leave the mask {mask!r} out, or use "
            "random_mask and BLOCKS=all"
        )
    if layout is not None:
        return Blockwise(kind, layout, proj_dim, seed, device, separate, **options)
    return KINDS[kind](kind, input_dim, proj_dim, seed, device, **options)
