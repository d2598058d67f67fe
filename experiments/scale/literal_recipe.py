"""The public Concept-TRAK recipe computed literally: slow on purpose, the measure of the engine's
speed and correctness.

Every quantity has a forward pass of its own, per-sample gradients are vmap(grad) of the scalar loss
over `functional_call`, the parameter-sized vectors are flattened, concatenated [B, P], normalised
and summed, and dattri projects them. Two things are not as published, because they are faults: the
guidance is divided by the pixels of one sample and not by the batch, and a query state is
differentiated at the noise level it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad, vmap

from concept_trak.gradients.select import select_parameters
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import (
    ddim_step,
    inversion_timesteps,
    predict_x0,
    randn,
    sampling_timesteps,
)
from concept_trak.models.denoiser import Denoiser

LOSS_SCALE = 1e4
INVERSION_STEPS = 50
STATE_STRIDE = 5  # every fifth of the inversion's states, and of the sampler's, is kept: nine
SLIDER_SCALE = 3.0
QUERY_SEED = 42
BATCH_SIZE = 4  # of the published run
# The published code draws s from 1..9; one of each has the expected cost exactly.
DRAWS = tuple(range(1, 10))


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


@dataclass(frozen=True)
class ReferenceImplementation:
    """The recipe for one denoiser. cond_null: of the empty prompt. layer: `select_parameters`."""

    denoiser: Denoiser
    cond_null: Condition
    layer: str
    proj_dim: int
    proj_seed: int

    def doubled_eps(self, x_t: torch.Tensor, t: int, cond: Condition, scale: float) -> torch.Tensor:
        """Classifier-free guidance by one forward of twice the batch, whatever the scale.

        At 1, half of it is for nothing.
        """
        both = Condition.join([self.cond_null.expand(len(cond)), cond])
        eps_null, eps_cond = self.denoiser.eps(torch.cat([x_t, x_t]), t, both).chunk(2)
        return eps_null + scale * (eps_cond - eps_null)

    @torch.no_grad()
    def invert(
        self, x0: torch.Tensor, cond: Condition, scale: float
    ) -> list[tuple[int, torch.Tensor]]:
        """49 of the 50 inversion steps; (t, x_t) for t = 99, 199, ..., 899.

        The steps after 899 are made and thrown away.
        """
        grid, x_t, states = inversion_timesteps(INVERSION_STEPS), x0, []
        level = self.denoiser.schedule.level
        for i, (t, t_next) in enumerate(zip(grid[:-2], grid[1:-1], strict=True)):
            x_t = ddim_step(x_t, self.doubled_eps(x_t, t, cond, scale), level(t), level(t_next))
            if i % STATE_STRIDE == STATE_STRIDE - 1:
                states.append((t_next, x_t))
        return states

    def dps_guidance(
        self, x_t: torch.Tensor, t: int, x0: torch.Tensor, cond: Condition
    ) -> torch.Tensor:
        """g = -d/dx_t of the mean over pixels of (x0_hat - x0)^2, by its own forward pass."""
        x_t = x_t.detach().requires_grad_()
        eps_hat = self.denoiser.eps(x_t, t, cond)
        x0_hat = predict_x0(x_t, eps_hat, self.denoiser.schedule.level(t))
        return -torch.autograd.grad((x0_hat - x0).square().flatten(1).mean(1).sum(), x_t)[0]

    def loss_gradients(
        self, x_t: torch.Tensor, t: int, cond: Condition, shift: torch.Tensor
    ) -> torch.Tensor:
        """[B, P] gradients of L = 1e4 mean((sg[eps_hat + shift] - eps_hat)^2) by vmap(grad)."""
        network = self.denoiser.network
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        selected = select_parameters(network, self.layer)
        timestep = torch.full((1,), t, device=x_t.device)

        def loss(chosen: dict, x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            arguments, options = (x[None], timestep), {"encoder_hidden_states": c[None]}
            eps_hat = functional_call(network, {**parameters, **chosen}, arguments, options).sample
            return LOSS_SCALE * ((eps_hat + s[None]).detach() - eps_hat).square().mean()

        chosen = {name: parameters[name] for name in selected}
        per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))
        grads = per_sample(chosen, x_t, cond.embeddings, shift)
        return torch.cat([grads[name].flatten(1) for name in selected], 1)

    def train_rows(self, x0: torch.Tensor, cond: Condition, scale: float) -> torch.Tensor:
        """Train rows [B, k] of x0 [B, C, h, w]; scale: guidance of the inversion."""
        total = 0
        for t, x_t in self.invert(x0, cond, scale):
            g = self.dps_guidance(x_t, t, x0, cond)
            total = total + unit_rows(self.loss_gradients(x_t, t, cond, -g))
        return project(total, self.proj_dim, self.proj_seed)

    def query_row(
        self,
        x_T: torch.Tensor,
        cond: Condition,
        cond_neg: Condition,
        draws: Sequence[int],
        scale: float,
        eta: float,
    ) -> torch.Tensor:
        """[1, k] concept gradient averaged over `draws`.

        Each entry s in 1..9 restarts the sampler at x_T and runs 5 s steps.
        """
        generator, total = torch.Generator().manual_seed(QUERY_SEED), 0
        for s in draws:
            t, x_t = self._state_after(x_T, STATE_STRIDE * s, cond, (scale, eta), generator)
            with torch.no_grad():
                more = self.denoiser.eps(x_t, t, cond) - self.denoiser.eps(x_t, t, cond_neg)
            total = total + unit_rows(self.loss_gradients(x_t, t, cond, SLIDER_SCALE * more))
        return project(total / len(draws), self.proj_dim, self.proj_seed)

    @torch.no_grad()
    def _state_after(
        self,
        x_t: torch.Tensor,
        steps: int,
        cond: Condition,
        sampler: tuple[float, float],
        generator: torch.Generator,
    ) -> tuple[int, torch.Tensor]:
        """(t, x_t) after `steps` steps of the 50-step sampler of (guidance scale, eta)."""
        (scale, eta), level = sampler, self.denoiser.schedule.level
        grid = sampling_timesteps(INVERSION_STEPS)
        for t, t_next in zip(grid[:steps], grid[1 : steps + 1], strict=True):
            eps_hat = self.doubled_eps(x_t, t, cond, scale)
            noise = randn(x_t.shape, generator, x_t)
            x_t = ddim_step(x_t, eps_hat, level(t), level(t_next), eta, noise)
        return grid[steps], x_t
