"""What becomes of the weights that were chosen.

zero        w -> 0                              the published edit
scale       w -> (1 - strength) w
mean        w -> the mean of its row            what is left is the row's common part
gradient    a few steps w -> w - lr dJ/dw on the chosen weights alone, which lower J; normed so
            that one step of strength 1 moves them by strength x their own norm / steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..gradients.state import State
from ..models.denoiser import Denoiser
from .objective import ComponentObjective
from .parameter_groups import Component
from .scores import requires_grad_only
from .selection import Picked

OPERATORS = ("zero", "scale", "mean", "gradient")
STEPS = 5  # of operator gradient


@dataclass(frozen=True)
class Operator:
    """name: one of OPERATORS. strength: of scale (1 is zero) and gradient."""

    name: str = "zero"
    strength: float = 1.0


def new_values(
    operator: Operator, among: Sequence[Component], picked: Picked
) -> dict[str, torch.Tensor]:
    """{name: values [n] in the weight's dtype} of the chosen positions, without a model."""
    kind = {"zero": _zero, "scale": _scale, "mean": _mean}[operator.name]
    weights = {c.name: c.weight.detach() for c in among}
    return {
        name: kind(weights[name], index.to(weights[name].device), operator.strength)
        for name, index in picked.items()
    }


def _zero(weight: torch.Tensor, index: torch.Tensor, strength: float) -> torch.Tensor:
    return weight.new_zeros(len(index))


def _scale(weight: torch.Tensor, index: torch.Tensor, strength: float) -> torch.Tensor:
    return weight.flatten()[index] * (1 - strength)


def _mean(weight: torch.Tensor, index: torch.Tensor, strength: float) -> torch.Tensor:
    rows = weight.flatten(1)
    return rows.mean(1)[index // rows.shape[1]]


def gradient_values(
    operator: Operator,
    among: Sequence[Component],
    picked: Picked,
    asked: tuple[Denoiser, ComponentObjective, Sequence[State]],
) -> dict[str, torch.Tensor]:
    """Values of the chosen positions after STEPS normed descents of the aim; the network is left as
    it was. What the aim wants less of is J for erasing and -J for amplifying.
    """
    denoiser, aim, states = asked
    chosen = [c for c in among if c.name in picked]
    index = {c.name: picked[c.name].to(c.weight.device) for c in chosen}
    old = {c.name: c.weight.detach().flatten()[index[c.name]].clone() for c in chosen}
    targets = [aim.target(denoiser, s) for s in states]  # those of the network as it is
    size = torch.stack([v.norm() for v in old.values()]).norm()
    try:
        for _ in range(STEPS):
            with requires_grad_only(denoiser.network, chosen), torch.enable_grad():
                for state, target in zip(states, targets, strict=True):
                    (aim.removes * aim.of(denoiser, state, target).sum()).backward()
                down = {c.name: c.weight.grad.flatten()[index[c.name]] for c in chosen}
            norm = torch.stack([v.norm() for v in down.values()]).norm().clamp_min(1e-30)
            step = operator.strength * size / STEPS / norm
            for c in chosen:
                write_weights(
                    c.weight, index[c.name], _at(c.weight, index[c.name]) - step * down[c.name]
                )
        return {c.name: _at(c.weight, index[c.name]).clone() for c in chosen}
    finally:
        for c in chosen:
            write_weights(c.weight, index[c.name], old[c.name])


def _at(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return weight.detach().flatten()[index]


@torch.no_grad()
def write_weights(weight: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Write values [n] at flat positions of a weight, whatever its layout in memory."""
    places = torch.unravel_index(index, weight.shape)
    weight[places] = values.to(weight)
