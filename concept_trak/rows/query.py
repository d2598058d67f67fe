"""Query gradients: the row that asks "what taught the model this concept?".

    q = 1/n sum over states  P^T g / ||g||,     g = J_theta eps(x_t, t, c+)^T v,    v = -(eps(x_t, t, c+) - eps(x_t, t, c-))

and, two-sided (train rows of F=contrast), g = J_theta (eps(x_t, t, c+) - eps(x_t, t, c-))^T v.

The states x_t are read from whole trajectories: one pass gives every noise level, with latent and
timestep paired.
    scope "seed"    DDIM sampling from the query's own x_T; with eta > 0 each draw has noise of its own
    scope "global"  the same from a fresh x_T for every draw: the concept as such, not this picture
    scope "local"   noisings q(x_t | x0) of a given picture, a fresh noise for every draw, or its DDIM inversion

Whole-image methods (TRAK, D-TRAK, DAS) use the same states with their train cotangent
(`objectives`) and the caption c+.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..models import ddim as diffusion
from . import objectives
from .featurize import StateSettings, contrast, levels_on_grid, project_state, states_of
from .vjp import PerSampleVjp


@dataclass(frozen=True)
class QueryStates:
    """Where the query's states come from."""

    scope: str  # seed | global | local
    num_draws: int
    timesteps: tuple[
        int, ...
    ]  # noise levels read; for trajectories they must lie on the sampling grid
    num_steps: int = 50  # of the sampler
    guidance_scale: float = 1.0  # of the trajectory (against cond_null)
    eta: float = 0.1
    seed: int = 42
    inversion: StateSettings | None = None  # scope local: invert instead of noising


def trajectory_timesteps(nfe: int, num_steps: int) -> tuple[int, ...]:
    """nfe - 1 levels of the sampling grid, evenly over its inner four fifths: 881, 781, ..., 81 for
    10 of 50 steps.

    UserError when the grid is too short for them to differ.
    """
    return levels_on_grid(
        nfe, diffusion.sampling_timesteps(num_steps), "raise GEN_NUM_INFERENCE_STEPS or lower NFE"
    )


@torch.no_grad()
def read_states(
    denoiser, states: QueryStates, cond, cond_null, x_T=None, x0=None, batch_size: int = 8
):
    """Yield (t, x_t [b, ...], eps [b, ...] or None) for all draws, at most `batch_size` at a time.

    cond, cond_null: [1, T, d]. x_T [1, ...] for scope seed, x0 [1, ...] for scope local. eps is the
    state's own noise where known. A draw's noise depends on the seed and the draw's number only:
    the batch size changes nothing but the speed.
    """
    if states.scope == "local" and states.inversion is not None:
        yield from states_of(denoiser, x0, cond, cond_null, states.inversion)
        return
    shape = (
        x_T if x_T is not None else x0 if x0 is not None else torch.empty(1, *denoiser.latent_shape)
    ).shape[1:]
    for start in range(0, states.num_draws, batch_size):
        draws = range(start, min(start + batch_size, states.num_draws))
        n = len(draws)

        def noise(t):
            return draw_noise(states.seed, draws, t, shape).to(cond)

        if states.scope == "local":
            for t in states.timesteps:
                eps = noise(t)
                yield (
                    t,
                    diffusion.q_sample(x0.expand_as(eps), eps, diffusion.alpha_bar_at(denoiser, t)),
                    eps,
                )
            continue
        begin = (
            noise(diffusion.NUM_TRAIN_TIMESTEPS)
            if states.scope == "global"
            else x_T.expand(n, *shape)
        )
        _, kept = diffusion.ddim_sample(
            denoiser,
            begin,
            cond.expand(n, -1, -1),
            cond_null.expand(n, -1, -1),
            scale=states.guidance_scale,
            num_steps=states.num_steps,
            eta=states.eta,
            noise=noise,
            keep=set(states.timesteps),
            stop=min(states.timesteps),
        )
        for t in states.timesteps:
            yield t, kept[t], None


def draw_noise(seed: int, draws: range, t: int, shape) -> torch.Tensor:
    """[len(draws), *shape] float32 on the CPU: each draw's noise at level t (1000: its x_T) from a
    stream of its own.
    """
    streams = (torch.Generator().manual_seed((seed * 1_000_003 + d) * 1009 + t) for d in draws)
    return torch.stack([torch.randn(shape, generator=g) for g in streams])


def merged(read, batch_size: int):
    """The states of `read` in batches of at most `batch_size`, whatever their levels: (t [b], x_t
    [b, ...], eps [b, ...] or None).
    """
    states = (
        (t, x_t[i : i + 1], None if eps is None else eps[i : i + 1])
        for t, x_t, eps in read
        for i in range(len(x_t))
    )
    while batch := list(itertools.islice(states, batch_size)):
        t, x_t, eps = zip(*batch)
        yield torch.tensor(t), torch.cat(x_t), None if eps[0] is None else torch.cat(eps)


def concept_gradient(
    denoiser,
    projection,
    read,
    cond_plus: torch.Tensor,
    cond_minus: torch.Tensor,
    *,
    layer: str,
    normalize: bool,
    two_sided: bool = False,
    batch_size: int = 8,
) -> torch.Tensor:
    """[1, k] gradient of a contrast c+ against c-, averaged over the states of `read` (an iterable
    of (t, x_t, eps)); conds [1, T, d].

    two_sided: differentiate the prediction of c- as well.
    """
    total, count = torch.zeros(1, projection.proj_dim, device=cond_plus.device), 0
    with PerSampleVjp(denoiser.network, layer) as tape:
        for t, x_t, _ in merged(read, batch_size):
            n = len(x_t)
            with torch.enable_grad():
                eps_hat, v = contrast(
                    denoiser,
                    x_t,
                    t,
                    cond_plus.expand(n, -1, -1),
                    cond_minus.expand(n, -1, -1),
                    two_sided,
                )
                total += project_state(tape, projection, eps_hat, v, normalize, n).sum(
                    0, keepdim=True
                )
            count += n
    return total / count


def image_gradient(
    denoiser,
    projection,
    read,
    cond: torch.Tensor,
    objective: str,
    *,
    layer: str,
    normalize: bool,
    batch_size: int = 8,
) -> torch.Tensor:
    """[1, k] whole-image gradient (dsm, dtrak, das) averaged over noised states of the query
    picture.
    """
    total, count = torch.zeros(1, projection.proj_dim, device=cond.device), 0
    choose = {
        "dsm": objectives.dsm,
        "dtrak": lambda e, _: objectives.dtrak(e),
        "das": lambda e, _: objectives.das(e),
    }[objective]
    with PerSampleVjp(denoiser.network, layer) as tape, torch.enable_grad():
        for t, x_t, eps in merged(read, batch_size):
            eps_hat = denoiser.eps(x_t, t, cond.expand(len(x_t), -1, -1))
            total += project_state(
                tape, projection, eps_hat, choose(eps_hat.detach(), eps), normalize, len(x_t)
            ).sum(0, keepdim=True)
            count += len(x_t)
    return total / count
