"""What a component is scored for: J of a concept c, and how J is asked of a state.

    erase     J = || sg[eps(c_b)] - eps(c) ||^2            CAD (Nguyen et al. 2025), erasing
    amplify   J = - mean (eps(c) - eps)^2                  CAD, amplifying: minus the training loss

c_b is the base condition (the empty prompt) and sg holds it fixed; the first is a sum over the
values of a sample, the second a mean, as published. Both have the form g = J_theta eps(c)^T v of
every row here, with cotangents v = 2 (eps(c) - eps(c_b)) and v = -2 (eps(c) - eps) / D.

CAD-Erase removes components of positive score (removing them lowers J), CAD-Amplify those of
negative score. Predictions are compared as eps whatever the network predicts (`models.schedule`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..gradients.state import State
from ..models.denoiser import Denoiser

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ComponentObjective:
    """An objective J. against: "base", eps(c_b), or "noise", the state's own eps.

    value: (eps_hat, target), both [B, ...] -> J [B]. removes: +1 where removing the highest scores
    serves it, -1 where removing the lowest does. bend: D, the values of a sample, -> half of J's
    second derivative by each of them.
    """

    name: str
    against: str
    value: Value
    removes: int
    bend: Callable[[int], float]

    def target(self, denoiser: Denoiser, state: State) -> torch.Tensor:
        """What eps(c) is compared with [B, ...], held fixed."""
        if self.against == "noise":
            assert state.eps is not None, "amplifying needs states whose noise is known"
            return state.eps
        with torch.no_grad():
            return denoiser.eps(state.x_t, state.t, state.cond_neg)

    def of(self, denoiser: Denoiser, state: State, target: torch.Tensor) -> torch.Tensor:
        """J [B] of a state against a target; with a graph to the weights where they want one."""
        return self.value(denoiser.eps(state.x_t, state.t, state.cond), target)


def _distance(eps_hat: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (eps_hat - target).square().flatten(1).sum(1)


def _minus_loss(eps_hat: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(eps_hat - target).square().flatten(1).mean(1)


def _of_distance(values: int) -> float:
    return 1.0


def _of_minus_loss(values: int) -> float:
    return -1.0 / values


COMPONENT_OBJECTIVES = {
    "erase": ComponentObjective("erase", "base", _distance, +1, _of_distance),
    "amplify": ComponentObjective("amplify", "noise", _minus_loss, -1, _of_minus_loss),
    # the control: erase what the training loss needs, in place of what moves the prediction
    "training_loss": ComponentObjective("training_loss", "noise", _minus_loss, +1, _of_minus_loss),
}


@torch.no_grad()
def mean_value(
    aim: ComponentObjective,
    denoiser: Denoiser,
    states: list[State],
    targets: list[torch.Tensor] | None = None,
) -> float:
    """Mean of J over states. targets: what eps(c) is compared with, those of an unedited model for
    J as it is defined (its base branch fixed); None: made anew.
    """
    targets = targets or [aim.target(denoiser, s) for s in states]
    found = [aim.of(denoiser, s, t) for s, t in zip(states, targets, strict=True)]
    return float(torch.cat(found).double().mean())
