"""Attribution by unlearning: make the model forget the query, and see which pictures it hurts.

    AbU    theta' = theta + (alpha / N) F^-1 grad L(query),  F the diagonal of the Fisher
    AbU+   the same with EK-FAC in the place of F
    score  L(x_i, theta') - L(x_i, theta), at identical noise         (Wang et al. 2024, 2025)
           L = 1/2 ||eps_hat - eps||^2, averaged over states

    MUCS   theta' minimises L(train) - lambda min(L(query), L_null), by Adam, until L(query) has
           come within 5 % of L_null, the loss of predicting nothing
    score  mean over noises of (L' - L) / (L' + L + 1e-3)             (Serra et al. 2026)

AbU changes keys and values of cross-attention only. A model without such weights, and MUCS, have
LAYER's changed. Losses are read at the states of the train rows. The weights are as before when a
question is answered.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..gradients.select import select_parameters
from ..gradients.state import State
from ..gradients.states import draw_noise, train_states_of
from ..gradients.vjp import PerSampleVjp
from ..models.condition import Condition
from ..models.ddim import q_sample
from ..registry import OBJECTIVES
from ..scoring.ekfac import Ekfac
from .attributors import GradientAttributor
from .ekfac import batches, dense, fit_ekfac, train_gradients
from .naming import train_timesteps
from .question import Query, QueryImage
from .task import AttributionTask

KEYS_AND_VALUES = "attn2.to_k|attn2.to_v"
DAMPING = 0.1  # of F and of EK-FAC, in mean values of a tensor (AbU+'s)


class Unlearning(GradientAttributor):
    """Ranks by what unlearning a picture does to the losses; `candidates` of its one step size are
    chosen among as dampings are. `at` gives the ranker of one; by itself it has the first.
    """

    candidates: ClassVar[tuple[float, ...]] = (1.0,)

    def __init__(self, task: AttributionTask, step: float | None = None) -> None:
        super().__init__(task, None, per_concept=False)
        self.step = self.candidates[0] if step is None else step
        self.ranked = task

    def at(self, candidate: int) -> Unlearning:
        """The same ranker with this one of `candidates`; what all share is computed once."""
        self.prepare()
        other = copy.copy(self)
        other.step = self.candidates[candidate]
        return other

    def over(self, data: Any) -> Unlearning:
        """The same, which ranks other pictures than those that the model was trained on."""
        getattr(self, "curvature", None)
        other = copy.copy(self)
        other.ranked = self.task.with_data(data)
        other.__dict__.pop("before", None)
        return other

    def prepare(self) -> None:
        """See `GradientAttributor`."""
        super().prepare()
        self.before, getattr(self, "curvature", None)  # noqa: B018

    def ask(self, question: Query) -> None:
        """See `GradientAttributor`."""
        self._scores(question, self.before)

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[1, Q, N]; see `Ranker`. One pass of forwards over the train images for each picture."""
        asked, place = self._asked(questions)
        before = self.before
        found = [self._scores(q, before) for q in tqdm(asked, f"unlearning, step {self.step:g}")]
        return np.stack(found)[None, place]

    def _scores(self, question: Query, before: torch.Tensor) -> np.ndarray:
        with self.unlearned(question.picture):
            after = losses(self.ranked)
        return self.compared(before, after).mean(1).numpy()

    @cached_property
    def before(self) -> torch.Tensor:
        """[N, T] losses of the ranked pictures under the model as it is."""
        return losses(self.ranked)

    @property
    def layer(self) -> str:
        """Whose weights change."""
        return self.task.settings.layer

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """They."""
        return select_parameters(self.task.model.network, self.layer)

    def compared(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """[N, T] of losses [N, T]."""
        return after - before

    def unlearned(self, picture: QueryImage) -> contextlib.AbstractContextManager[None]:
        """The model without the picture, inside the block."""
        raise NotImplementedError


@torch.no_grad()
def losses(task: AttributionTask) -> torch.Tensor:
    """[N, T] float64: mean squared error of each train picture at each of its states, whose noises
    are the same in every call.
    """
    model, states = task.model, train_timesteps(task.settings)
    found = []
    for rows in batches(len(task.data), task.settings.batch_size):
        x0, cond = task.data.batch(rows)
        seen = train_states_of(model, x0, cond, task.cond_null, states)
        found.append(torch.stack([_error(task, state) for state in seen], 1))
    return torch.cat(found).cpu()


def _error(task: AttributionTask, state: State) -> torch.Tensor:
    error = task.model.eps(state.x_t, state.t, state.cond).double() - state.eps
    return error.square().flatten(1).mean(1)


@contextlib.contextmanager
def restored(parameters: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Whatever happens to the values inside the block, they are as before afterwards."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(False)
            p.copy_(kept[name])


class AbU(Unlearning):
    """AbU: one step under the diagonal Fisher. candidates: alpha."""

    candidates = (1.0, 10.0, 100.0)

    @cached_property
    def layer(self) -> str:  # type: ignore[override]
        """Keys and values, where there are such."""
        try:
            select_parameters(self.task.model.network, KEYS_AND_VALUES)
        except UserError:
            return self.task.settings.layer
        return KEYS_AND_VALUES

    @cached_property
    def curvature(self) -> list[torch.Tensor] | Ekfac:
        """Mean squares of the gradients of all train pictures' losses, each tensor's [n]."""
        rows = batches(len(self.task.data), self.task.settings.batch_size)
        found, count = [], 0
        cotangent = OBJECTIVES.get("dsm").cotangent
        for states in train_gradients(self.task, self.layer, rows, lambda: cotangent):
            for grads in states:
                squares = [part.square().sum(0) for part in dense(grads)]
                found = [a + b for a, b in zip(found, squares, strict=True)] if found else squares
                count += len(dense(grads[:1])[0])
        return [square / count for square in found]

    def direction(self, picture: QueryImage) -> list[torch.Tensor]:
        """F^-1 grad L(picture) of each tensor, [n]: L the mean over its states."""
        assert isinstance(self.curvature, list)
        pairs = zip(self.gradient(picture), self.curvature, strict=True)
        return [g / (f + DAMPING * f.mean().clamp_min(1e-30)) for g, f in pairs]

    def gradient(self, picture: QueryImage) -> list[torch.Tensor]:
        """grad L(picture) of each tensor, [n]."""
        return [
            part.mean(0) for part in concat_per_tensor([dense(g) for g in self._grads(picture)])
        ]

    def _grads(self, picture: QueryImage) -> list:
        model, cotangent, found = self.task.model, OBJECTIVES.get("dsm").cotangent, []
        with PerSampleVjp(model.network, self.layer) as tape:
            for state in self._states(picture):
                with torch.enable_grad():
                    found.append(tape.vjp(*cotangent(model, state), len(state)))
        return found

    @contextlib.contextmanager
    def unlearned(self, picture: QueryImage) -> Iterator[None]:
        """See `Unlearning`."""
        steps, scale = self.direction(picture), self.step / len(self.task.data)
        with restored(self.parameters), torch.no_grad():
            for p, step in zip(self.parameters.values(), steps, strict=True):
                p += scale * step.view_as(p)
            yield


class AbuPlus(AbU):
    """AbU+: one step under EK-FAC."""

    @cached_property
    def curvature(self) -> list[torch.Tensor] | Ekfac:
        """Fitted when it is first asked for."""
        return fit_ekfac(self.task, self.layer)

    def direction(self, picture: QueryImage) -> list[torch.Tensor]:
        """See `AbU.direction`."""
        assert isinstance(self.curvature, Ekfac)
        solved = [self.curvature.solve(grads, DAMPING) for grads in self._grads(picture)]
        return [part.mean(0) for part in concat_per_tensor(solved)]


def concat_per_tensor(states: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Tensor by tensor, the samples of all states one after the other."""
    return [torch.cat(parts) for parts in zip(*states, strict=True)]


class MUCS(Unlearning):
    """Mirrored unlearning, noise-consistent skew. candidates: Adam's learning rate.

    Retained and forgotten batches are of BATCH pictures or noises; at most MAX_STEPS steps.
    """

    candidates = (1e-4, 3e-4, 1e-3)
    weight, null_loss, tolerance = 0.2, 1.0, 0.05  # lambda; E |eps|^2; of L_null
    BATCH, MAX_STEPS, SEED = 8, 30, 45

    def compared(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The normalised skew."""
        return (after - before) / (after + before + 1e-3)

    @contextlib.contextmanager
    def unlearned(self, picture: QueryImage) -> Iterator[None]:
        """See `Unlearning`."""
        chosen = list(self.parameters.values())
        with restored(self.parameters):
            for p in chosen:
                p.requires_grad_()
            optimizer = torch.optim.Adam(chosen, lr=self.step)
            for step in range(self.MAX_STEPS):
                with torch.enable_grad():
                    kept, lost = self._retained(step), self._forgotten(picture, step)
                    if lost.mean() >= (1 - self.tolerance) * self.null_loss:
                        break
                    loss = kept.mean() - self.weight * lost.clamp(max=self.null_loss).mean()
                    grads = torch.autograd.grad(loss, chosen)
                for p, grad in zip(chosen, grads, strict=True):
                    p.grad = grad
                optimizer.step()
            for p in chosen:
                p.grad = None
            with torch.no_grad():
                yield

    def _retained(self, step: int) -> torch.Tensor:
        """[BATCH] losses of train pictures drawn for this step."""
        g, data = torch.Generator().manual_seed(self.SEED * 1_000_003 + step), self.task.data
        drawn = torch.randint(len(data), (self.BATCH,), generator=g).tolist()
        shown, told = zip(*(data.batch(range(i, i + 1)) for i in drawn), strict=True)
        x0, cond = torch.cat(shown), Condition.join(told)
        return self._loss(x0, cond, 2 * step)

    def _forgotten(self, picture: QueryImage, step: int) -> torch.Tensor:
        """[BATCH] losses of the picture under noises drawn for this step."""
        cond = self.task.model.encode_prompts([picture.prompt]).expand(self.BATCH)
        x0 = picture.x0.to(self.task.model.device).expand(self.BATCH, -1, -1, -1)
        return self._loss(x0, cond, 2 * step + 1)

    def _loss(self, x0: torch.Tensor, cond: Condition, number: int) -> torch.Tensor:
        model, levels = self.task.model, train_timesteps(self.task.settings).timesteps
        t = levels[number // 2 % len(levels)]
        draws = range(number * self.BATCH, number * self.BATCH + len(x0))
        eps = draw_noise(self.SEED, draws, t, x0.shape[1:]).to(x0)
        error = model.eps(q_sample(x0, eps, model.schedule.level(t)), t, cond) - eps
        return error.float().square().flatten(1).mean(1)
