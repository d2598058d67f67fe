"""Scores of all train pictures and of exemplars for every query of the small AbC, by any ranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concept_trak.attribution.baselines import distances
from concept_trak.datasets.caption_overlap import caption_overlap
from concept_trak.settings import DAMPINGS, JUDGE, TOKEN
from concept_trak.store.array_cache import cached
from experiments.benchmark.evaluate import choose_damping

from .gradients import (
    CandidateImages,
    exemplar_rows,
    folder_of,
    generate_queries,
    learn_token,
    query_row,
    question_of,
    shown_at,
)
from .methods import method
from .tasks import Task, Token

if TYPE_CHECKING:
    from concept_trak.attribution.attributors import GradientAttributor
    from concept_trak.attribution.question import Query, QueryImage
    from concept_trak.attribution.task import AttributionTask

PROTOCOLS = ("published", "blind", "crowd")


@dataclass(frozen=True)
class Scores:
    """of: {protocol: [D, Q, N + E]}, exemplars last, those of "crowd" are all. choices: [D], the
    dampings or steps, of which one is chosen for each protocol; empty where D is 1.
    """

    of: dict[str, np.ndarray]
    choices: Sequence[float] = ()


class AbcQueries:
    """Tokens, tasks and pictures; places of the tasks of each split."""

    def __init__(
        self, attribution_task: AttributionTask, tokens: list[Token], tasks: list[Task], work: Path
    ) -> None:
        self.attribution_task, self.tokens, self.tasks, self.work = (
            attribution_task,
            tokens,
            tasks,
            work,
        )
        self.pictures: list[QueryImage] = []
        for token in self.asked():
            learn_token(attribution_task, token, work)
            self.pictures += generate_queries(
                attribution_task, [t for t in tasks if t.token is token], work
            )

    def asked(self) -> list[Token]:
        """The tokens that are asked about, in the order of the tasks."""
        return [token for token in self.tokens if any(t.token is token for t in self.tasks)]

    def split(self, name: str) -> np.ndarray:
        """Places of the tasks of a split."""
        return np.flatnonzero([task.token.split == name for task in self.tasks])

    def of_token(self, token: Token) -> np.ndarray:
        """Places of the tasks of a token."""
        return np.flatnonzero([task.token is token for task in self.tasks])

    def questions(self, token: Token, attribution_task: AttributionTask) -> list[Query]:
        """Of a token, under the settings of `task`."""
        places = self.of_token(token)
        return [question_of(attribution_task, self.tasks[q], self.pictures[q]) for q in places]

    def relevant(self, protocol: str) -> np.ndarray:
        """bool [Q, N + E]."""
        count, rows = len(self.attribution_task.train), []
        for task in self.tasks:
            if protocol == "crowd":
                own = [np.full(len(t.pictures), t is task.token) for t in self.tokens]
            else:
                own = [np.ones(len(task.token.pictures), bool)]
            rows.append(np.concatenate([np.zeros(count, bool), *own]))
        return np.stack(rows)

    def by_protocol(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """{protocol: [D, Q, N + E]} of values [D, Q, N + E + A]: of the train pictures, the token's
        exemplars under their caption, and the exemplars of all tokens under none.
        """
        count, found = len(self.attribution_task.train), {}
        sizes = [len(token.pictures) for token in self.tokens]
        starts = dict(zip((t.name for t in self.tokens), np.cumsum([0, *sizes]), strict=False))
        every = values.shape[2] - sum(sizes)  # where those of all tokens begin
        own, rest = [], np.arange(count)
        for task in self.tasks:
            first = every + starts[task.token.name]
            own.append(np.r_[rest, first : first + len(task.token.pictures)])
        found["published"] = values[:, :, :every]
        found["blind"] = np.take_along_axis(values, np.stack(own)[None], 2)
        found["crowd"] = values[:, :, np.r_[rest, every : values.shape[2]]]
        return found

    def choice(self, protocol: str, values: np.ndarray) -> int:
        """Index of the damping or step that `choose_damping` takes for values [D, Q, N + E] of a
        protocol, from the tasks of split "tune".
        """
        tune = self.split("tune")
        return choose_damping(values[:, tune, None], self.relevant(protocol)[tune][:, None])


def scores_of(asked: AbcQueries, name: str) -> Scores:
    """One method's; UserError for one that there is not."""
    ranker = method(name)(asked.attribution_task)
    if hasattr(ranker, "over"):
        return _of_passes(asked, ranker, name)
    values = _of_rows(asked, ranker)
    return Scores(asked.by_protocol(values), DAMPINGS if len(values) > 1 else ())


def _of_rows(asked: AbcQueries, ranker: GradientAttributor) -> np.ndarray:
    """[D, Q, N + E + A] of a ranker whose train rows lie in a store; see
    `AbcQueries.by_protocol`."""
    attribution_task = ranker.task
    folder = folder_of(attribution_task, ranker._train) / (
        "concept" if ranker.per_concept else "whole"
    )
    queries, captioned, own = [], [], {}
    for token in asked.asked():
        learn_token(attribution_task, token, asked.work)
        first = sum(map(len, captioned))
        captioned.append(exemplar_rows(attribution_task, token, token.train_prompt, folder))
        own[token.name] = slice(first, first + len(captioned[-1]))
        for question in asked.questions(token, attribution_task):
            queries.append(query_row(ranker, question, folder))
    blind = [exemplar_rows(attribution_task, token, "", folder) for token in asked.tokens]
    solved = ranker.solve(np.concatenate(queries))
    rows = np.concatenate([*captioned, *blind]).astype(np.float64)
    values = ranker.score_rows(solved, rows[:, :-1], rows[:, -1])  # of all at once: some are solved
    named = [values[:, q, own[task.token.name]] for q, task in enumerate(asked.tasks)]
    every = values[:, :, sum(map(len, captioned)) :]
    return np.concatenate([ranker.score_train(solved), np.stack(named, 1), every], 2)


def _of_passes(asked: AbcQueries, ranker: Any, name: str) -> Scores:
    """Of a ranker without rows, which goes over all pictures for each question.

    Where it has a step to choose, the reported tasks are asked only with those that a protocol
    chose; all else is 0.
    """
    steps = getattr(ranker, "candidates", ())
    if not steps:
        values = sum(_passes(asked, ranker, name, split) for split in ("tune", "report"))
        return Scores(asked.by_protocol(values), DAMPINGS if len(values) > 1 else ())
    at = [ranker.at(i) for i in range(len(steps))]
    values = np.concatenate([_passes(asked, one, name, "tune") for one in at])
    for i in {asked.choice(p, of) for p, of in asked.by_protocol(values).items()}:
        values[i] += _passes(asked, at[i], name, "report")[0]
    return Scores(asked.by_protocol(values), steps)


def _passes(asked: AbcQueries, ranker: Any, name: str, split: str) -> np.ndarray:
    """[D, Q, N + E + A], 0 for the tasks of other splits."""
    tokens = [token for token in asked.asked() if token.split == split]
    parts = [_passed(asked, ranker, name, token) for token in tokens]
    values = np.zeros((len(parts[0]), len(asked.tasks), parts[0].shape[2]))
    for token, part in zip(tokens, parts, strict=True):
        values[:, asked.of_token(token)] = part
    return values


def _passed(asked: AbcQueries, ranker: Any, name: str, token: Token) -> np.ndarray:
    """[D, tasks of the token, N + E + A], computed where it is not kept."""
    attribution_task = asked.attribution_task
    learn_token(attribution_task, token, asked.work)
    ranked, questions = (
        CandidateImages(attribution_task, token, asked.tokens),
        asked.questions(token, attribution_task),
    )
    step = getattr(ranker, "step", None)
    made_from = ranker.task.identity(
        data=attribution_task.data.content_hash(),
        exemplars=ranked.identity(),
        questions=[question.identity() for question in questions],
        tokens=attribution_task.model.tokens,
        step=step,
    )
    at = "" if step is None else f"-{step:g}"
    path = asked.work / "passes" / f"{name}-{token.name}{at}.npy"
    return cached(path, made_from, lambda: ranker.over(ranked).rank(questions))


def controls_of(asked: AbcQueries) -> dict[str, Scores]:
    """What pixels, latents, the judge and text alone find."""
    attribution_task, found = asked.attribution_task, {}
    looks = {
        "pixel_neighbours": _pixels,
        "latent_neighbours": lambda attribution_task, shown: _flat(
            attribution_task.model.encode_images(shown).numpy()
        ),
    }
    if (JUDGE / "judge.json").is_file():
        looks["judge_features"] = _judged
    size = attribution_task.model.image_size
    queries = np.stack([p.pixels for p in asked.pictures if p.pixels is not None])
    pictures = np.concatenate([shown_at(t.pictures, size) for t in asked.tokens])
    shown = np.concatenate(
        [attribution_task.train.images(range(len(attribution_task.train)), size=size), pictures]
    )
    for name, look in looks.items():
        values = -distances(look(attribution_task, queries), look(attribution_task, shown))
        found[name] = Scores(asked.by_protocol(_twice(asked, values)[None]))
    text = caption_overlap(TOKEN.strip("<>"), attribution_task.train.captions)
    sizes = [len(token.pictures) for token in asked.tokens]
    named = [
        np.r_[text, np.ones(len(task.token.pictures)), np.zeros(sum(sizes))] for task in asked.tasks
    ]
    found["caption_similarity"] = Scores(asked.by_protocol(np.stack(named)[None]))
    return found


def _twice(asked: AbcQueries, values: np.ndarray) -> np.ndarray:
    """[Q, N + E + A] of values [Q, N + A]: a picture looks the same under any caption."""
    count, own = len(asked.attribution_task.train), []
    ends = np.cumsum([count, *(len(token.pictures) for token in asked.tokens)])
    at = {t.name: slice(a, b) for t, a, b in zip(asked.tokens, ends, ends[1:], strict=False)}
    for row, task in zip(values, asked.tasks, strict=True):
        own.append(np.r_[row[:count], row[at[task.token.name]], row[count:]])
    return np.stack(own)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32)


def _pixels(attribution_task: AttributionTask, shown: np.ndarray) -> np.ndarray:
    return _flat(shown)


def _judged(attribution_task: AttributionTask, shown: np.ndarray) -> np.ndarray:
    from ..classifier.io import load_judge
    from ..classifier.net import resized

    judge = load_judge(JUDGE)
    return judge.features(resized(shown, judge.settings.size))
