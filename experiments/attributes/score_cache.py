"""What every ranker found, kept: relevance of its highest pictures, for every damping.

A file a model, scope and ranker, named by the hash of all that decides it; a killed run goes on
with the next. A ranker that passes over all pictures for each question has a step to choose: it is
asked what chooses at every candidate, and what is reported at the chosen one alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from concept_trak.attribution.methods import swept
from concept_trak.attribution.naming import gradient_settings
from concept_trak.attribution.question import Query
from concept_trak.attribution.task import AttributionTask
from concept_trak.registry import RANKERS
from concept_trak.scoring.ranking import ranking
from concept_trak.settings import as_dict, short_hash
from concept_trak.store.array_cache import read_npz, write_npz
from experiments.benchmark.evaluate import one_standard_error_rule
from experiments.benchmark.protocol import TUNE

from .pipeline import AttributeBenchmark, TrainedModel
from .queries import SPLITS, LabelledBenchmark
from .settings import SCOPES

DEEPEST = 100  # ranks kept: what precision is shown at
LEAST = 10
TOP = 10  # ranks that choose, and that the table tells


@dataclass(frozen=True)
class MethodScores:
    """One ranker on one model. top: bool [D, Q, K], relevance by rank, K at most `DEEPEST`; least:
    [D, Q], share of relevant ones in the lowest ten; chance [Q]. split, concept, group [Q]: the
    last is the number of a question's combination. D: dampings, or candidates for a step. seconds:
    of all questions together at one step, rows of the train pictures not counted.
    """

    top: np.ndarray
    least: np.ndarray
    chance: np.ndarray
    split: np.ndarray
    concept: np.ndarray
    group: np.ndarray
    seconds: float

    def at(self, k: int) -> np.ndarray:
        """Precision at k [D, Q]."""
        return self.top[..., :k].mean(-1)

    def groups(self, split: str, k: int = TOP, concept: str = "") -> np.ndarray:
        """[D, combinations]: precision at k, means over the drawings of each combination."""
        at = (self.split == split) & ((self.concept == concept) | (not concept))
        values, groups = self.at(k)[:, at], self.group[at]
        if not values.shape[1]:
            return values
        return np.stack([values[:, groups == g].mean(1) for g in np.unique(groups)], 1)

    def and_at(self, step: int, other: MethodScores) -> MethodScores:
        """With what was asked at one step alone [1, Q', K]; at the other steps that is all 0."""
        shape = len(self.top), *other.top.shape[1:]
        top, least = np.zeros(shape, bool), np.zeros(shape[:2])
        top[step], least[step] = other.top[0], other.least[0]
        parts = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in PER_QUESTION}
        both = {"top": np.concatenate([self.top, top], 1)}
        both["least"] = np.concatenate([self.least, least], 1)
        return MethodScores(**both, **parts, seconds=self.seconds + other.seconds)


PER_QUESTION = ("chance", "split", "concept", "group")


def damping_of(models: Mapping[TrainedModel, MethodScores]) -> int:
    """Index of a ranker's damping or step, for all its models, from the split that is there for
    it.
    """
    return one_standard_error_rule(np.concatenate([one.groups(TUNE) for one in models.values()], 1))


def scopes_of(ranker: str) -> tuple[str, ...]:
    """A concept can be asked of a picture or as such; whole-picture rankers know one scope."""
    per_concept = getattr(RANKERS.get(ranker), "per_concept", False)
    return SCOPES if per_concept else SCOPES[:1]


ByModel = dict[str, dict[str, dict[TrainedModel, MethodScores]]]  # scope -> ranker -> model


def attribute(bench: AttributeBenchmark) -> ByModel:
    """What every ranker found, computed where it is not kept."""
    benchmarks = {model: bench.benchmark(bench.task(model)) for model in bench.models}
    found: ByModel = {scope: {} for scope in SCOPES}
    for name in tqdm(bench.rankers, desc="attributing"):
        asked = {m: b for m, b in benchmarks.items() if name in bench.rankers_of(m)}
        for scope in scopes_of(name) if asked else ():
            keep = ScoreCache(bench.own.folder / "scores", name, scope)
            found[scope][name] = keep.stepped(asked) if steps_of(name) else keep.all(asked)
    return found


@dataclass(frozen=True)
class ScoreCache:
    """What one ranker found of models' benchmarks, from files in a folder or computed."""

    folder: Path
    name: str
    scope: str

    def all(
        self,
        asked: Mapping[TrainedModel, LabelledBenchmark],
        splits: Sequence[str] = (),
        step: int | None = None,
    ) -> dict[TrainedModel, MethodScores]:
        """Of `splits`, by default all; at one step, by default every damping or candidate."""
        return {model: self.one(benchmark, splits, step) for model, benchmark in asked.items()}

    def stepped(
        self, asked: Mapping[TrainedModel, LabelledBenchmark]
    ) -> dict[TrainedModel, MethodScores]:
        """Of a ranker with a step: reported questions are asked at what the others chose."""
        chosen_by = self.all(asked, (TUNE,))
        step = damping_of(chosen_by)
        reported = self.all(asked, SPLITS, step)
        return {model: one.and_at(step, reported[model]) for model, one in chosen_by.items()}

    def one(
        self, benchmark: LabelledBenchmark, splits: Sequence[str], step: int | None
    ) -> MethodScores:
        """See `all`."""
        own = benchmark.task.settings.but(scope=self.scope)
        task = benchmark.task.with_settings(own)
        part = [list(splits), step] if splits else []
        path = self.folder / f"{self.name}-{identity(task, benchmark, self.name, part)}.npz"
        if kept := read_npz(path):
            return MethodScores(**{**kept, "seconds": float(kept["seconds"])})
        found = compute(task, benchmark, self.name, splits, step)
        write_npz(path, vars(found))
        return found


def identity(
    task: AttributionTask, benchmark: LabelledBenchmark, name: str, part: Sequence[Any] = ()
) -> str:
    """Of all that decides what a ranker finds; part: of which questions and step, if not all."""
    s, asked = task.settings, benchmark.asked
    places = ("sd_model_path", "data_dir", "grad_dir", "results_dir", "methods", "batch_size")
    kept = {k: v for k, v in as_dict(s).items() if k not in places}
    questions = [asked.combinations, asked.samples, asked.tune, asked.classifier is not None]
    model = [task.model.identity(), task.data.content_hash(), gradient_settings(s)]
    return short_hash([name, kept, questions, model, DEEPEST, *steps_of(name), *part])


def steps_of(name: str) -> tuple[float, ...]:
    """Among which a ranker's is chosen; none where it has dampings, or nothing to choose."""
    return getattr(RANKERS.get(name), "candidates", ())


def compute(
    task: AttributionTask,
    benchmark: LabelledBenchmark,
    name: str,
    splits: Sequence[str] = (),
    step: int | None = None,
) -> MethodScores:
    """Rank, and keep what the table needs. Scope global asks each concept of a combination once:
    it does not see the picture.
    """
    questions = {k: v for k, v in benchmark.questions().items() if k in (splits or (k,))}
    asked = [q for each in questions.values() for q in each]
    ranker, begun = RANKERS.get(name)(task), time.perf_counter()
    once: dict[tuple[str, str, str], int] = {}
    places = list(range(len(asked)))
    if task.settings.scope == "global":
        keys = [(q.picture.prompt, q.plus, q.minus) for q in asked]
        places = [once.setdefault(key, i) for i, key in enumerate(keys)]
    chosen = sorted(set(places))
    distinct = [asked[i] for i in chosen]
    values = swept(ranker, distinct) if step is None else ranker.at(step).rank(distinct)
    steps = 1 if step is not None else max(1, len(steps_of(name)))
    seconds = (time.perf_counter() - begun) / steps
    values = values[:, np.searchsorted(chosen, places)]
    names = [split for split, each in questions.items() for _ in each]
    return method_scores(values, asked, names, benchmark, seconds)


def method_scores(
    values: np.ndarray,
    asked: list[Query],
    splits: list[str],
    benchmark: LabelledBenchmark,
    seconds: float,
) -> MethodScores:
    """From scores [D, Q, N]."""
    relevant = np.stack([benchmark.relevant(q) for q in asked])
    deep = min(DEEPEST, values.shape[-1])
    top, least = [], []
    for scores in values:
        highest, lowest = ranking(scores)[:, :deep], ranking(scores, largest=False)[:, :LEAST]
        top.append(np.take_along_axis(relevant, highest, 1))
        least.append(np.take_along_axis(relevant, lowest, 1).mean(1))
    concept = np.array([q.concept for q in asked])
    chance = relevant.mean(1)
    _, group = np.unique([q.picture.prompt for q in asked], return_inverse=True)
    split, parts = np.array(splits), (np.stack(top), np.stack(least))
    return MethodScores(*parts, chance, split, concept, group, seconds)
