"""The residual of a training picture, as DAS weights rows by it.

    e_i = mean over t of sqrt(MSE_i,t) / || (sqrt(MSE_i,t'))_t' ||_2
    MSE_i,t = mean((eps_theta(x_t, t, c_i) - eps)^2)

(Lin et al. 2025, "Diffusion Attribution Score", the error term of its released formula). Every
picture meets the same noises, so a value does not depend on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..models.condition import Condition
    from ..models.denoiser import Denoiser

LEVELS, SEED = tuple(range(50, 1000, 100)), 11  # noise levels, seed of their noises
DESCRIPTION = {"residual_levels": list(LEVELS), "residual_seed": SEED}  # part of a row's identity


def residual(
    denoiser: Denoiser, x0: torch.Tensor, cond: Condition, cond_null: Condition
) -> torch.Tensor:
    """e [B] of pictures x0 [B, ...] under their captions."""
    import torch

    from ..models.ddim import q_sample
    from .states import draw_noise

    found = []
    with torch.no_grad():
        for t in LEVELS:
            eps = draw_noise(SEED, range(1), t, x0.shape[1:]).to(x0).expand_as(x0)
            x_t = q_sample(x0, eps, denoiser.schedule.level(t))
            error = (denoiser.eps(x_t, t, cond) - eps).float().square().flatten(1).mean(1)
            found.append(error.sqrt())
    roots = torch.stack(found, 1)
    return (roots / roots.norm(dim=1, keepdim=True)).mean(1)
