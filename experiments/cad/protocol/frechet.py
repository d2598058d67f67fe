"""Frechet distance of two sets of pictures by their features (Heusel et al. 2017).

    d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)

torchmetrics computes it; the features are an argument. With Inception's it is the FID, with others
a distance of its own that is not to be compared with published FIDs. It is no mean over pictures:
redrawing them with replacement repeats some, which narrows the covariances and biases it upwards,
so its interval is a delete-a-group jackknife over the drawn pictures instead of a bootstrap; real
ones are held fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import t as student
from torch import nn
from tqdm import tqdm

from concept_trak.errors import UserError

from .metric_models import require

GROUPS = 10
FEWEST = 8  # pictures


class _AsGiven(nn.Module):
    """Features that are there already, where torchmetrics wants the network that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """d^2 of features [n, d] and [m, d]."""
    metric = require("torchmetrics.image.fid").FrechetInceptionDistance(_AsGiven(a.shape[1]))
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return float(metric.compute())


def refuse_few(n: int) -> None:
    """UserError for fewer than FEWEST pictures."""
    if n < FEWEST:
        told = f"{n} pictures are too few for a Frechet distance, which takes {FEWEST}"
        raise UserError(
            f"{told}; set SEEDS_PER_PROMPT={FEWEST} or more, or give PROMPTS_FILE more prompts"
        )


def jackknife(n: int, of: Callable[[np.ndarray], np.ndarray]) -> list[dict]:
    """{"value", "ci95"} of each number that `of` makes of some of n pictures (their places).

    Pictures fall into GROUPS; se^2 = (G - 1)/G sum_g (of without g - mean)^2, and the interval is
    value -+ t_{G-1} se (Shao and Wu 1989).
    """
    refuse_few(n)
    everything, groups = np.arange(n), min(GROUPS, n // 2)
    value = of(everything)
    left = [of(everything[everything % groups != g]) for g in tqdm(range(groups), desc="Frechet")]
    spread = (groups - 1) / groups * np.square(np.array(left) - np.mean(left, axis=0)).sum(0)
    half = student.ppf(0.975, groups - 1) * np.sqrt(spread)
    return [
        {"value": float(v), "ci95": [float(v - h), float(v + h)]}
        for v, h in zip(value, half, strict=True)
    ]
