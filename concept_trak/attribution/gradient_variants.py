"""Rankers by gradients that differ from `GradientAttributor` in what they do with rows.

    DotProduct   x_i . q                              GradDot (TracIn, Pruthi et al. 2020)
    Cosine       x_i . q / (|x_i| |q|)                GradCos (Charpiat et al. 2019)
    Relative     x_i . z_q / |z_i|                    relative influence (Barshan et al. 2020)
    Leverage     (e_i sum_b x_ib . z_qb / (1 - h_ib))^2  DAS (Lin et al. 2025, its LOO form)
    Journey      x_i . z_q at the query's own path    journey-TRAK (Georgiev et al. 2023)

with z = (K + lambda I)^-1 x. TracIn sums over the checkpoints of a training; a model here comes as
one, its last, so the sum has one term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..gradients.state import State, rebatch
from ..gradients.states import QueryStart, QueryTimesteps, draw_noise, query_states_of
from ..models.ddim import predict_x0, q_sample
from ..scoring.scores import scores
from .attributors import ROWS_AT_ONCE, GradientAttributor
from .naming import query_timesteps
from .question import Query, QueryImage


class GradDot(GradientAttributor):
    """GradDot: no preconditioner, so no damping."""

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[1, Q, N]; see `Ranker`."""
        asked, place = self._asked(questions)
        solved, budget = self.solve(self._keep(self, asked)), self.task.preconditioner.budget
        weight = self.row_weight()
        found = scores(self._train, solved, weight, budget.max_memory, budget.device)
        return found[:, place]

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """[1, Q, k]: the rows."""
        return rows[None]

    def score_rows(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """See `GradientAttributor`."""
        return solved @ rows.T

    def row_weight(self) -> np.ndarray | None:
        """None: the same for all."""
        return None


class GradCos(GradDot):
    """GradCos: |q| is the same for all pictures and left out."""

    def score_rows(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """See `GradientAttributor`."""
        return super().score_rows(solved, rows, beside) / norms(rows)

    def row_weight(self) -> np.ndarray | None:
        """[N]: one by the length of each row."""
        blocks = self._train.tensor_blocks(ROWS_AT_ONCE, "cpu")
        return 1 / np.concatenate([norms(block.double().numpy()) for _, block in blocks])


def norms(rows: np.ndarray) -> np.ndarray:
    """Euclidean norms along the last axis, none of them 0."""
    return np.maximum(np.linalg.norm(rows, axis=-1), 1e-30)


class SelfInfluence(GradientAttributor):
    """Scores changed by what the preconditioner makes of each train row itself.

    Every row is solved for, ROWS_AT_ONCE at a time; each time the curvature is formed again, so the
    cost grows with N^2: for some ten thousand pictures, not for millions.
    """

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """See `Ranker`."""
        asked, place = self._asked(questions)
        return self.score_train(self.solve(self._keep(self, asked)))[:, place]


class RelatIF(SelfInfluence):
    """Influence for a unit of change of the parameters: outliers do not rule."""

    def score_rows(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """See `GradientAttributor`."""
        return super().score_rows(solved, rows, beside) / norms(self.solve(rows))[:, None]


class DasLeaveOneOut(SelfInfluence):
    """The squared change of the output when a picture is left out; its sign is lost in squaring.

        (e_i sum_b x_ib . (K_b + lambda_b I)^-1 q_b / (1 - h_ib))^2
        h_ib = x_ib . (K_b + lambda_b I)^-1 x_ib,      b the blocks of the preconditioner

    DAS (Lin et al. 2025, arXiv 2410.18639, before its speed-ups) has one h for a whole K: leaving
    picture i out is a Newton step in which Sherman and Morrison's 1 / (1 - h_i) turns the inverse
    of K into that of K without i. In a K of blocks each block loses its own x_ib x_ib^T, and so has
    an h of its own, 0 <= h_ib < 1; their sum means nothing. A picture beside the store is not in K:
    nothing is to be left out for it.
    """

    def score_rows(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """See `GradientAttributor`."""
        return np.square(super().score_rows(solved, rows, beside))

    def score_own(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """See `GradientAttributor`."""
        left = np.maximum(1 - self.leverages(rows), 1e-6)  # a Krylov solution is not exact
        widths = self.task.projection.widths
        return self.score_rows(solved, rows / np.repeat(left, widths, axis=2), beside)

    def leverages(self, rows: np.ndarray) -> np.ndarray:
        """h [D, n, blocks] of rows [n, k] of the store."""
        starts = np.cumsum([0, *self.task.projection.widths[:-1]])
        return np.add.reduceat(rows * self.solve(rows), starts, axis=2)


class JourneyTrak(GradientAttributor):
    """The query at its own sampling path: the picture that the model predicts at each level of the
    trajectory, noised again to that level.

    A picture without an x_T has no path; its predictions are made at noisings of it.
    """

    def query_states(self, picture: QueryImage) -> QueryTimesteps:
        """Trajectories from the picture's x_T, else noisings."""
        return query_timesteps(self.task.settings, "local" if picture.x_T is None else "seed")

    def _states(self, picture: QueryImage) -> list[State]:
        if self._read[0] is not picture:
            size = self.task.settings.batch_size
            read = rebatch(self._renoised(picture, size), size)
            self._read = picture, list(read)
        return self._read[1]

    @torch.no_grad()
    def _renoised(self, picture: QueryImage, batch_size: int) -> Iterator[State]:
        model, states = self.task.model, self.query_states(picture)
        cond, null = model.encode_prompts([picture.prompt, ""]).split()
        start, done = QueryStart(picture.x_T, picture.x0), dict.fromkeys(states.timesteps, 0)
        for state in query_states_of(model, states, start, cond, null, batch_size):
            t = int(state.t)
            level, draws = model.schedule.level(t), range(done[t], done[t] + len(state))
            eps = draw_noise(states.seed + 1, draws, t, model.latent_shape).to(state.x_t)
            x0 = predict_x0(state.x_t, model.eps(state.x_t, t, state.cond), level)
            done[t] += len(state)
            yield State(t, q_sample(x0, eps, level), state.cond, state.cond_neg, eps, x0)
