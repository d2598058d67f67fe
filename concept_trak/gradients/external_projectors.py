"""Projections done by dattri or trak themselves (PROJ_BACKEND), so that on CUDA the field's kernels
do the work and a user of either library gets the same rows.

| backend | kinds on a CPU | kinds on CUDA |
|---|---|---|
| dattri | identity, random_mask, normal, rademacher | these, and sjlt, grass (package sjlt) |
| trak | normal, rademacher | the same, k a multiple of 512 (package fast_jl) |

Both work on the concatenated gradient of the whole parameter vector, so a batch needs a dense
buffer [B, P] float32, which the kinds of our own never form. On CUDA they draw their numbers on the
device, and what they draw depends on the GPU model: a manifest names it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
from collections.abc import Callable

import torch

from ..errors import UserError
from .projectors import Projection, ProjectionSpec, refuse_large_dense

LIBRARIES = {"dattri": "dattri", "trak": "traker"}  # backend: its name on PyPI
DENSE = ("normal", "rademacher")
ON_CPU = {"dattri": ("identity", "random_mask", *DENSE), "trak": DENSE}
ON_CUDA = {"dattri": (*ON_CPU["dattri"], "sjlt", "grass"), "trak": DENSE}
BUFFER_MAX_BYTES = 2**33  # of the dense gradients of a batch
# Samples in one launch of a kernel, and what dattri cuts a long gradient by: the reference's. The
# numbers that are drawn do not depend on it with trak.
KERNEL_BATCH = 16
FAST_JL_COLUMNS = 512  # columns of a tile of trak's kernel, which writes whole tiles

Project = Callable[[torch.Tensor], torch.Tensor]  # [B, P] float32 -> [B, k]


class ExternalProjection(Projection):
    """A projection of the whole gradient by another library.

    `add` and `accumulate` collect the shares in a buffer [B, P] float32; `finish` projects it into
    `out` and gives it back. UserError for what the library cannot do, all but a too large buffer
    before any work.
    """

    def __init__(self, spec: ProjectionSpec, backend: str, by_module: bool = False) -> None:
        super().__init__(spec)
        self.backend, self._buffer = backend, None
        _check(spec, backend, by_module)
        self._project = (_by_dattri if backend == "dattri" else _by_trak)(spec)

    def accumulate(self, out: torch.Tensor, grads: torch.Tensor, offset: int) -> None:
        """Keep the share until `finish`; `out` stays as it is."""
        if self._buffer is None:
            refuse_large_buffer(self.spec, len(grads))
            self._buffer = torch.zeros(len(grads), self.input_dim, device=grads.device)
        self._buffer[:, offset : offset + grads.shape[1]] += grads

    def finish(self, out: torch.Tensor) -> None:
        """out += the kept shares, projected."""
        grads, self._buffer = self._buffer, None
        if grads is not None:
            out += self._project(grads)

    def describe(self) -> dict:
        """Also the library, its version and the model of the GPU that draws ("cpu" without)."""
        on_cpu = self.device.type == "cpu"
        return {
            **super().describe(),
            "backend": self.backend,
            "version": importlib.metadata.version(LIBRARIES[self.backend]),
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(self.device),
        }


def refuse_large_buffer(spec: ProjectionSpec, rows: int) -> None:
    """UserError if the dense gradients of so many samples take more than BUFFER_MAX_BYTES."""
    if (needed := 4 * rows * spec.input_dim) > BUFFER_MAX_BYTES:
        raise UserError(
            f"PROJ_BACKEND other than own needs the whole gradients, {rows} x {spec.input_dim} "
            f"float32 values or {needed / 2**30:.1f} GiB, and may hold "
            f"{BUFFER_MAX_BYTES / 2**30:.0f}: lower BATCH_SIZE, choose a smaller LAYER or "
            "PROJ_BACKEND=own"
        )


def _check(spec: ProjectionSpec, backend: str, by_module: bool) -> None:
    cuda = spec.device.type == "cuda"
    if backend not in LIBRARIES:
        known = ", ".join(("own", *LIBRARIES))
        raise UserError(f"PROJ_BACKEND={backend!r} is unknown; set PROJ_BACKEND to one of {known}")
    kinds, asked = (ON_CUDA if cuda else ON_CPU)[backend], f"PROJ_BACKEND={backend}"
    if spec.kind not in kinds:
        raise UserError(
            f"{asked} has no projection {spec.kind} on {spec.device.type}; use PROJ_TYPE one of "
            f"{', '.join(kinds)}, or PROJ_BACKEND=own"
        )
    if by_module:
        raise UserError(
            f"{asked} projects all parameters as one block; set BLOCKS=all, or PROJ_BACKEND=own"
        )
    if spec.mask != "portable":
        raise UserError(
            f"{asked} draws its own mask; leave PROJ_MASK={spec.mask} out, or use PROJ_BACKEND=own"
        )
    if spec.nonzeros != 1:
        raise ValueError(f"{asked} adds each coordinate to one feature, not {spec.nonzeros}")
    if spec.kind in DENSE and not (cuda and backend == "trak"):
        refuse_large_dense(spec)
    if cuda and backend == "trak":
        _check_fast_jl(spec)
    elif cuda and spec.kind in ("sjlt", "grass"):
        _need("sjlt", asked)


def _check_fast_jl(spec: ProjectionSpec) -> None:
    """UserError for sizes at which trak's kernel would write beside its output or read the wrong
    entries, and without the kernel.
    """
    if spec.proj_dim % FAST_JL_COLUMNS:
        raise UserError(
            f"PROJ_BACKEND=trak on cuda cannot make {spec.proj_dim} features; set PROJ_DIM to a "
            f"multiple of {FAST_JL_COLUMNS}"
        )
    if spec.input_dim * KERNEL_BATCH >= 2**32:  # it counts in 32 bits
        raise UserError(
            f"PROJ_BACKEND=trak on cuda cannot count {spec.input_dim} coordinates; choose a "
            "smaller LAYER or PROJ_BACKEND=own"
        )
    _need("fast_jl", "PROJ_BACKEND=trak")


def _need(kernel: str, asked: str) -> None:
    """UserError if a package of CUDA kernels cannot be imported."""
    try:
        importlib.import_module(kernel)
    except ImportError as error:
        how = {"fast_jl": "traker[fast]"}.get(kernel, kernel)
        raise UserError(
            f"{asked} needs the CUDA kernels of {kernel} ({error}): pip install '{how}', or use "
            "PROJ_BACKEND=own"
        ) from None


def _by_dattri(spec: ProjectionSpec) -> Project:
    from dattri.func.projection import random_project  # here only: slow to import

    like = torch.empty(1, 1).expand(1, spec.input_dim)  # for its shape and dtype
    sizes = 1, spec.proj_dim, KERNEL_BATCH
    return random_project(like, *sizes, spec.seed, spec.kind, device=spec.device)


def _by_trak(spec: ProjectionSpec) -> Project:
    from trak import projectors  # here only: slow to import

    kind = projectors.ProjectionType(spec.kind)
    sizes = spec.input_dim, spec.proj_dim, spec.seed
    if spec.device.type == "cpu":
        on_cpu = projectors.BasicProjector(*sizes, kind, spec.device)
        return lambda grads: on_cpu.project(grads, 0)
    on_cuda = projectors.CudaProjector(*sizes, kind, spec.device, max_batch_size=KERNEL_BATCH)
    first = itertools.chain([True], itertools.repeat(False))
    return lambda grads: _by_fast_jl(on_cuda.project, grads, next(first))


def _by_fast_jl(
    project: Callable[[torch.Tensor, int], torch.Tensor], grads: torch.Tensor, check: bool = True
) -> torch.Tensor:
    """The kernel computes in float16, whose smallest number is 6e-8: rows go in at an RMS of about
    one, scaled by a power of two, which float32 does without rounding.

    check: UserError if it gives zeros, as one built for another GPU does without a word. The answer
    has to be waited for, so the first call asks alone.
    """
    rms = grads.square().mean(1, keepdim=True).sqrt()
    scale = torch.where(rms > 0, torch.exp2(rms.log2().round()), 1)
    found = project(grads / scale, 0)
    if check and rms.any() and not found.any():
        raise UserError(
            "trak's kernel fast_jl gives zeros: build it for this GPU, or use PROJ_BACKEND=own"
        )
    return found * scale
