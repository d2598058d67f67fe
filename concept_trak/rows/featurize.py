"""The one loop that turns (latents, conditions) into projected gradient rows: train set, exemplars
and queries alike.

    row_i = sum over states s of  P^T g_{i,s} / ||g_{i,s}||         g = J_theta eps_hat(x_t, t, c)^T v

Projection is linear, so a state's gradient is projected first and divided by the norm of the
*whole* gradient after; a parameter-sized vector per sample never exists. With BLOCKS=module the
norm is that of each module's gradient by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UserError
from ..models import ddim as diffusion
from . import objectives
from .vjp import PerSampleVjp


@dataclass(frozen=True)
class StateSettings:
    """Which states x_t a picture is seen at."""

    timesteps: tuple[int, ...]  # noise levels of the states
    inversion: bool  # DDIM inversion of x0, else q(x_t | x0) with one fixed noise per state
    guidance_scale: float  # of the inversion
    inversion_grid: tuple[int, ...]  # ascending timesteps the inversion walks through
    noise_seed: int = 42


def noise_levels(nfe: int) -> tuple[int, ...]:
    """nfe - 1 noise levels, evenly from 100 to 900: the reference's 100, 200, ..., 900 for nfe =
    10, and 500 for nfe = 2.

    The ends of the range are kept whatever the number: they say more about a concept than what lies
    between them.
    """
    return (500,) if nfe == 2 else tuple(100 + 800 * i // (nfe - 2) for i in range(nfe - 1))


def levels_on_grid(nfe: int, grid: list[int], remedy: str) -> tuple[int, ...]:
    """The levels of `noise_levels` as members of a grid of timesteps; UserError, ending in
    `remedy`, when it is too coarse for them to differ.
    """
    chosen = tuple(
        grid[len(grid) * level // diffusion.NUM_TRAIN_TIMESTEPS] for level in noise_levels(nfe)
    )
    if len(set(chosen)) < len(chosen):
        raise UserError(
            f"NFE={nfe} asks for {nfe - 1} states between the levels 100 and 900 of a grid of "
            f"{len(grid)} steps; {remedy}"
        )
    return chosen


def reference_states(nfe: int, guidance_scale: float) -> StateSettings:
    """The reference's 50-step inversion and nfe - 1 of its states; for nfe = 10 every fifth, t =
    99, 199, ..., 899.

    UserError when 50 steps do not have that many.
    """
    grid = diffusion.inversion_timesteps(50)
    return StateSettings(
        levels_on_grid(nfe, grid, "lower NFE or use RECIPE=default"),
        True,
        guidance_scale,
        tuple(grid),
    )


def noised_states(nfe: int, noise_seed: int = 42) -> StateSettings:
    """q(x_t | x0) at `noise_levels`."""
    return StateSettings(noise_levels(nfe), False, 1.0, (), noise_seed)


def inverted_states(nfe: int, guidance_scale: float) -> StateSettings:
    """DDIM inversion that walks on the grid of the states itself: nfe - 1 steps instead of 45."""
    levels = tuple(level - 1 for level in noise_levels(nfe))
    return StateSettings(levels, True, guidance_scale, (0, *levels))


def state_noise(states: StateSettings, t: int, x0: torch.Tensor) -> torch.Tensor:
    """The fixed noise of level t, the same for every sample (and so for every batch size) and on
    every device.
    """
    generator = torch.Generator().manual_seed(states.noise_seed * 1000 + t)
    return diffusion.randn((1, *x0.shape[1:]), generator, x0).expand_as(x0)


@torch.no_grad()
def states_of(
    denoiser,
    x0: torch.Tensor,
    cond: torch.Tensor,
    cond_null: torch.Tensor,
    states: StateSettings,
    known: dict | None = None,
):
    """Yield (t, x_t, eps) for x0 [B, ...]; eps is the noise that belongs to *this* state: (x_t -
    sqrt(abar) x0) / sqrt(1 - abar).

    known: see `ddim_invert`; predictions made at a yielded state serve the next step of the
    inversion.
    """
    if not states.inversion:
        for t in states.timesteps:
            eps = state_noise(states, t, x0)
            yield t, diffusion.q_sample(x0, eps, diffusion.alpha_bar_at(denoiser, t)), eps
        return
    for t, x_t in diffusion.ddim_invert(
        denoiser,
        x0,
        cond,
        cond_null,
        scale=states.guidance_scale,
        timesteps=states.inversion_grid,
        keep=set(states.timesteps),
        known=known,
    ):
        a = diffusion.alpha_bar_at(denoiser, t)
        yield t, x_t, (x_t - a**0.5 * x0) / (1 - a) ** 0.5


def cotangent(objective: str, denoiser, tape, x_t, t, x0, cond, cond_null, eps):
    """(eps_hat with its graph, v) of one state for a train objective; see `objectives`. The first B
    of eps_hat are those of cond.
    """
    if objective == "dps":
        x_t = x_t.detach().requires_grad_()
    if objective in ("presence", "contrast"):
        return contrast(denoiser, x_t, t, cond, cond_null, two_sided=objective == "contrast")
    eps_hat = denoiser.eps(x_t, t, cond)
    value = eps_hat.detach()
    if objective == "dps":
        return eps_hat, objectives.dps(eps_hat, x_t, x0, diffusion.alpha_bar_at(denoiser, t))
    choices = {
        "dsm": lambda: objectives.dsm(value, eps),
        "dtrak": lambda: objectives.dtrak(value),
        "das": lambda: objectives.das(value),
    }
    if objective not in choices:
        raise UserError(
            f"F={objective!r} is unknown; use one of {', '.join(objectives.TRAIN_OBJECTIVES)}"
        )
    return eps_hat, choices[objective]()


def contrast(denoiser, x_t, t, cond_plus, cond_minus, two_sided: bool):
    """(eps_hat with its graph, v) of c+ against c-, conds [B, T, d]: [B, ...] each or, two-sided,
    [2B, ...], c+ first.

    t: a number, or a tensor [B].
    """
    if two_sided:
        t = t.repeat(2) if isinstance(t, torch.Tensor) else t
        eps_hat = denoiser.eps(torch.cat([x_t, x_t]), t, torch.cat([cond_plus, cond_minus]))
        v = objectives.contrast(*eps_hat.detach().chunk(2))
        return eps_hat, torch.cat([v, -v])
    with torch.no_grad():
        eps_minus = denoiser.eps(x_t, t, cond_minus)
    eps_hat = denoiser.eps(x_t, t, cond_plus)
    return eps_hat, objectives.contrast(eps_hat.detach(), eps_minus)


def project_state(
    tape: PerSampleVjp,
    projection,
    eps_hat: torch.Tensor,
    v: torch.Tensor,
    normalize: bool,
    samples: int,
) -> torch.Tensor:
    """[samples, k] projected gradients of one state, each block of them unit-normed (a zero
    gradient stays zero) if asked.
    """
    out = torch.zeros(samples, projection.proj_dim, device=eps_hat.device)
    square = torch.zeros(samples, len(projection.widths), device=eps_hat.device)
    for g in tape.vjp(eps_hat, v, samples):
        projection.add(out, g)
        if normalize:
            square[:, projection.block_of(g.offset)] += g.sq_norm()
    if normalize:
        norm = torch.where(square > 0, square, 1).sqrt()
        out /= norm.repeat_interleave(torch.tensor(projection.widths, device=norm.device), 1)
    return out


def featurize(
    denoiser,
    projection,
    x0,
    cond,
    cond_null,
    *,
    layer: str,
    objective: str,
    states: StateSettings,
    normalize: bool,
):
    """Projected rows [B, k] float32 and DSM losses [B] (summed over the states) of a batch.

    x0 [B, C, h, w] scaled latents; cond [B, T, d]; cond_null [1, T, d].
    """
    cond_null = cond_null.expand_as(cond)
    rows = torch.zeros(len(x0), projection.proj_dim, device=x0.device)
    losses = torch.zeros(len(x0), device=x0.device)
    with PerSampleVjp(denoiser.network, layer) as tape:
        known = {}
        for t, x_t, eps in states_of(denoiser, x0, cond, cond_null, states, known):
            with torch.enable_grad():
                eps_hat, v = cotangent(objective, denoiser, tape, x_t, t, x0, cond, cond_null, eps)
                rows += project_state(tape, projection, eps_hat, v, normalize, len(x0))
            known[t] = eps_hat.detach()[: len(x0)]
            losses += (known[t] - eps).float().square().flatten(1).mean(1)
    return rows, losses
