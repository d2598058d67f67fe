"""Rankers: whatever gives every training image a score for a question.

`GradientAttributor` is what this project is about. A ranker is a class with `rank(questions)`,
built from a `AttributionTask` alone; `@RANKERS.register("name")` makes it one of METHODS of the
evaluation. One
that keeps no rows has `over(data)`, too: itself, ranking pictures that the model need not have been
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch

from ..gradients.objectives import concept_cotangent
from ..gradients.state import State, rebatch
from ..gradients.states import QueryStart, QueryTimesteps, query_states_of
from ..registry import OBJECTIVES
from ..scoring.scores import allocate_scores, precondition_and_score
from ..settings import DAMPINGS
from ..store.store import Store
from .naming import query_timesteps
from .question import Query, QueryImage
from .task import AttributionTask

ROWS_AT_ONCE = 128  # of the store where each is solved for: 9 * 128 * 8 k bytes


class Attributor(Protocol):
    """Scores of all N training images; high: removing the image would weaken the concept."""

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[D, Q, N], D the dampings of the sweep, or 1 for a ranker that knows none."""
        ...


class GradientAttributor:
    """score = w_i x_i . (K + lambda I)^-1 q, rows and query under the settings of `task`.

    per_concept: a query row for each question; else one a picture, of the objective's cotangent.
    keep: (ranker, questions) -> rows [Q, k], which may know them from before; default: computed.
    store: of the train rows; rows of queries need none.
    """

    def __init__(
        self,
        task: AttributionTask,
        store: Store | None = None,
        per_concept: bool = True,
        keep: Callable[[GradientAttributor, list[Query]], np.ndarray] | None = None,
    ) -> None:
        self.task, self.store, self.per_concept = task, store, per_concept
        self._keep = keep or GradientAttributor.rows
        self._read: tuple[QueryImage | None, list[State]] = None, []

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """See `Attributor`."""
        asked, place = self._asked(questions)
        rows = self._keep(self, asked)
        solver = self.task.preconditioner
        values = precondition_and_score(self._train, rows, DAMPINGS, solver, self.row_weight())
        return values[:, place]

    def solved(self, questions: Sequence[Query]) -> np.ndarray:
        """[Q, D, k]: what the rows' inner products with are the unweighted scores."""
        asked, place = self._asked(questions)
        return self.solve(self._keep(self, asked))[:, place].swapaxes(0, 1)

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """[D, Q, k] of query rows [Q, k]: what `score_rows` takes."""
        return self.task.preconditioner.solve(self._train, rows, DAMPINGS)

    def score_rows(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """[D, Q, n] scores of rows [n, k] that need not be the store's: of pictures beside it.

        solved: [D, Q, k], of `solve`. rows: or [D, n, k], others at each damping. beside: [n], what
        an objective's weights are made from.
        """
        values = solved @ np.swapaxes(rows, -1, -2)
        weight = OBJECTIVES.get(self.task.settings.f).row_weight
        return values if weight is None else values * weight(beside, self._train.losses())

    def score_own(self, solved: np.ndarray, rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """The same of rows that are the store's."""
        return self.score_rows(solved, rows, beside)

    def score_train(self, solved: np.ndarray) -> np.ndarray:
        """[D, Q, N] float32 by `score_own`, some rows of the store at a time. UserError for more
        than MAX_MEMORY.
        """
        store, limit = self._train, self.task.preconditioner.budget.max_memory
        weighted = OBJECTIVES.get(self.task.settings.f).row_weight is not None
        beside = store.losses() if weighted else np.zeros(store.num_rows)
        out = allocate_scores(solved.shape[0] * solved.shape[1], store, limit).reshape(
            *solved.shape[:2], -1
        )
        for start, block in store.tensor_blocks(ROWS_AT_ONCE, "cpu"):
            part = slice(start, start + len(block))
            out[:, :, part] = self.score_own(solved, block.double().numpy(), beside[part])
        return out

    def prepare(self) -> None:
        """Make what all questions share; forget the states of the last one."""
        self._read = None, []

    def ask(self, question: Query) -> None:
        """Do what one question needs beyond what is shared, so that its cost can
        be counted.
        """
        self.row(question)

    @property
    def _train(self) -> Store:
        if self.store is None:
            raise ValueError("a ranker without a store has no rows to score")
        return self.store

    def row_weight(self) -> np.ndarray | None:
        """[N], where the objective weights its rows."""
        weight = OBJECTIVES.get(self.task.settings.f).row_weight
        if weight is None:
            return None
        beside = self._train.losses()
        return weight(beside, beside)

    def rows(self, questions: Sequence[Query]) -> np.ndarray:
        """[Q, k] query rows."""
        return np.concatenate([self.row(question) for question in questions])

    def row(self, question: Query) -> np.ndarray:
        """[1, k] of one question: its gradient averaged over the states of its picture."""
        s, model = self.task.settings, self.task.model
        states: list[State] = self._states(question.picture)
        cotangent = OBJECTIVES.get(s.f).cotangent
        if self.per_concept:
            plus, minus = model.encode_prompts([question.plus, question.minus]).split()
            states = [state.contrasting(plus, minus) for state in states]
            cotangent = concept_cotangent(s.f)
        return self.task.row_maker.mean_row(states, cotangent).cpu().numpy()

    def query_states(self, picture: QueryImage) -> QueryTimesteps:
        """A concept of a generated picture is read where SCOPE says, all else at noisings."""
        own_scope = self.per_concept and picture.x_T is not None
        return query_timesteps(self.task.settings, "" if own_scope else "local")

    def identity(self, question: Query) -> dict[str, Any]:
        """What the row of a question was made from; see `AttributionTask.identity`."""
        task = self.task
        return task.identity(
            question=question.identity(),
            states=asdict(self.query_states(question.picture)),
            tokens=task.model.tokens,
            device=task.device,
            torch=torch.__version__,
        )

    def _asked(self, questions: Sequence[Query]) -> tuple[list[Query], list[int]]:
        """(the questions with rows of their own, which of them serves each question)."""
        asked: list[Query] = []
        places: dict[int, int] = {}
        keys = [id(q) if self.per_concept else id(q.picture) for q in questions]
        for key, question in zip(keys, questions, strict=True):
            if key not in places:
                places[key] = len(asked)
                asked.append(question)
        return asked, [places[key] for key in keys]

    def _states(self, picture: QueryImage) -> list[State]:
        """The states of a picture, read once for all its concepts."""
        if self._read[0] is not picture:
            s, model = self.task.settings, self.task.model
            cond, cond_null = model.encode_prompts([picture.prompt, ""]).split()
            start, states = QueryStart(picture.x_T, picture.x0), self.query_states(picture)
            read = query_states_of(model, states, start, cond, cond_null, s.batch_size)
            self._read = picture, list(rebatch(read, s.batch_size))
        return self._read[1]
