"""At which states a concept is scored.

trajectory   x_T of a seed -> DDIM under guidance by the concept; every state on the way is read
             once, at its own timestep. The published code begins anew for each level and labels
             a state with the timestep before it (1,275 guided steps for 50 levels; here 50).
noised       q(x_t | x0) of pictures of the concept, real or drawn by the model itself
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..gradients.state import State
from ..models.condition import Condition
from ..models.ddim import GuidedDenoiser, ddim_sample, q_sample, sampling_timesteps
from ..models.denoiser import Denoiser
from ..models.sample import initial_noise
from ..models.schedule import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Sampling:
    """Of trajectories: guidance weight (published: 3), DDIM steps (50), levels that are read."""

    guidance_scale: float = 3.0
    num_steps: int = 50
    num_levels: int = 50

    def levels(self) -> list[int]:
        """The timesteps that are read, evenly over the grid, the noisiest first."""
        grid = sampling_timesteps(self.num_steps)
        n = min(self.num_levels, len(grid))
        return (
            [grid[len(grid) * (2 * i + 1) // (2 * n)] for i in range(n)] if n < len(grid) else grid
        )


def trajectory(
    denoiser: Denoiser, cond: Condition, base: Condition, seed: int, sampling: Sampling
) -> list[State]:
    """States of one sample each along the trajectory of a seed."""
    x_T = initial_noise(denoiser.latent_shape, seed).to(denoiser.device, dtype_of(denoiser))
    guided = GuidedDenoiser(denoiser, cond, base, sampling.guidance_scale)
    levels = sampling.levels()
    _, states = ddim_sample(guided, x_T, sampling.num_steps, keep=set(levels))
    return [State(t, states[t], cond, base) for t in levels]


def generate(
    denoiser: Denoiser, cond: Condition, base: Condition, seed: int, sampling: Sampling
) -> torch.Tensor:
    """x0 [1, ...] that the model itself draws of the concept."""
    x_T = initial_noise(denoiser.latent_shape, seed).to(denoiser.device, dtype_of(denoiser))
    guided = GuidedDenoiser(denoiser, cond, base, sampling.guidance_scale)
    return ddim_sample(guided, x_T, sampling.num_steps)[0]


def noised_states(
    denoiser: Denoiser, x0: torch.Tensor, conds: tuple[Condition, Condition], seed: int, count: int
) -> list[State]:
    """`count` noisings of one picture x0 [1, ...], evenly over all levels, with known noise.

    conds: concept and base.
    """
    generator = torch.Generator().manual_seed(seed)
    states = []
    for i in range(count):
        t = NUM_TRAIN_TIMESTEPS * (2 * i + 1) // (2 * count)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t = q_sample(x0, eps, denoiser.schedule.level(t))
        states.append(State(t, x_t, *conds, eps=eps, x0=x0))
    return states


def dtype_of(denoiser: Denoiser) -> torch.dtype:
    """Of its weights."""
    return next(denoiser.network.parameters()).dtype
