"""The one loop that turns states and a cotangent into projected gradient rows.

    row = sum over states s of  P^T g_s / ||g_s||         g = J_theta eps_hat(x_t, t, c)^T v

Train pictures, exemplars, queries and the benchmark all come through here. Projection is linear, so
a state's gradient is projected first and divided by the norm of the *whole* gradient after; a
parameter-sized vector per sample never exists. With BLOCKS=module the norm is that of each module's
gradient by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models.denoiser import Denoiser
from .projection import Projection
from .state import State
from .vjp import PerSampleVjp

# (eps_hat [b or 2b, ...] with its graph, v of its shape); the first b of eps_hat are those of cond.
Cotangent = Callable[[Denoiser, State], tuple[torch.Tensor, torch.Tensor]]


class ProjectedGradients(NamedTuple):
    """Projected rows [n, k] float32, and what their states lost.

    losses [n]: mean squared error of eps_hat against the state's own noise, summed over the states
    that have one. num_states: samples that went into all rows together.
    """

    values: torch.Tensor
    losses: torch.Tensor
    num_states: int


@dataclass(frozen=True)
class GradientComputer:
    """Whose gradient, in which parameters (`select_parameters`), projected and normed how."""

    denoiser: Denoiser
    projection: Projection
    layer: str
    normalize: bool

    def rows(
        self, states: Iterable[State], cotangent: Cotangent, num_rows: int
    ) -> ProjectedGradients:
        """A row for each of `num_rows` samples, summed over states of so many samples each.

        num_rows = 1: one row, summed over all samples of all states.
        """
        device = self.denoiser.device
        values = torch.zeros(num_rows, self.projection.proj_dim, device=device)
        losses, count = torch.zeros(num_rows, device=device), 0
        with PerSampleVjp(self.denoiser.network, self.layer) as tape:
            for state in states:
                with torch.enable_grad():
                    eps_hat, v = cotangent(self.denoiser, state)
                    found = self._project(tape, eps_hat, v, len(state))
                predicted = eps_hat.detach()[: len(state)]
                if isinstance(state.t, int):
                    state.known[state.t] = predicted
                values += _sum_samples(found, num_rows)
                if state.eps is not None:
                    error = (predicted - state.eps).float().square().flatten(1).mean(1)
                    losses += _sum_samples(error, num_rows)
                count += len(state)
        return ProjectedGradients(values, losses, count)

    def mean_row(self, states: Iterable[State], cotangent: Cotangent) -> torch.Tensor:
        """[1, k]: the average over all samples of all states."""
        found = self.rows(states, cotangent, 1)
        return found.values / found.num_states

    def _project(
        self, tape: PerSampleVjp, eps_hat: torch.Tensor, v: torch.Tensor, samples: int
    ) -> torch.Tensor:
        """[samples, k] of one state, each block unit-normed if asked (a zero one stays zero)."""
        projection, device = self.projection, eps_hat.device
        out = torch.zeros(samples, projection.proj_dim, device=device)
        square = torch.zeros(samples, len(projection.widths), device=device)
        for g in tape.vjp(eps_hat, v, samples):
            projection.add(out, g)
            if self.normalize:
                square[:, projection.block_of(g.offset)] += g.sq_norm()
        projection.finish(out)
        if self.normalize:
            norm = torch.where(square > 0, square, 1).sqrt()
            out /= norm.index_select(1, projection.block_of_feature)
        return out


def _sum_samples(found: torch.Tensor, num_rows: int) -> torch.Tensor:
    return found if len(found) == num_rows else found.sum(0, keepdim=True)
