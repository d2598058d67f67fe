"""The objectives as cotangents: every method is a choice of v in g = J_theta eps_hat^T v.

All signs are those of a loss gradient, so for two matching rows the inner product is positive and a
high score means "removing this image would weaken the concept". Constant factors are dropped: rows
are unit-normed or the score is linear in them.

    dsm       v = eps_hat - eps             grad of 1/2 ||eps_hat - eps||^2
              TRAK (Park et al. 2023; the "loss" of D-TRAK)
    dtrak     v = eps_hat                   grad of 1/2 ||eps_hat||^2
              D-TRAK (Zheng et al. 2024)
    das       v = sign(eps_hat)             grad of ||eps_hat||_1
              DAS (Lin et al. 2025), in the form Concept-TRAK uses; rows weighted by their losses
    das_mean  v = 1                         grad of the sum of eps_hat
              DAS as its paper has it; rows weighted by their residuals (`residual`)
    dps       v = g                         grad of 1/2 ||sg[eps_hat - g] - eps_hat||^2
              g = -d/dx_t mean((x0_hat - x0)^2)    (Concept-TRAK, D_train; Chung et al. 2023)
    presence  v = -(eps(c) - eps(c-))       grad of 1/2 ||sg[2 eps(c) - eps(c-)] - eps(c)||^2
              the concept slider of weight 1 (Gandikota et al. 2023); c- = "" asks how much the
              caption is present
    contrast  v as presence at c, -v at c-  grad of -1/2 ||eps(c) - eps(c-)||^2, nothing held fixed
    contrast_llr  as contrast; rows weighted by how well the caption fits the picture (`fit`)

dps points along +g because g raises log p(x0 | x_t) and eps-space is minus score-space: the target
is eps_hat - g, for the train rows and for exemplars alike. A concept query is presence or, where
the train rows are two-sided, contrast, of c+ and c-; a whole-image query has its train cotangent.

To add an objective, write its cotangent here, or anywhere, under `@objective("name")`. The module
imports no torch at its top: settings name the objectives without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry import OBJECTIVES
from . import caption_fit
from . import das_residual as residuals

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..models.condition import Condition
    from ..models.denoiser import Denoiser
    from .compute import Cotangent, GradientComputer, ProjectedGradients
    from .state import State
    from .states import TrainBatch


@dataclass(frozen=True)
class Objective:
    """cotangent: see `row.Cotangent`. two_sided: whether it differentiates c-, too.

    row_weight: of rows [n], from the number kept beside each [n] and those of all train rows [N];
    None is 1. beside: that number [B] of pictures (denoiser, x0, cond, cond_null); None: their
    losses. description: JSON of it, part of the rows' identity.
    """

    cotangent: Cotangent
    two_sided: bool = False
    row_weight: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    beside: Callable[[Denoiser, torch.Tensor, Condition, Condition], torch.Tensor] | None = None
    description: dict[str, Any] | None = None


def objective(name: str, **options: Any) -> Callable[[Cotangent], Cotangent]:
    """Register a cotangent as the objective F=name; options are fields of `Objective`."""

    def add(cotangent: Cotangent) -> Cotangent:
        OBJECTIVES.add(name, Objective(cotangent, **options))
        return cotangent

    return add


def train_gradients(maker: GradientComputer, name: str, shown: TrainBatch) -> ProjectedGradients:
    """Rows of train pictures by objective `name`; as their losses what it keeps beside them."""
    from .states import FitModel, train_states_of

    objective, denoiser = OBJECTIVES.get(name), maker.denoiser
    x0, cond, cond_null = shown.x0, shown.cond, shown.cond_null
    seen = train_states_of(denoiser, x0, cond, cond_null, shown.states)
    made = maker.rows(seen, objective.cotangent, len(x0))
    if objective.beside is None:
        return made
    judge = shown.judge or FitModel(denoiser, cond, cond_null)
    beside = objective.beside(judge.denoiser, x0, judge.cond, judge.cond_null)
    return made._replace(losses=beside)


def concept_cotangent(name: str) -> Cotangent:
    """The query cotangent of a concept for train rows of objective `name`."""
    return contrast if OBJECTIVES.get(name).two_sided else presence


@objective("contrast", two_sided=True)
def contrast(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """eps_hat [2b, ...], those of c first."""
    import torch

    from ..models.condition import Condition

    t = state.t if isinstance(state.t, int) else state.t.repeat(2)
    both = Condition.join([state.cond, state.cond_neg])
    eps_hat = denoiser.eps(torch.cat([state.x_t, state.x_t]), t, both)
    eps_pos, eps_neg = eps_hat.detach().chunk(2)
    return eps_hat, torch.cat([eps_neg - eps_pos, eps_pos - eps_neg])


objective(
    "contrast_llr",
    two_sided=True,
    row_weight=caption_fit.fit_weight,
    beside=caption_fit.caption_llr,
    description=caption_fit.DESCRIPTION,
)(contrast)


@objective("presence")
def presence(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """eps(c-) is held fixed."""
    import torch

    with torch.no_grad():
        eps_neg = denoiser.eps(state.x_t, state.t, state.cond_neg)
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, eps_neg - eps_hat.detach()


@objective("dps")
def dps(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """v = g, per sample: methods with a batch mean shrink with the batch size.

    Closed form: g = -(2 / (D alpha)) (r - sigma J_x^T r), r = x0_hat - x0, D values a sample, so
    J_x^T is applied to r once; the graph is kept for the weight VJP.
    """
    import torch

    from ..models.ddim import predict_x0
    from ..models.schedule import batched

    x_t = state.x_t.detach().requires_grad_()
    level = batched(denoiser.schedule, state.t, x_t)
    eps_hat = denoiser.eps(x_t, state.t, state.cond)
    r = (predict_x0(x_t, eps_hat, level) - state.x0).detach()
    jt_r = torch.autograd.grad(eps_hat, x_t, r, retain_graph=True)[0]
    return eps_hat, -(2 / (r[0].numel() * level.alpha)) * (r - level.sigma * jt_r)


@objective("dsm")
def dsm(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoising score matching residual."""
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, eps_hat.detach() - state.eps


@objective("dtrak")
def dtrak(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction itself."""
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, eps_hat.detach()


@objective("das", row_weight=lambda losses, among: losses)
def das(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """The sign of the prediction."""
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, eps_hat.detach().sign()


@objective(
    "das_mean",
    row_weight=lambda residuals, among: residuals,
    beside=residuals.residual,
    description=residuals.DESCRIPTION,
)
def das_mean(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """One everywhere."""
    import torch

    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, torch.ones_like(eps_hat)
