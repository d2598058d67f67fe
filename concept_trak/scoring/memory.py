"""Bytes that solving and scoring hold at once, from numbers alone: asked where they are about to be
taken, and before a model is loaded. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError


def primal_bytes(dim: int) -> int:
    """K [k, k], its eigenvectors and the work space of syevd."""
    return 5 * 8 * dim * dim


def dual_bytes(rows: int, dim: int) -> int:
    """The rows [N, k], and the same of their inner products [N, N]."""
    return 4 * rows * dim + primal_bytes(rows)


def refuse_blocks(widths: Sequence[int], max_memory: int) -> None:
    """UserError where blocks of K of these widths, and the solving of one, take more."""
    needed = sum(8 * w * w for w in widths) + primal_bytes(max(widths))
    if needed > max_memory:
        raise UserError(
            f"{len(widths)} blocks of up to {max(widths)} features need {told(needed)} of the "
            f"{told(max_memory)} of MAX_MEMORY; raise MAX_MEMORY or lower PROJ_DIM"
        )


def refuse_scores(count: int, rows: int, max_memory: int) -> None:
    """UserError where `count` scores (queries times dampings) of each row take more."""
    if (needed := 4 * count * rows) > max_memory:
        raise UserError(
            f"{count} x {rows} scores take {told(needed)} of the {told(max_memory)} of MAX_MEMORY; "
            "raise MAX_MEMORY or score fewer queries at a time"
        )


def told(size: int) -> str:
    """ "2.4 GB", "96 MB", "1.5 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
