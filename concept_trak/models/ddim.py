"""Guided prediction, DDIM sampling and inversion (Song et al. 2021).

    x_t        = alpha_t x0 + sigma_t eps                                   (`schedule`)
    x0_hat     = (x_t - sigma_t eps_hat) / alpha_t
    x_s        = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + tau z   (eq. 12)
    tau        = eta sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2)   (eq. 16)
    eps_guided = eps(null) + w (eps(cond) - eps(null))                      (Ho & Salimans 2022)

Equations 12 and 16 are given in alpha and sigma, so that they hold for every schedule. Inversion is
the same step with s > t and eta = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .condition import Condition
from .denoiser import Denoiser
from .schedule import NUM_TRAIN_TIMESTEPS, NoiseLevel


def q_sample(x0: torch.Tensor, eps: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """x_t = alpha x0 + sigma eps; x0 and eps [B, ...]."""
    return level.alpha * x0 + level.sigma * eps


def predict_x0(x_t: torch.Tensor, eps_hat: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """x0_hat from x_t and eps_hat, both [B, ...]."""
    return (x_t - level.sigma * eps_hat) / level.alpha


def implied_eps(x_t: torch.Tensor, x0: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """The eps that belongs to a state: (x_t - alpha x0) / sigma, all [B, ...]."""
    return (x_t - level.alpha * x0) / level.sigma


@dataclass(frozen=True)
class DdimNoise:
    """DDIM's eta, and the noise z [B, ...] of the step that leaves level t."""

    eta: float
    noise: Callable[[int], torch.Tensor]


def ddim_step(
    x_t: torch.Tensor,
    eps_hat: torch.Tensor,
    now: NoiseLevel,
    then: NoiseLevel,
    eta: float = 0.0,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step from `now` to `then` (down: sampling, up: inversion, eta = 0); tensors [B, ...]."""
    kept = now.sigma**2 - (now.alpha * then.sigma / then.alpha) ** 2 if eta else 0.0
    tau = eta * then.sigma / now.sigma * math.sqrt(max(kept, 0.0)) if eta else 0.0
    direction = math.sqrt(then.sigma**2 - tau**2) if tau else then.sigma
    x_s = then.alpha * predict_x0(x_t, eps_hat, now) + direction * eps_hat
    return x_s if tau == 0 else x_s + tau * z


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser under classifier-free guidance of weight `scale`; conditions of B prompts each."""

    denoiser: Denoiser
    cond: Condition
    cond_null: Condition | None
    scale: float

    def eps(self, x_t: torch.Tensor, t: int, known: torch.Tensor | None = None) -> torch.Tensor:
        """eps_guided [B, ...]; weight 1 costs a forward of the conditional branch, 0 of the other.

        known: the conditional prediction, where it has been made already.
        """
        predict = self.denoiser.eps
        if self.scale == 1:
            return predict(x_t, t, self.cond) if known is None else known
        if self.scale == 0:
            return predict(x_t, t, self.cond_null)
        if known is not None:
            return (1 - self.scale) * predict(x_t, t, self.cond_null) + self.scale * known
        both = Condition.join([self.cond_null, self.cond])
        eps_null, eps_cond = predict(torch.cat([x_t, x_t]), t, both).chunk(2)
        return eps_null + self.scale * (eps_cond - eps_null)


def sampling_timesteps(num_steps: int) -> list[int]:
    """diffusers' "leading" grid with steps_offset 1: for 50 steps 981, 961, ..., 1."""
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    return [i * stride + 1 for i in range(num_steps)][::-1]


def inversion_timesteps(num_steps: int) -> list[int]:
    """Grid of the reference's inversion: floor(linspace(0, 1, n + 1) * 999 + 1e-6).

    For 50 steps 0, 19, 39, ..., 979, 999.
    """
    grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float32)
    return (grid * (NUM_TRAIN_TIMESTEPS - 1) + 1e-6).floor().long().tolist()


@torch.no_grad()
def ddim_sample(
    guided: GuidedDenoiser,
    x_T: torch.Tensor,
    num_steps: int,
    churn: DdimNoise | None = None,
    keep: set[int] | frozenset[int] = frozenset(),
    stop: int | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Sample from x_T [B, ...] down the grid of `sampling_timesteps`.

    Returns (x0, states): `states[t]` is the state at noise level t, that is before its step, for t
    in `keep`. With `stop`, a level of the grid, sampling ends there and that state is returned
    instead of x0.
    """
    schedule, x_t, states = guided.denoiser.schedule, x_T, {}
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    for t in sampling_timesteps(num_steps):
        if t in keep:
            states[t] = x_t
        if t == stop:
            break
        eps_hat = guided.eps(x_t, t)
        eta, z = (churn.eta, churn.noise(t)) if churn and churn.eta else (0.0, None)
        x_t = ddim_step(x_t, eps_hat, schedule.level(t), schedule.level(t - stride), eta, z)
    return x_t, states


@torch.no_grad()
def ddim_invert(
    guided: GuidedDenoiser,
    x0: torch.Tensor,
    timesteps: Sequence[int],
    keep: set[int],
    known: dict[int, torch.Tensor] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Deterministic inversion of x0 [B, ...] up the ascending grid `timesteps`; (t, x_t) of `keep`.

    The prediction of a step is evaluated at the lower timestep (as in the reference); steps after
    max(keep) are not run. A step that starts at t uses eps(x_t, t, cond) from `known[t]` if the
    caller put it there after x_t was yielded.
    """
    x_t, schedule, known = x0, guided.denoiser.schedule, {} if known is None else known
    for t, t_next in zip(timesteps, timesteps[1:], strict=False):
        if t >= max(keep):
            break
        eps_hat = guided.eps(x_t, t, known.pop(t, None))
        x_t = ddim_step(x_t, eps_hat, schedule.level(t), schedule.level(t_next))
        if t_next in keep:
            yield t_next, x_t


def randn(shape: Sequence[int], generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal drawn in float32 on the CPU, then moved to `like`'s device and dtype."""
    return torch.randn(shape, generator=generator).to(like)
