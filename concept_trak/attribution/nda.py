"""NDA, attribution from the data alone: whose patches would the ideal denoiser copy?

For a level with shares (alpha, sigma) and a patch u of the query, the optimal local denoiser of a
training set is a mean of its patches p, weighted by

    w(p | u) ~ exp(-||alpha u - alpha p||^2 / (2 sigma^2))

score_i = mean over patch sizes, levels and the query's patches u of the weight that falls on the
patches of picture i, wherever they are in it. No network takes part. After "Nonparametric data
attribution for diffusion models" (patch-level similarity under the analytic score, several scales;
Kamb & Ganguli 2025 for the local score); sizes and levels are ours. Patches are of latents, where
the diffusion is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..registry import RANKERS

if TYPE_CHECKING:
    import torch

    from .question import Query
    from .task import AttributionTask

SHARES = (4, 2, 1)  # a patch's side is the latent's side divided by one of these
LEVELS = (300, 500, 700)


@RANKERS.register("nda")
class NDA:
    """See the module docstring."""

    on_request = True

    def __init__(self, task: AttributionTask) -> None:
        self.task = task

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[1, Q, N]; see `attribution.attributors.Attributor`. Holds all patches of a size at a
        time."""
        pictures = {id(q.picture): q.picture for q in questions}
        scores = {key: np.zeros(len(self.task.data)) for key in pictures}
        train = self.task.latents.float()
        for side in sorted({max(1, train.shape[-1] // share) for share in SHARES}):
            known = patches(train, side)  # [N, places, values]
            for key, picture in pictures.items():
                asked = patches(picture.x0.float().cpu(), side)[0]
                scores[key] += self._shares(asked, known)
        return np.stack([scores[id(q.picture)] for q in questions])[None]

    def over(self, data: Any) -> NDA:
        """The same with other pictures."""
        return NDA(self.task.with_data(data))

    def _shares(self, asked: torch.Tensor, known: torch.Tensor) -> np.ndarray:
        """[N]: mean weight over levels and the query's patches [places, values]."""
        flat, found = known.flatten(0, 1), 0
        square = (asked.square().sum(1)[:, None] + flat.square().sum(1) - 2 * asked @ flat.T).clamp(
            0
        )
        for t in LEVELS:
            level = self.task.model.schedule.level(t)
            weight = (-square * (level.alpha / level.sigma) ** 2 / 2).softmax(1)
            found = found + weight.view(len(asked), *known.shape[:2]).sum(2).mean(0)
        return (found / len(LEVELS)).numpy()


def patches(x: torch.Tensor, side: int) -> torch.Tensor:
    """[B, places, C side side]: all patches of x [B, C, h, w], one latent apart."""
    import torch

    return torch.nn.functional.unfold(x, side).transpose(1, 2)
