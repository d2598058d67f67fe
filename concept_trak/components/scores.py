"""Component scores: alpha_i = w_i dJ/dw_i, the first-order effect of knocking weight i out (CAD).

    J(w with S zeroed) - J(w)  ~  - sum_{i in S} alpha_i

One backward pass a state gives the gradient of all selected weights at once. Over the seeds (one
trajectory each) mean and standard error of alpha are kept, in fp32, by Welford's recurrence; so
memory is three copies of the selected tensors: the gradient of a seed, the mean, the squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..gradients.state import State
from ..models.denoiser import Denoiser
from .objective import ComponentObjective
from .parameter_groups import Component

StatesOf = Callable[[int], Sequence[State]]  # seed -> its states, levels in the same order


@dataclass
class Scores:
    """alpha of weights. mean, stderr {name: weight's shape, fp32 on the CPU}; stderr is of the mean
    over seeds, infinite for one seed alone.

    levels [T]: timesteps. profile [T, components]: sums of alpha by level, mean over seeds and
    divided by T, so that it sums to the components' totals. about: what it was made from (JSON).
    """

    aim: str
    mean: dict[str, torch.Tensor]
    stderr: dict[str, torch.Tensor]
    levels: list[int]
    profile: np.ndarray
    about: dict[str, Any] = field(default_factory=dict)

    def z(self, name: str) -> torch.Tensor:
        """Mean in standard errors, 0 where both are 0."""
        mean, stderr = self.mean[name], self.stderr[name]
        return torch.where(mean == 0, 0, mean / stderr)

    def names(self) -> tuple[str, ...]:
        """Of the scored weights, in the order of `profile`."""
        return tuple(self.mean)


@contextmanager
def requires_grad_only(network: nn.Module, chosen: Sequence[Component]) -> Iterator[None]:
    """These weights of a network want a gradient inside the block, and no others; afterwards all is
    as it was, without gradients.
    """
    before = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(False)
    try:
        for c in chosen:
            c.weight.requires_grad_(True)
            c.weight.grad = None
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        for c in chosen:
            c.weight.grad = None


def score(
    denoiser: Denoiser,
    aim: ComponentObjective,
    chosen: Sequence[Component],
    states_of: StatesOf,
    num_seeds: int,
) -> Scores:
    """Score the chosen components of a denoiser over the states of seeds 0, ..., num_seeds - 1.

    UserError where a weight takes no part in the prediction, or a score is not finite.
    """
    if any(c.weight.dtype != torch.float32 for c in chosen):
        raise UserError("scores are made of fp32 weights; set DTYPE=fp32")
    mean = [torch.zeros_like(c.weight) for c in chosen]
    square = [torch.zeros_like(c.weight) for c in chosen]
    profile: list[np.ndarray] = []
    levels: list[int] = []
    with requires_grad_only(denoiser.network, chosen):
        for n in tqdm(range(num_seeds), desc=f"scores, {aim.name}", disable=num_seeds < 2):
            states = states_of(n)
            levels = [int(s.t) for s in states]
            profile.append(_accumulate(denoiser, aim, chosen, states))
            for c, m, sq in zip(chosen, mean, square, strict=True):
                assert c.weight.grad is not None
                _welford(m, sq, c.weight.grad.mul_(c.weight.detach() / len(states)), n + 1)
                c.weight.grad.zero_()
    for c, m, sq in zip(chosen, mean, square, strict=True):
        _refuse_nan(c.name, m)
        scale = 1 / (num_seeds * (num_seeds - 1)) if num_seeds > 1 else math.inf
        sq.mul_(scale).nan_to_num_(nan=math.inf, posinf=math.inf).sqrt_()
    names = [c.name for c in chosen]
    return Scores(
        aim.name,
        {n: m.cpu() for n, m in zip(names, mean, strict=True)},
        {n: s.cpu() for n, s in zip(names, square, strict=True)},
        levels,
        np.mean(profile, axis=0) / len(levels),
    )


def _accumulate(
    denoiser: Denoiser,
    aim: ComponentObjective,
    chosen: Sequence[Component],
    states: Sequence[State],
) -> np.ndarray:
    """Add dJ/dw of all states to the gradients; returns sum_i w_i dJ/dw_i [T, components]."""
    sums = [torch.zeros(len(chosen), device=chosen[0].weight.device)]
    for state in states:
        target = aim.target(denoiser, state)
        with torch.enable_grad():
            aim.of(denoiser, state, target).sum().backward()
        for c in chosen:
            if c.weight.grad is None:
                raise UserError(
                    f"{c.name} takes no part in the prediction; set SELECTION to others"
                )
        pairs = [(c.weight.detach().flatten(), c.weight.grad.flatten()) for c in chosen]
        sums.append(torch.stack([torch.vdot(weight, gradient) for weight, gradient in pairs]))
    return torch.stack(sums).cpu().double().diff(dim=0).numpy()  # fetched once for all states


def _welford(mean: torch.Tensor, square: torch.Tensor, value: torch.Tensor, n: int) -> None:
    """Take the n-th value into mean and sum of squared deviations, in place; `value` is used up."""
    value -= mean
    mean.add_(value, alpha=1 / n)
    square.addcmul_(value, value, value=(n - 1) / n)


def _refuse_nan(name: str, values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise UserError(f"scores of {name} are NaN or infinite; set SD_MODEL_PATH to a whole model")
