"""Random projections R from P parameter coordinates to k features, applied as ``grads @ R``.

| kind | entries of R | E[||x R||^2] | origin of the numbers |
|---|---|---|---|
| identity | I | ||x||^2 | |
| random_mask | k unit columns | (k/P) ||x||^2 | dattri 0.3.0: sort(randperm(P)[:k]) |
| normal, rademacher | N(0,1)/sqrt(k), +-1/sqrt(k) | ||x||^2 | dattri 0.3.0 on CPU |
| trak_normal, trak_rademacher | N(0,1), +-1 | k ||x||^2 | trak's BasicProjector |
| sjlt | c entries +-1/sqrt(c) a row | ||x||^2 | own: word p of a Philox4x64 stream |
| grass | random_mask to 4k, then sjlt to k | (4k/P) ||x||^2 | as above |
| logra | L (x) R a weight, N(0, 1/columns) | ||x||^2 | own: a seed for each module |

Dense kinds draw 100 columns a seed, seed + 1000 a block, as both libraries do. Features of logra,
and of every kind with BLOCKS=module, stand side by side: each module has some k / modules of its
own.

Every number is drawn on the CPU and then moved, so a seed means the same on every device. (dattri
on CUDA draws other numbers, and its masks even depend on the GPU model: `mask` names the one to
rebuild, see cuda_mask.py. To let dattri or trak project, see external_projectors.py.) Sources:
sjlt: Kane & Nelson 2014, "Sparser Johnson-Lindenstrauss transforms" (block construction); grass: Hu
et al. 2025, "GraSS"; dense kinds: Park et al. 2023, "TRAK"; logra: Choe et al. 2024, "What is your
data worth to GPT?".
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UserError
from ..settings import PROJECTIONS, Settings
from .external_projectors import ExternalProjection, refuse_large_buffer
from .projectors import KINDS, Projection, ProjectionSpec
from .sample_grads import DenseGrad, OuterProductGrad, module_layout

Shapes = list[tuple[int, ...]]  # of the tensors of one module, in coordinate order


class LoGra(Projection):
    """One module's gradient: of a weight, G [out, in] to L^T G R, flattened; a vector by a Gaussian
    matrix to the same features.

    A gradient known by its factors, sum_p delta_p a_p^T, is never formed: L^T delta and R^T a are
    enough.
    """

    def __init__(self, spec: ProjectionSpec, shapes: Shapes) -> None:
        sizes, k = [math.prod(shape) for shape in shapes], spec.proj_dim
        matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1]
        if matrices:
            left = min(math.isqrt(k), *(out for out, _ in matrices))
            right = min(k // left, *(width for _, width in matrices))
        else:
            left, right = 1, min(k, max(sizes))
        super().__init__(replace(spec, input_dim=sum(sizes), proj_dim=left * right))
        generator = torch.Generator().manual_seed(spec.seed)

        def draw(rows: int, columns: int) -> torch.Tensor:
            entries = torch.randn(rows, columns, generator=generator)
            return (entries * columns**-0.5).to(self.device)

        self._maps = {}  # first coordinate: (size, L, R), L None for a vector
        starts = itertools.accumulate([0, *sizes[:-1]])
        for shape, size, start in zip(shapes, sizes, starts, strict=True):
            if len(shape) > 1:
                self._maps[start] = size, draw(shape[0], left), draw(size // shape[0], right)
            else:
                self._maps[start] = size, None, draw(size, left * right)

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        """As for every kind, but only whole tensors."""
        for start, (size, left, right) in self._maps.items():
            if not offset <= start < offset + grads.shape[1]:
                continue
            piece = grads[:, start - offset : start - offset + size].float()
            if left is None:
                out += piece @ right
            else:
                out += (left.T @ piece.view(len(piece), len(left), -1) @ right).flatten(1)

    def add(self, out: torch.Tensor, grad: OuterProductGrad | DenseGrad) -> None:
        """By its factors where it has them."""
        _, left, right = self._maps[grad.offset]
        if left is None or not isinstance(grad, OuterProductGrad):
            super().add(out, grad)
        else:
            out += ((grad.delta @ left).mT @ (grad.a @ right)).flatten(1)


class BlockwiseProjection(Projection):
    """A projection of its own for each module, their features side by side.

    layout: the shapes of each module's tensors (`sample_grads.module_layout`). separate:
    whether the modules are blocks (`widths`).
    """

    def __init__(self, spec: ProjectionSpec, layout: list[Shapes], separate: bool) -> None:
        if spec.proj_dim < len(layout) and spec.kind != "identity":
            raise UserError(
                f"PROJ_DIM={spec.proj_dim} leaves no feature for each of {len(layout)} modules; "
                "raise it or set BLOCKS=all"
            )
        sizes = [sum(math.prod(shape) for shape in shapes) for shapes in layout]
        width = spec.proj_dim if spec.kind == "identity" else spec.proj_dim // len(layout)
        self.parts: list[Projection] = []
        for block, (shapes, size) in enumerate(zip(layout, sizes, strict=True)):
            own = replace(spec, seed=spec.seed * 1_000_003 + block, input_dim=size, proj_dim=width)
            if spec.kind == "logra":
                self.parts.append(LoGra(own, shapes))
            else:
                self.parts.append(KINDS[spec.kind](replace(own, proj_dim=min(width, size))))
        dims = (part.proj_dim for part in self.parts)
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._columns = list(itertools.accumulate(dims, initial=0))
        super().__init__(replace(spec, input_dim=self._starts[-1], proj_dim=self._columns[-1]))
        self.widths = [part.proj_dim for part in self.parts] if separate else [self.proj_dim]

    def _part(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, offset) - 1

    def _of(self, part: int, out: torch.Tensor) -> torch.Tensor:
        """The features of a part."""
        return out[:, self._columns[part] : self._columns[part + 1]]

    def block_of(self, offset: int) -> int:
        return self._part(offset) if len(self.widths) > 1 else 0

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        end = offset + grads.shape[1]
        for number, (start, stop) in enumerate(itertools.pairwise(self._starts)):
            low, high = max(offset, start), min(end, stop)
            if low < high:
                piece = grads[:, low - offset : high - offset]
                self.parts[number].accumulate(self._of(number, out), piece, low - start)

    def add(self, out: torch.Tensor, grad: OuterProductGrad | DenseGrad) -> None:
        """By the part that the tensor is of."""
        number = self._part(grad.offset)
        own = replace(grad, offset=grad.offset - self._starts[number])
        self.parts[number].add(self._of(number, out), own)

    def describe(self) -> dict:
        modules = [part.proj_dim for part in self.parts]
        return {**super().describe(), "modules": modules, "blocks": len(self.widths)}


@dataclass(frozen=True)
class Options:
    """What a projection may be told beside its kind and sizes.

    mask (random_mask only): "portable" or "auto", the CPU's generator, or the GPU (a key of
    cuda_mask.GPUS) whose draw to rebuild. layout: the shapes of each module's tensors
    (`sample_grads.module_layout`), for a projection module by module; logra needs it. separate: let
    the modules be blocks of their own, see `Projection`. nonzeros: see `ProjectionSpec`. backend:
    "own", or the library that projects (external_projectors.py).
    """

    mask: str = "portable"
    layout: list[Shapes] | None = None
    separate: bool = False
    nonzeros: int = 1
    backend: str = "own"


def projection_for(
    parameters: dict[str, torch.nn.Parameter],
    settings: Settings,
    device: str | torch.device,
    mask: str = "auto",
) -> Projection:
    """The settings' projection of selected parameters (name: parameter, in coordinate order)."""
    s, count = settings, sum(p.numel() for p in parameters.values())
    dim = 0 if s.proj_type == "identity" else s.proj_dim
    separate, backend = s.blocks == "module", s.proj_backend
    layout = module_layout(parameters) if s.proj_type == "logra" or separate else None
    options = {"mask": mask, "layout": layout, "separate": separate, "backend": backend}
    projection = make_projection(s.proj_type, count, dim, s.proj_seed, device, **options)
    if backend != "own":
        refuse_large_buffer(projection.spec, s.batch_size)
    return projection


def make_projection(
    kind: str,
    input_dim: int,
    proj_dim: int,
    seed: int,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Projection:
    """The projection of `kind` (one of PROJECTIONS) from input_dim = P to proj_dim = k, or a little
    less with a layout.

    options: fields of `Options`. Raises UserError for an unknown kind or mask, a GPU's mask for
    another kind, a mask wider than P, identity with proj_dim other than P (0 or None means P), and
    what the backend cannot do. ValueError for logra without a layout.
    """
    chosen = Options(**options)
    if kind == "logra" and chosen.layout is None:
        raise ValueError("logra needs the layout of the modules")
    if kind == "identity":
        proj_dim = proj_dim or input_dim
    mask = "portable" if chosen.mask == "auto" else chosen.mask
    spec = ProjectionSpec(
        kind, input_dim, proj_dim, seed, torch.device(device), mask, chosen.nonzeros
    )
    _check(spec, chosen)
    if chosen.backend != "own":
        return ExternalProjection(spec, chosen.backend, by_module=chosen.layout is not None)
    if chosen.layout is not None:
        return BlockwiseProjection(spec, chosen.layout, chosen.separate)
    return KINDS[kind](spec)


def _check(spec: ProjectionSpec, options: Options) -> None:
    """The UserErrors of `make_projection` that concern every kind."""
    kind, k = spec.kind, spec.proj_dim
    if kind not in PROJECTIONS:
        raise UserError(
            f"unknown projection {kind!r}; set PROJ_TYPE to one of {', '.join(PROJECTIONS)}"
        )
    if kind == "identity" and k != spec.input_dim:
        raise UserError(
            f"projection identity keeps all {spec.input_dim} coordinates, not {k}; set "
            "PROJ_TYPE to another, or proj_dim to 0"
        )
    if not k or k < 1:
        raise UserError(f"no row has {k} features; set PROJ_DIM to at least 1")
    if kind == "random_mask" and k > spec.input_dim:
        raise UserError(
            f"random_mask cannot keep {k} of {spec.input_dim} coordinates; lower PROJ_DIM"
        )
    if spec.mask != "portable" and (kind != "random_mask" or options.layout is not None):
        own = "random_mask module by module" if kind == "random_mask" else kind
        raise UserError(
            f"projection {own} has no mask of a GPU; leave PROJ_MASK={spec.mask} out, or set "
            "PROJ_TYPE=random_mask and BLOCKS=all"
        )
