"""What a network is told beside state and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Condition:
    """Embeddings of B prompts [B, T, d], and further inputs by the network's argument name.

    extra: batch-first tensors, e.g. {"added_cond_kwargs.text_embeds": [B, d]} of SDXL, or the
    pooled projections of a diffusion transformer.
    """

    embeddings: torch.Tensor
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice) -> Condition:
        return Condition(self.embeddings[rows], {k: x[rows] for k, x in self.extra.items()})

    def expand(self, n: int) -> Condition:
        """One condition for n samples; one of n already is itself."""
        if len(self) == n:
            return self
        return Condition(
            _expand(self.embeddings, n), {k: _expand(x, n) for k, x in self.extra.items()}
        )

    def split(self, size: int = 1) -> list[Condition]:
        """Conditions of `size` prompts each."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def to(self, like: torch.Tensor) -> Condition:
        """On the device and in the dtype of a tensor."""
        return Condition(self.embeddings.to(like), {k: x.to(like) for k, x in self.extra.items()})

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """One after the other along the batch."""
        extra = {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra}
        return Condition(torch.cat([p.embeddings for p in parts]), extra)


def _expand(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.expand(n, *x.shape[1:])
