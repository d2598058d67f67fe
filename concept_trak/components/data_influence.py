"""Images x weights: which training pictures put a concept into which weights.

Training on picture i moves the weights along -G_i, the gradient of its loss, and so changes the
concept's J by -<dJ/dw, G_i> to first order (TracIn, Pruthi et al. 2020). The inner product splits
over groups p of weights, a module or an attention head each:

    influence[i, p] = - < (dJ/dw)_p , G_{i,p} >          sum_p influence[i, p] = score of picture i

High: training on the picture raised J through these weights, so removing it would weaken the
concept there. G_i never exists as such: a linear layer's is sum_b delta_b (x) a_b
(`gradients.vjp`), so

    < g, sum_b delta_b (x) a_b > = sum over rows o of sum_b delta_b[o] (g a_b)[o]

is had by output row, or input column, and summed over those of a group: N x groups numbers, never
N x P. With `normalize` the gradient of each weight and state has unit norm (BLOCKS=module).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..gradients.compute import Cotangent
from ..gradients.sample_grads import DenseGrad, OuterProductGrad
from ..gradients.state import State
from ..gradients.vjp import PerSampleVjp
from ..models.denoiser import Denoiser
from .objective import ComponentObjective
from .parameter_groups import Component
from .scores import requires_grad_only

GROUPS = ("module", "head")


@dataclass(frozen=True)
class ImageComponentInfluence:
    """values [N, groups]; groups: what each column is, a weight's name and, of an attention head,
    its number, e.g. "...attn2.to_k.weight[2]".
    """

    values: np.ndarray
    groups: tuple[str, ...]

    @property
    def scores(self) -> np.ndarray:
        """[N] of the pictures, through all groups."""
        return self.values.sum(1)


def gradient_of(
    denoiser: Denoiser,
    aim: ComponentObjective,
    chosen: Sequence[Component],
    states: Sequence[State],
) -> dict[str, torch.Tensor]:
    """{weight: dJ/dw}, mean over states."""
    with requires_grad_only(denoiser.network, chosen):
        for state in states:
            target = aim.target(denoiser, state)
            with torch.enable_grad():
                (aim.of(denoiser, state, target).sum() / len(states)).backward()
        return {c.name: c.weight.grad.clone() for c in chosen if c.weight.grad is not None}


def group_names(chosen: Sequence[Component], granularity: str) -> tuple[str, ...]:
    """Names of the columns of `ImageComponentInfluence`."""
    names: list[str] = []
    for c in chosen:
        heads = c.heads if granularity == "head" else 0
        names += [f"{c.name}[{h}]" for h in range(heads)] or [c.name]
    return tuple(names)


@dataclass(frozen=True)
class ComponentSplitter:
    """The weights that influence is split over: dJ/dw of each, and how finely."""

    chosen: Sequence[Component]
    gradient: dict[str, torch.Tensor]
    granularity: str = "module"
    normalize: bool = False

    def of(
        self, denoiser: Denoiser, states: Iterable[State], cotangent: Cotangent, num_pictures: int
    ) -> torch.Tensor:
        """influence [n, groups] of n pictures, summed over their states of n samples each."""
        names = set(self.gradient)
        groups = len(group_names(self.chosen, self.granularity))
        total = torch.zeros(num_pictures, groups, device=denoiser.device)
        with PerSampleVjp(denoiser.network, lambda name: name in names) as tape:
            by_name = {c.name: c for c in self.chosen}
            order = [by_name[name] for name in tape.parameters]
            for state in states:
                with torch.enable_grad():
                    eps_hat, v = cotangent(denoiser, state)
                    found = tape.vjp(eps_hat, v, len(state))
                parts = [self.split(c, g) for c, g in zip(order, found, strict=True)]
                total -= torch.cat(parts, 1)
        return total.cpu()

    def split(self, component: Component, grad: OuterProductGrad | DenseGrad) -> torch.Tensor:
        """< g, G > [B, groups] of one weight."""
        g = self.gradient[component.name].flatten(1)
        heads = component.heads if self.granularity == "head" else 0
        if isinstance(grad, DenseGrad):
            inner = (grad.values @ g.flatten()).view(-1, 1)
        elif heads and component.head_axis == 1:
            inner = ((grad.delta @ g) * grad.a).sum(1)
        else:
            inner = ((grad.a @ g.T) * grad.delta).sum(1)
        if self.normalize:
            square = grad.sq_norm()
            inner = inner / torch.where(square > 0, square, 1).sqrt()[:, None]
        return inner.reshape(len(inner), max(heads, 1), -1).sum(2)
