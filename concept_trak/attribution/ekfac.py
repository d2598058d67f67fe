"""Influence under the curvature of the whole parameters (EK-FAC), without a store of rows.

    score_i = grad L(x_i) . (F + lambda I)^-1 grad L(x_q),     L the training loss (dsm)

(Mlodozeniec et al. 2025). Gradients of train pictures are made, rotated and multiplied batch by
batch: one pass over the train images for all questions of a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..gradients.compute import Cotangent
from ..gradients.sample_grads import DenseGrad, OuterProductGrad
from ..gradients.state import State
from ..gradients.states import train_states_of
from ..gradients.vjp import PerSampleVjp
from ..models.denoiser import Denoiser
from ..parsing import parse_memory
from ..registry import OBJECTIVES
from ..scoring.ekfac import Ekfac, Grads
from ..settings import DAMPINGS
from .attributors import GradientAttributor
from .naming import train_timesteps
from .question import Query
from .task import AttributionTask

FIT_PICTURES, FIT_SEED = 256, 5  # pictures that the curvature is fitted on, and its seed


def sample_pseudo_gradients(generator: torch.Generator) -> Cotangent:
    """v ~ N(0, I), whose gradients have the Gauss-Newton matrix as their covariance."""

    def cotangent(denoiser: Denoiser, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
        return eps_hat, torch.randn(eps_hat.shape, generator=generator).to(eps_hat)

    return cotangent


def train_gradients(
    task: AttributionTask, layer: str, rows: Sequence[range], make: Callable[[], Cotangent]
) -> Iterator[list[Grads]]:
    """Per-sample gradients of the states of train pictures, a list of states for each batch."""
    states, cotangent = train_timesteps(task.settings), make()
    with PerSampleVjp(task.model.network, layer) as tape:
        for part in rows:
            x0, cond = task.data.batch(part)
            found = []
            for state in train_states_of(task.model, x0, cond, task.cond_null, states):
                with torch.enable_grad():
                    found.append(tape.vjp(*cotangent(task.model, state), len(state)))
            yield found


def batches(count: int, size: int) -> list[range]:
    """0, ..., count - 1 in pieces of `size`."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def fit_ekfac(task: AttributionTask, layer: str) -> Ekfac:
    """EK-FAC of the parameters `layer` on evenly spread train pictures."""
    count, size = len(task.data), task.settings.batch_size
    every = max(1, -(-count // FIT_PICTURES))
    rows = batches(count, size)[::every]

    def gradients() -> Iterator[Grads]:
        make = partial(sample_pseudo_gradients, torch.Generator().manual_seed(FIT_SEED))
        for states in train_gradients(task, layer, rows, make):
            yield from states

    return Ekfac.fit(gradients)


def total(states: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Tensor by tensor, the sum over states."""
    return [sum(parts[1:], parts[0]) for parts in zip(*states, strict=True)]


class EkfacAttributor(GradientAttributor):
    """A query and gradients of the train images in full, in the eigenbasis of the curvature.

    Holds 4 Q P bytes for Q pictures asked about and P parameters; more than MAX_MEMORY is asked
    piece by piece, each a pass over the train images.
    """

    def __init__(self, task: AttributionTask) -> None:
        super().__init__(task, None, per_concept=False)
        self.ranked = task

    def over(self, data: Any) -> EkfacAttributor:
        """The same, which ranks other pictures than those that the curvature is of."""
        self.prepare()
        other = copy.copy(self)
        other.ranked = self.task.with_data(data)
        return other

    @cached_property
    def curvature(self) -> Ekfac:
        """Fitted when it is first asked for."""
        return fit_ekfac(self.task, self.task.settings.layer)

    def prepare(self) -> None:
        """See `GradientAttributor`."""
        super().prepare()
        self.curvature  # noqa: B018

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[D, Q, N]; see `Ranker`."""
        asked, place = self._asked(questions)
        size = sum(len(basis.values) for basis in self.curvature.bases)
        room = max(1, parse_memory(self.task.settings.max_memory) // (16 * size))
        parts = [self._score(asked[i : i + room]) for i in range(0, len(asked), room)]
        return np.concatenate(parts, 1)[:, place]

    def rotated(self, question: Query) -> list[torch.Tensor]:
        """[1, n] of each tensor: the gradient of the query's loss in the eigenbasis."""
        model, layer = self.task.model, self.task.settings.layer
        cotangent, found = OBJECTIVES.get("dsm").cotangent, []
        with PerSampleVjp(model.network, layer) as tape:
            for state in self._states(question.picture):
                with torch.enable_grad():
                    grads = tape.vjp(*cotangent(model, state), len(state))
                found.append([p.sum(0, True) for p in self.curvature.rotate(grads)])
        return total(found)

    def row(self, question: Query) -> np.ndarray:
        """[1, P] in the eigenbasis: what a question costs beyond the pass over the train images."""
        return torch.cat(self.rotated(question), 1).cpu().numpy()

    def _score(self, asked: Sequence[Query]) -> np.ndarray:
        task, count = self.ranked, len(self.ranked.data)
        queries = [torch.cat(p) for p in zip(*map(self.rotated, asked), strict=True)]
        out = np.zeros((len(DAMPINGS), len(asked), count), np.float32)
        rows = batches(count, task.settings.batch_size)

        def make() -> Cotangent:
            return OBJECTIVES.get("dsm").cotangent

        found = train_gradients(task, task.settings.layer, rows, make)
        for part, states in zip(rows, tqdm(found, "ekfac", len(rows)), strict=True):
            train = total([self.curvature.rotate(grads) for grads in states])
            for d, damping in enumerate(DAMPINGS):
                left = self.curvature.divide(queries, damping)
                value = sum(a @ b.T for a, b in zip(left, train, strict=True))
                out[d, :, part.start : part.stop] = value.cpu().numpy()
        return out


def dense(grads: Sequence[OuterProductGrad | DenseGrad]) -> list[torch.Tensor]:
    """[B, n] of each tensor."""
    return [grad.dense() for grad in grads]
