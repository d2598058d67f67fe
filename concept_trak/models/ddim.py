"""Noise schedule, guided prediction, DDIM sampling and inversion (Song et al. 2021, "Denoising
diffusion implicit models").

    q(x_t | x0) = N(sqrt(abar_t) x0, (1 - abar_t) I)
    x0_hat      = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t)
    x_s         = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sigma z                       (eq. 12)
    sigma       = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)                         (eq. 16)
    eps_guided  = eps(null) + w (eps(cond) - eps(null))                          (Ho & Salimans 2022, classifier-free guidance)

Inversion is the same step with s > t and sigma = 0. A denoiser is anything with `eps(x_t, t, cond)`
and `alpha_bar` [T].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

NUM_TRAIN_TIMESTEPS = 1000


def q_sample(x0: torch.Tensor, eps: torch.Tensor, alpha_bar_t: float) -> torch.Tensor:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps; x0 and eps [B, ...]."""
    return math.sqrt(alpha_bar_t) * x0 + math.sqrt(1 - alpha_bar_t) * eps


def predict_x0(x_t: torch.Tensor, eps_hat: torch.Tensor, alpha_bar_t: float) -> torch.Tensor:
    """x0_hat from x_t and eps_hat, both [B, ...]."""
    return (x_t - math.sqrt(1 - alpha_bar_t) * eps_hat) / math.sqrt(alpha_bar_t)


def ddim_step(
    x_t: torch.Tensor,
    eps_hat: torch.Tensor,
    alpha_bar_t: float,
    alpha_bar_s: float,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One DDIM step from noise level t to s (down: sampling, up: inversion with eta = 0); tensors
    [B, ...].
    """
    sigma = (
        0.0
        if eta == 0
        else eta
        * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
    )
    x_s = (
        math.sqrt(alpha_bar_s) * predict_x0(x_t, eps_hat, alpha_bar_t)
        + math.sqrt(1 - alpha_bar_s - sigma**2) * eps_hat
    )
    return x_s if sigma == 0 else x_s + sigma * noise


def guided_eps(
    denoiser,
    x_t: torch.Tensor,
    t: int,
    cond: torch.Tensor,
    cond_null: torch.Tensor | None,
    scale: float,
    eps_cond: torch.Tensor | None = None,
) -> torch.Tensor:
    """Classifier-free guidance with weight `scale`: 1 costs one forward of the conditional branch,
    0 one of the other.

    eps_cond: the conditional prediction, where it is known already.
    """
    if scale == 1:
        return denoiser.eps(x_t, t, cond) if eps_cond is None else eps_cond
    if scale == 0:
        return denoiser.eps(x_t, t, cond_null)
    if eps_cond is not None:
        return (1 - scale) * denoiser.eps(x_t, t, cond_null) + scale * eps_cond
    eps_null, eps_cond = denoiser.eps(torch.cat([x_t, x_t]), t, torch.cat([cond_null, cond])).chunk(
        2
    )
    return eps_null + scale * (eps_cond - eps_null)


def sampling_timesteps(num_steps: int) -> list[int]:
    """diffusers' "leading" grid with steps_offset 1: for 50 steps 981, 961, ..., 1."""
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    return [i * stride + 1 for i in range(num_steps)][::-1]


def inversion_timesteps(num_steps: int) -> list[int]:
    """Grid of the reference's inversion: floor(linspace(0, 1, n + 1) * 999 + 1e-6); for 50 steps 0,
    19, 39, ..., 979, 999.
    """
    grid = (
        torch.linspace(0, 1, num_steps + 1, dtype=torch.float32) * (NUM_TRAIN_TIMESTEPS - 1) + 1e-6
    )
    return grid.floor().long().tolist()


def alpha_bar_at(denoiser, t: int) -> float:
    """abar_t as a Python float; t < 0 means the end of sampling, which SD sets to abar_0
    (set_alpha_to_one = False).
    """
    return float(denoiser.alpha_bar[max(t, 0)])


@torch.no_grad()
def ddim_sample(
    denoiser,
    x_T: torch.Tensor,
    cond,
    cond_null,
    *,
    scale: float,
    num_steps: int,
    eta: float = 0.0,
    noise: Callable[[int], torch.Tensor] | None = None,
    keep: set[int] = frozenset(),
    stop: int | None = None,
):
    """Sample from x_T [B, ...] down the grid of `sampling_timesteps`.

    Returns (x0, states): `states[t]` is the state at noise level t, that is before its step, for t
    in `keep`. With `stop`, a level of the grid, sampling ends there and that state is returned
    instead of x0. With eta > 0 the noise of the step that leaves level t is `noise(t)` [B, ...].
    """
    timesteps, x_t, states = sampling_timesteps(num_steps), x_T, {}
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    for t in timesteps:
        if t in keep:
            states[t] = x_t
        if t == stop:
            break
        eps_hat = guided_eps(denoiser, x_t, t, cond, cond_null, scale)
        z = noise(t) if eta else None
        x_t = ddim_step(
            x_t, eps_hat, alpha_bar_at(denoiser, t), alpha_bar_at(denoiser, t - stride), eta, z
        )
    return x_t, states


@torch.no_grad()
def ddim_invert(
    denoiser,
    x0: torch.Tensor,
    cond,
    cond_null,
    *,
    scale: float,
    timesteps: Sequence[int],
    keep: set[int],
    known: dict[int, torch.Tensor] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Deterministic inversion of x0 [B, ...] up the ascending grid `timesteps`; yields (t, x_t) for
    t in `keep`.

    The prediction of a step is evaluated at the lower timestep (as in the reference); steps after
    max(keep) are not run. A step that starts at t uses eps(x_t, t, cond) from `known[t]` if the
    caller put it there after x_t was yielded.
    """
    x_t, last, known = x0, max(keep), {} if known is None else known
    for t, t_next in zip(timesteps, timesteps[1:]):
        if t >= last:
            break
        eps_hat = guided_eps(denoiser, x_t, t, cond, cond_null, scale, known.pop(t, None))
        x_t = ddim_step(x_t, eps_hat, alpha_bar_at(denoiser, t), alpha_bar_at(denoiser, t_next))
        if t_next in keep:
            yield t_next, x_t


def randn(shape, generator: torch.Generator | None, like: torch.Tensor) -> torch.Tensor:
    """Standard normal drawn in float32 on the CPU from `generator`, then moved to `like`'s device
    and dtype.
    """
    return torch.randn(shape, generator=generator).to(like)
