"""The objectives as cotangents: every method is a choice of v in g = J_theta eps_hat^T v.

All signs are those of a loss gradient, so for two matching rows the inner product is positive and a
high score means "removing this image would weaken the concept". Constant factors are dropped: rows
are unit-normed or the score is linear in them.

    dsm       v = eps_hat - eps                    grad of 1/2 ||eps_hat - eps||^2            TRAK (Park et al. 2023; D-TRAK's "loss")
    dtrak     v = eps_hat                          grad of 1/2 ||eps_hat||^2                  D-TRAK (Zheng et al. 2024)
    das       v = sign(eps_hat)                    grad of ||eps_hat||_1                      DAS, in the form Concept-TRAK uses
    dps       v = g                                grad of 1/2 ||sg[eps_hat - g] - eps_hat||^2  Concept-TRAK, eq. for D_train
              g = -d/dx_t mean((x0_hat - x0)^2)    guidance of diffusion posterior sampling (Chung et al. 2023)
    presence  v = -(eps(c) - eps(null))            reward: how much the caption is present; eps(null) held fixed
    contrast  v = -(eps(c) - eps(null)) at c, -v at null    grad of -1/2 ||eps(c) - eps(null)||^2, nothing held fixed
    slider    v = -(eps(c+) - eps(c-))             grad of 1/2 ||sg[eps(c+) + w (eps(c+) - eps(c-))] - eps(c+)||^2, concept slider
                                                   (Gandikota et al. 2023); with c- = "" it is the
                                                   CFG form

The slider has the one-sided form of presence and the two-sided form of contrast, too; a query takes
that of the train rows.

dps points along +g because g raises log p(x0 | x_t) and eps-space is minus score-space: the target
is eps_hat - g, for the train rows and for exemplars alike.
"""

from __future__ import annotations

import math

import torch

from ..models.ddim import predict_x0

TRAIN_OBJECTIVES = ("dsm", "dtrak", "das", "dps", "presence", "contrast")


def dsm(eps_hat: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Denoising score matching residual; both [B, ...]."""
    return eps_hat - eps


def dtrak(eps_hat: torch.Tensor) -> torch.Tensor:
    """D-TRAK's ||eps_hat||^2 [B, ...]."""
    return eps_hat


def das(eps_hat: torch.Tensor) -> torch.Tensor:
    """DAS in L1 form [B, ...]."""
    return eps_hat.sign()


def contrast(eps_pos: torch.Tensor, eps_neg: torch.Tensor) -> torch.Tensor:
    """Slider, CFG and presence: -(eps(c+) - eps(c-)) [B, ...]."""
    return eps_neg - eps_pos


def dps(
    eps_hat: torch.Tensor, x_t: torch.Tensor, x0: torch.Tensor, alpha_bar_t: float
) -> torch.Tensor:
    """DPS guidance g = -d/dx_t mean_D (x0_hat - x0)^2, per sample (methods with a batch mean shrink
    with the batch size).

    eps_hat must carry the graph back to x_t [B, ...], which must require grad; the graph is kept
    for the weight VJP. Closed form: g = -(2 / (D sqrt(abar))) (r - sqrt(1 - abar) J_x^T r), r =
    x0_hat - x0, so J_x^T is applied to r once.
    """
    r = (predict_x0(x_t, eps_hat, alpha_bar_t) - x0).detach()
    jt_r = torch.autograd.grad(eps_hat, x_t, r, retain_graph=True)[0]
    dimension = x0[0].numel()
    return -(2 / (dimension * math.sqrt(alpha_bar_t))) * (r - math.sqrt(1 - alpha_bar_t) * jt_r)
