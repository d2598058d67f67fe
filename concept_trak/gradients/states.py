"""Which states x_t a picture is seen at: train pictures (`TrainTimesteps`), queries
(`QueryTimesteps`).

    noising      q(x_t | x0) at the levels of `noise_levels`
    inversion    DDIM inversion of x0, guided (Concept-TRAK)
    trajectory   DDIM sampling from x_T, read at every level on the way: latent and timestep paired

A query's scope says which: "seed", trajectories from its own x_T, each draw with noise of its own
when eta > 0; "global", the same from a fresh x_T for every draw: the concept as such, not this
picture; "local", noisings of its picture, a fresh noise for every draw, or its inversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..models.condition import Condition
from ..models.ddim import (
    DdimNoise,
    GuidedDenoiser,
    ddim_invert,
    ddim_sample,
    implied_eps,
    inversion_timesteps,
    q_sample,
    randn,
    sampling_timesteps,
)
from ..models.denoiser import Denoiser
from ..models.schedule import NUM_TRAIN_TIMESTEPS
from .state import State


@dataclass(frozen=True)
class TrainTimesteps:
    """Which states x_t a train picture is seen at."""

    timesteps: tuple[int, ...]  # noise levels of the states
    inversion: bool  # DDIM inversion of x0, else q(x_t | x0) with one fixed noise per level
    guidance_scale: float  # of the inversion
    inversion_grid: tuple[int, ...]  # ascending timesteps the inversion walks through
    noise_seed: int = 42


@dataclass(frozen=True)
class QueryTimesteps:
    """Where a query's states come from."""

    scope: str  # seed | global | local
    num_draws: int
    timesteps: tuple[int, ...]  # levels read; for trajectories they must lie on the sampling grid
    num_steps: int = 50  # of the sampler
    guidance_scale: float = 1.0  # of the trajectory (against cond_null)
    eta: float = 0.1
    seed: int = 42
    inversion: TrainTimesteps | None = None  # scope local: invert instead of noising


@dataclass(frozen=True)
class QueryStart:
    """What a query's states begin at: its noise x_T and its picture's latents x0, both [1, ...]."""

    x_T: torch.Tensor | None = None
    x0: torch.Tensor | None = None


# ---- levels


def noise_levels(nfe: int) -> tuple[int, ...]:
    """nfe - 1 noise levels, evenly from 100 to 900; 500 for nfe = 2.

    For nfe = 10 the reference's 100, 200, ..., 900. The ends of the range are kept whatever the
    number: they say more about a concept than what lies between them.
    """
    return (500,) if nfe == 2 else tuple(100 + 800 * i // (nfe - 2) for i in range(nfe - 1))


def levels_on_grid(nfe: int, grid: Sequence[int], remedy: str) -> tuple[int, ...]:
    """`noise_levels` as members of a grid of timesteps.

    UserError, ending in `remedy`, when it is too coarse for them to differ.
    """
    chosen = tuple(grid[len(grid) * level // NUM_TRAIN_TIMESTEPS] for level in noise_levels(nfe))
    if len(set(chosen)) < len(chosen):
        raise UserError(
            f"NFE={nfe} asks for {nfe - 1} states between the levels 100 and 900 "
            f"of a grid of {len(grid)} steps; {remedy}"
        )
    return chosen


def reference_states(nfe: int, guidance_scale: float) -> TrainTimesteps:
    """The reference's 50-step inversion and nfe - 1 of its states.

    For nfe = 10 every fifth, t = 99, 199, ..., 899. UserError when 50 steps have not that many.
    """
    grid = inversion_timesteps(50)
    levels = levels_on_grid(nfe, grid, "lower NFE or use RECIPE=default")
    return TrainTimesteps(levels, True, guidance_scale, tuple(grid))


def noising_schedule(nfe: int, noise_seed: int = 42) -> TrainTimesteps:
    """q(x_t | x0) at `noise_levels`."""
    return TrainTimesteps(noise_levels(nfe), False, 1.0, (), noise_seed)


def inversion_schedule(nfe: int, guidance_scale: float) -> TrainTimesteps:
    """Inversion that walks on the grid of the states itself: nfe - 1 steps instead of 45."""
    levels = tuple(level - 1 for level in noise_levels(nfe))
    return TrainTimesteps(levels, True, guidance_scale, (0, *levels))


def trajectory_timesteps(nfe: int, num_steps: int) -> tuple[int, ...]:
    """nfe - 1 levels of the sampling grid, evenly over its inner four fifths.

    881, 781, ..., 81 for 10 of 50 steps. UserError when the grid is too short for them to differ.
    """
    grid = sampling_timesteps(num_steps)
    return levels_on_grid(nfe, grid, "raise GEN_NUM_INFERENCE_STEPS or lower NFE")


# ---- train pictures


def state_noise(states: TrainTimesteps, t: int, x0: torch.Tensor) -> torch.Tensor:
    """The fixed noise of level t [B, ...].

    The same for every sample, and so for every batch size, and on every device.
    """
    generator = torch.Generator().manual_seed(states.noise_seed * 1000 + t)
    return randn((1, *x0.shape[1:]), generator, x0).expand_as(x0)


@torch.no_grad()
def train_states_of(
    denoiser: Denoiser,
    x0: torch.Tensor,
    cond: Condition,
    cond_null: Condition,
    states: TrainTimesteps,
) -> Iterator[State]:
    """The states of pictures x0 [B, ...] under their captions cond, contrasted with cond_null.

    eps is the noise that belongs to *this* state. A prediction left in a state's `known` serves
    the next step of the inversion.
    """
    cond_null, known = cond_null.expand(len(cond)), {}
    if not states.inversion:
        for t in states.timesteps:
            eps = state_noise(states, t, x0)
            x_t = q_sample(x0, eps, denoiser.schedule.level(t))
            yield State(t, x_t, cond, cond_null, eps, x0)
        return
    guided, keep = (
        GuidedDenoiser(denoiser, cond, cond_null, states.guidance_scale),
        set(states.timesteps),
    )
    for t, x_t in ddim_invert(guided, x0, states.inversion_grid, keep, known):
        eps = implied_eps(x_t, x0, denoiser.schedule.level(t))
        yield State(t, x_t, cond, cond_null, eps, x0, known)


@dataclass(frozen=True)
class TrainBatch:
    """Train pictures x0 [B, ...] under their captions, and how they are seen."""

    x0: torch.Tensor
    cond: Condition
    cond_null: Condition
    states: TrainTimesteps
    judge: FitModel | None = None


@dataclass(frozen=True)
class FitModel:
    """Another model to ask how well captions fit, and its own encodings of the same captions."""

    denoiser: Denoiser
    cond: Condition
    cond_null: Condition


# ---- queries


def draw_noise(seed: int, draws: range, t: int, shape: Sequence[int]) -> torch.Tensor:
    """[len(draws), *shape] float32 on the CPU: each draw's noise at level t (1000: its x_T).

    Each draw has a stream of its own.
    """
    streams = (torch.Generator().manual_seed((seed * 1_000_003 + d) * 1009 + t) for d in draws)
    return torch.stack([torch.randn(shape, generator=g) for g in streams])


@torch.no_grad()
def query_states_of(
    denoiser: Denoiser,
    states: QueryTimesteps,
    start: QueryStart,
    cond: Condition,
    cond_null: Condition,
    batch_size: int = 8,
) -> Iterator[State]:
    """The states of all draws, at most `batch_size` samples at a time; conditions of one prompt.

    Scope seed begins at start.x_T, scope local at start.x0. A draw's noise depends on the seed and
    the draw's number only: the batch size changes nothing but the speed.
    """
    if states.scope == "local" and states.inversion is not None:
        yield from train_states_of(denoiser, start.x0, cond, cond_null, states.inversion)
        return
    for first in range(0, states.num_draws, batch_size):
        draws = range(first, min(first + batch_size, states.num_draws))

        def noise(t: int, draws: range = draws) -> torch.Tensor:
            return draw_noise(states.seed, draws, t, denoiser.latent_shape).to(cond.embeddings)

        conds = cond.expand(len(draws)), cond_null.expand(len(draws))
        if states.scope == "local":
            for t in states.timesteps:
                eps = noise(t)
                x0 = start.x0.expand_as(eps)
                x_t = q_sample(x0, eps, denoiser.schedule.level(t))
                yield State(t, x_t, *conds, eps, x0)
        else:
            x_T = None if states.scope == "global" else start.x_T.expand(len(draws), -1, -1, -1)
            yield from _trajectory(denoiser, states, x_T, conds, noise)


def _trajectory(
    denoiser: Denoiser,
    states: QueryTimesteps,
    x_T: torch.Tensor | None,
    conds: tuple[Condition, Condition],
    noise: Callable[[int], torch.Tensor],
) -> Iterator[State]:
    """States read on the way down from x_T, or from noise(1000) where there is none."""
    begin = noise(NUM_TRAIN_TIMESTEPS) if x_T is None else x_T
    guided = GuidedDenoiser(denoiser, *conds, states.guidance_scale)
    levels, churn = states.timesteps, DdimNoise(states.eta, noise)
    _, kept = ddim_sample(guided, begin, states.num_steps, churn, set(levels), min(levels))
    for t in levels:
        yield State(t, kept[t], *conds)
