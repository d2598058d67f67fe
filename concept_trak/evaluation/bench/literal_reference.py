"""The public Concept-TRAK recipe computed literally: slow on purpose, the measure of the engine's
speed and correctness.

Every quantity has a forward pass of its own, per-sample gradients are vmap(grad) of the scalar loss
over `functional_call`, the parameter-sized vectors are flattened, concatenated [B, P], normalised
and summed, and dattri projects them. Two things are not as published, because they are faults: the
guidance is divided by the pixels of one sample and not by the batch, and a query state is
differentiated at the noise level it has.
"""

from __future__ import annotations

import torch
from torch.func import functional_call, grad, vmap

from ...models import ddim as diffusion
from ...rows.vjp import select_parameters

LOSS_SCALE = 1e4
INVERSION_STEPS = 50
STATE_STRIDE = 5  # every fifth of the inversion's states, and of the sampler's, is kept: nine
SLIDER_SCALE = 3.0


def doubled_eps(denoiser, x_t, t: int, cond, cond_null, scale: float) -> torch.Tensor:
    """Classifier-free guidance by one forward of twice the batch, whatever the scale (at 1, half of
    it is for nothing).
    """
    both = torch.cat([cond_null.expand_as(cond), cond])
    eps_null, eps_cond = denoiser.eps(torch.cat([x_t, x_t]), t, both).chunk(2)
    return eps_null + scale * (eps_cond - eps_null)


@torch.no_grad()
def invert(denoiser, x0, cond, cond_null, scale: float) -> list[tuple[int, torch.Tensor]]:
    """49 of the 50 inversion steps; (t, x_t) for t = 99, 199, ..., 899. The steps after 899 are
    made and thrown away.
    """
    grid, x_t, states = diffusion.inversion_timesteps(INVERSION_STEPS), x0, []
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        if i == INVERSION_STEPS - 1:
            break
        eps_hat = doubled_eps(denoiser, x_t, t, cond, cond_null, scale)
        x_t = diffusion.ddim_step(
            x_t, eps_hat, float(denoiser.alpha_bar[t]), float(denoiser.alpha_bar[t_next])
        )
        if i % STATE_STRIDE == STATE_STRIDE - 1:
            states.append((t_next, x_t))
    return states


def dps_guidance(denoiser, x_t, t: int, x0, cond) -> torch.Tensor:
    """g = -d/dx_t of the mean over pixels of (x0_hat - x0)^2, by a forward pass and autograd of its
    own.
    """
    x_t = x_t.detach().requires_grad_()
    x0_hat = diffusion.predict_x0(x_t, denoiser.eps(x_t, t, cond), float(denoiser.alpha_bar[t]))
    return -torch.autograd.grad((x0_hat - x0).square().flatten(1).mean(1).sum(), x_t)[0]


def loss_gradients(denoiser, selected: dict, x_t, t: int, cond, shift) -> torch.Tensor:
    """[B, P] gradients of L = 1e4 mean((sg[eps_hat + shift] - eps_hat)^2) by vmap(grad), flattened
    and concatenated.
    """
    parameters = {name: p.detach() for name, p in denoiser.network.named_parameters()}
    timestep = torch.full((1,), t, device=x_t.device)

    def loss(chosen, x, c, s):
        eps_hat = functional_call(
            denoiser.network,
            {**parameters, **chosen},
            (x[None], timestep),
            {"encoder_hidden_states": c[None]},
        ).sample
        return LOSS_SCALE * ((eps_hat + s[None]).detach() - eps_hat).square().mean()

    grads = vmap(grad(loss), in_dims=(None, 0, 0, 0))(
        {name: parameters[name] for name in selected}, x_t, cond, shift
    )
    return torch.cat([grads[name].flatten(1) for name in selected], 1)


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their L2 norm; a zero row stays zero."""
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, torch.ones_like(norm))


def project(rows: torch.Tensor, proj_dim: int, proj_seed: int) -> torch.Tensor:
    """[B, k] by dattri's random mask, called with the reference's arguments."""
    from dattri.func.projection import random_project

    return random_project(
        torch.empty(1, rows.shape[1]),
        1,
        proj_dim=proj_dim,
        proj_max_batch_size=16,
        proj_seed=proj_seed,
        proj_type="random_mask",
        device="cpu",
    )(rows.float())


def train_rows(
    denoiser, x0, cond, cond_null, *, layer: str, scale: float, proj_dim: int, proj_seed: int
) -> torch.Tensor:
    """Train rows [B, k] of x0 [B, C, h, w] with captions cond [B, T, d]; cond_null [1, T, d];
    scale: guidance of the inversion.
    """
    selected, total = select_parameters(denoiser.network, layer), 0
    for t, x_t in invert(denoiser, x0, cond, cond_null, scale):
        g = dps_guidance(denoiser, x_t, t, x0, cond)
        total = total + unit_rows(loss_gradients(denoiser, selected, x_t, t, cond, -g))
    return project(total, proj_dim, proj_seed)


@torch.no_grad()
def state_after(
    denoiser, x_t, steps: int, cond, cond_null, *, scale: float, eta: float, generator
) -> tuple[int, torch.Tensor]:
    """(t, x_t) after `steps` steps of the 50-step DDIM sampler; the noise comes from `generator`."""
    grid = diffusion.sampling_timesteps(INVERSION_STEPS)
    for t, t_next in zip(grid[:steps], grid[1:]):
        eps_hat = doubled_eps(denoiser, x_t, t, cond, cond_null, scale)
        noise = diffusion.randn(x_t.shape, generator, x_t)
        x_t = diffusion.ddim_step(
            x_t,
            eps_hat,
            float(denoiser.alpha_bar[t]),
            float(denoiser.alpha_bar[t_next]),
            eta,
            noise,
        )
    return grid[steps], x_t


def query_row(
    denoiser,
    x_T,
    cond,
    cond_neg,
    cond_null,
    *,
    layer: str,
    draws: list[int],
    scale: float,
    eta: float,
    proj_dim: int,
    proj_seed: int,
    seed: int = 42,
) -> torch.Tensor:
    """[1, k] concept gradient averaged over `draws`: each entry s in 1..9 restarts the sampler at
    x_T and runs 5 s steps.
    """
    selected, generator, total = (
        select_parameters(denoiser.network, layer),
        torch.Generator().manual_seed(seed),
        0,
    )
    for s in draws:
        t, x_t = state_after(
            denoiser,
            x_T,
            STATE_STRIDE * s,
            cond,
            cond_null,
            scale=scale,
            eta=eta,
            generator=generator,
        )
        with torch.no_grad():
            shift = SLIDER_SCALE * (denoiser.eps(x_t, t, cond) - denoiser.eps(x_t, t, cond_neg))
        total = total + unit_rows(loss_gradients(denoiser, selected, x_t, t, cond, shift))
    return project(total / len(draws), proj_dim, proj_seed)
