"""Noise schedules: how much picture and noise a state holds, and what a network predicts.

    x_t = alpha(t) x0 + sigma(t) eps

| schedule           | alpha        | sigma            | output of the network            |
|--------------------|--------------|------------------|----------------------------------|
| VariancePreserving | sqrt(abar_t) | sqrt(1 - abar_t) | eps, or v = alpha eps - sigma x0 |
| FlowMatching       | 1 - s(t)     | s(t)             | v = eps - x0                     |

All else works on eps, which `to_eps` solves these equations for. Sources: Salimans & Ho 2022,
appendix D (v-prediction); Lipman et al. 2023 and Liu et al. 2023 (flow matching); Esser et al.
2024, "Scaling rectified flow transformers", eq. 23 (the shift of its levels).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import UserError

NUM_TRAIN_TIMESTEPS = 1000


class NoiseLevel(NamedTuple):
    """Shares of picture and noise in a state; numbers, or tensors that broadcast over a batch."""

    alpha: Any
    sigma: Any


class Schedule(Protocol):
    """t -> (alpha, sigma), and the type of the network's prediction."""

    prediction: str

    def level(self, t: int) -> NoiseLevel:
        """Shares at timestep t; t < 0 is the end of sampling."""
        ...

    def to_eps(
        self, output: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor
    ) -> torch.Tensor:
        """The network's output as eps_hat, all [B, ...]; t a number or [B] on the CPU."""
        ...


class VariancePreserving:
    """DDPM's: alpha^2 + sigma^2 = 1. alpha_bar: float64 [T] on the CPU.

    UserError for a prediction other than "epsilon" and "v_prediction".
    """

    def __init__(self, alpha_bar: torch.Tensor, prediction: str = "epsilon") -> None:
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"prediction type {prediction!r} is not supported; "
                "set SD_MODEL_PATH to an epsilon or v_prediction model"
            )
        self.alpha_bar, self.prediction = alpha_bar.double().cpu(), prediction

    def level(self, t: int) -> NoiseLevel:
        """At t < 0 that of abar_0, as Stable Diffusion has it (set_alpha_to_one = False)."""
        a = float(self.alpha_bar[max(t, 0)])
        return NoiseLevel(math.sqrt(a), math.sqrt(1 - a))

    def to_eps(
        self, output: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor
    ) -> torch.Tensor:
        """eps = alpha v + sigma x_t."""
        if self.prediction == "epsilon":
            return output
        alpha, sigma = batched(self, t, x_t)
        return alpha * output + sigma * x_t


class FlowMatching:
    """Straight paths from picture to noise; levels 0, ..., num_levels, shifted towards noise.

    s(t) = shift u / (1 + (shift - 1) u),    u = t / num_levels
    """

    prediction = "flow"

    def __init__(self, num_levels: int = NUM_TRAIN_TIMESTEPS, shift: float = 1.0) -> None:
        self.num_levels, self.shift = num_levels, shift

    def level(self, t: int) -> NoiseLevel:
        """At t < 0 that of t = 0, the clean picture."""
        u = max(t, 0) / self.num_levels
        s = self.shift * u / (1 + (self.shift - 1) * u)
        return NoiseLevel(1 - s, s)

    def to_eps(
        self, output: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor
    ) -> torch.Tensor:
        """eps = x_t + alpha v, since x_t = alpha x0 + (1 - alpha) eps."""
        return x_t + batched(self, t, x_t).alpha * output


def batched(schedule: Schedule, t: int | torch.Tensor, like: torch.Tensor) -> NoiseLevel:
    """The level of each sample as tensors [B, 1, ...] in dtype and device of `like` [B, ...]."""
    if isinstance(t, int):
        return schedule.level(t)
    shape = (-1, *[1] * (like.dim() - 1))
    levels = torch.tensor([schedule.level(i) for i in t.tolist()], dtype=torch.float64)
    alpha, sigma = (part.view(shape).to(like) for part in levels.unbind(1))
    return NoiseLevel(alpha, sigma)
