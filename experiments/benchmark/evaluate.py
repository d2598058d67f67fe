"""Does it work: every ranker's scores against the pictures that carry the concept.

Each ranker has one damping, chosen on the split "tune" of the benchmark's first kind of picture and
used for everything; the best one of a table is named oracle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from concept_trak.atomic_io import write_bytes
from concept_trak.attribution.methods import swept
from concept_trak.attribution.task import AttributionTask
from concept_trak.parsing import parse_methods
from concept_trak.registry import BENCHMARKS, RANKERS
from concept_trak.scoring import metrics
from concept_trak.settings import DAMPINGS

from .forward_count import count_forwards
from .plots import against_k, png
from .protocol import TUNE, Benchmark
from .results import result_folder, write_metrics

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # split -> concept -> ranker -> figures


def is_baseline(name: str) -> bool:
    """Whether a ranker knows nothing of the training; controls stand in every table."""
    return getattr(RANKERS.get(name), "control", False)


def is_available(name: str) -> bool:
    """Whether what a ranker stands on is there."""
    return getattr(RANKERS.get(name), "available", lambda: True)()


def chosen_rankers(methods: str) -> list[str]:
    """METHODS as names, and the controls. Empty is all but those that are there on request.
    UserError for one that there is not.
    """
    named = parse_methods(methods)
    controls = [name for name in RANKERS.names() if is_baseline(name)]
    there = [name for name in controls if is_available(name)]
    by_itself = (n for n in RANKERS.names() if not getattr(RANKERS.get(n), "on_request", False))
    others = named or [name for name in by_itself if name not in controls]
    return list(dict.fromkeys([*others, *there]))


def summary(values: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    """Recall@10, its 95 % interval over queries, mAP and least-10 recall; both [queries, N]."""
    recall = metrics.recall_at_k(values, relevant)
    low, high = metrics.bootstrap_interval(recall)
    precision = metrics.average_precision(values, relevant)
    return {
        "recall_at_10": round(float(recall.mean()), 4),
        "ci95": [round(low, 4), round(high, 4)],
        "map": round(float(precision.mean()), 4),
        "least_10_recall": round(float(metrics.least_k_recall(values, relevant).mean()), 4),
    }


def choose_damping(values: np.ndarray, relevant: np.ndarray) -> int:
    """Index of a ranker's damping, from questions asked nowhere else: `one_standard_error_rule` in
    mean Recall@10 over pictures and concepts.

    values [D, pictures, concepts, N]; relevant [pictures, concepts, N].
    """
    return one_standard_error_rule(metrics.recall_at_k(values, relevant[None]).mean(2))


def one_standard_error_rule(quality: np.ndarray) -> int:
    """The last of D whose mean quality [D, n] is within one standard error of the best (Breiman et
    al. 1984): where the choice hardly matters, as it mostly does not, it neither ends at the edge
    of the sweep nor hangs on a few pictures.
    """
    best = quality[quality.mean(1).argmax()]
    error = best.std(ddof=1) / len(best) ** 0.5 if len(best) > 1 else 0.0
    return int(np.flatnonzero(quality.mean(1) >= best.mean() - error).max())


class QuerySet:
    """All questions of a benchmark's pictures of one kind, and which belong together."""

    def __init__(self, benchmark: Benchmark, kind: str) -> None:
        splits = benchmark.questions(kind)
        self.asked = [q for questions in splits.values() for q in questions]
        names = [split for split, questions in splits.items() for _ in questions]
        self._split, self._concept = np.array(names), np.array([q.concept for q in self.asked])
        self.relevant = np.stack([benchmark.relevant(q) for q in self.asked])
        self.concepts = benchmark.concepts
        self.pictures = {s: len(q) // len(self.concepts) for s, q in splits.items()}  # of a split

    def of(self, split: str, concept: str) -> np.ndarray:
        """Places of the questions of a split and concept."""
        return np.flatnonzero((self._split == split) & (self._concept == concept))

    def reported(self) -> np.ndarray:
        """Places of the questions of all splits but the one that chooses."""
        return np.flatnonzero(self._split != TUNE)

    def choosing(self) -> np.ndarray:
        """Places [pictures, concepts] of the questions of the split that chooses."""
        return np.stack([self.of(TUNE, concept) for concept in self.concepts], 1)

    def damping(self, values: np.ndarray) -> int:
        """`choose_damping` on the split that is there for it; values [D, Q, N]."""
        places = self.choosing()
        return choose_damping(values[:, places], self.relevant[places])


@dataclass
class EvaluationResult:
    """What the rankers found. tables {kind: table}; dampings, steps: what was chosen for a ranker
    that has one; cost: forward equivalents of one question (`cost`); curves {split concept:
    {ranker: Recall@1, 2, ...}}, of the first kind.
    """

    tables: dict[str, Table]
    dampings: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    curves: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def evaluate_methods(
    task: AttributionTask, benchmark: Benchmark, asked: dict[str, QuerySet]
) -> EvaluationResult:
    """Every ranker's figures for the questions asked."""
    splits, concepts = benchmark.splits, benchmark.concepts
    found = EvaluationResult(
        {kind: {s: {c: {} for c in concepts} for s in splits} for kind in asked}
    )
    for name in chosen_rankers(task.settings.methods):
        ranker, chosen, first = RANKERS.get(name)(task), 0, next(iter(asked.values()))
        if hasattr(ranker, "candidates"):
            step = choose_step(ranker, first)
            ranker, found.steps[name] = ranker.at(step), ranker.candidates[step]
        for kind, questions in asked.items():
            values = score_queries(ranker, questions)
            if len(values) == len(DAMPINGS) and name not in found.dampings:
                chosen = questions.damping(values)
                found.dampings[name] = DAMPINGS[chosen]
            record_metrics(found.tables[kind], name, questions, values, chosen)
            if questions is first:
                record_curve(found.curves, splits, name, questions, values[chosen])
        found.cost[name] = count_forwards(ranker, first.asked[0])
    for kind, questions in asked.items():
        record_chance(found.tables[kind], questions)
    return found


def score_queries(ranker: Any, questions: QuerySet) -> np.ndarray:
    """[D, Q, N]. A ranker whose step is chosen already is not asked what only chooses."""
    if not hasattr(ranker, "candidates"):
        return ranker.rank(questions.asked)
    places = questions.reported()
    part = ranker.rank([questions.asked[i] for i in places])
    values = np.zeros((len(part), len(questions.asked), part.shape[-1]), part.dtype)
    values[:, places] = part
    return values


def choose_step(ranker: Any, questions: QuerySet) -> int:
    """Index among a ranker's candidates, by the rule of `choose_damping`, on the tune split."""
    places = questions.choosing()
    asked = [questions.asked[i] for i in places.ravel()]
    values = swept(ranker, asked)
    values = values.reshape(len(values), *places.shape, -1)
    return choose_damping(values, questions.relevant[places])


def record_metrics(
    table: Table, name: str, questions: QuerySet, values: np.ndarray, damping: int
) -> None:
    """Enter a ranker's figures; values [D, Q, N]."""
    for split, concepts in table.items():
        for concept, entries in concepts.items():
            places = questions.of(split, concept)
            relevant = questions.relevant[places]
            entries[name] = summary(values[damping, places], relevant)
            if len(values) > 1:
                sweep = metrics.recall_at_k(values[:, places], relevant[None]).mean(1)
                entries[name]["oracle_recall_at_10"] = round(float(sweep.max()), 4)


def record_curve(
    curves: dict[str, dict[str, np.ndarray]],
    splits: tuple[str, ...],
    name: str,
    questions: QuerySet,
    values: np.ndarray,
) -> None:
    """Enter a ranker's Recall@k; values [Q, N]."""
    for split in splits:
        for concept in questions.concepts:
            places = questions.of(split, concept)
            curve = metrics.recall_curve(values[places], questions.relevant[places])
            curves.setdefault(f"{split.upper()} {concept}", {})[name] = curve


def record_chance(table: Table, questions: QuerySet) -> None:
    """Enter what a random order would find."""
    for split, concepts in table.items():
        for concept, entries in concepts.items():
            relevant = questions.relevant[questions.of(split, concept)]
            count = relevant.shape[-1]
            chance = [metrics.chance_recall_at_k(count, int(n)) for n in relevant.sum(1)]
            entries["chance"] = {"recall_at_10": round(float(np.mean(chance)), 4)}


def markdown(found: EvaluationResult) -> str:
    """A table a kind of picture, one row a ranker."""
    lines: list[str] = []
    for kind, table in found.tables.items():
        columns = [(split, concept) for split, concepts in table.items() for concept in concepts]
        heads = [f"{split.upper()} {concept}" for split, concept in columns]
        lines += [f"\n**{kind} queries**", "", f"| method | {' | '.join(heads)} | forwards |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        first = table[columns[0][0]][columns[0][1]]
        for name in first:
            row = [_entry(table[split][concept][name]) for split, concept in columns]
            lines.append(f"| {name} | {' | '.join(row)} | {found.cost.get(name, 0):,} |")
    return "\n".join(lines)


def _entry(e: dict[str, Any]) -> str:
    if "ci95" not in e:
        return f"{e['recall_at_10']:.3f}"
    oracle = f"; oracle {e['oracle_recall_at_10']:.2f}" if "oracle_recall_at_10" in e else ""
    low, high = e["ci95"]
    rest = f"least {e['least_10_recall']:.2f}, mAP {e['map']:.2f}{oracle}"
    return f"{e['recall_at_10']:.2f} [{low:.2f}, {high:.2f}] ({rest})"


def evaluate(task: AttributionTask, name: str = "emoji") -> dict[str, Any]:
    """Evaluate on benchmark `name`: print the table and, as the last line, one JSON object.

    Both are kept under the results folder. The tables of the first kind of picture stand at the top
    of the JSON object, those of others under their kind.
    """
    benchmark = BENCHMARKS.get(name)(task)
    asked = {kind: QuerySet(benchmark, kind) for kind in benchmark.kinds}
    found = evaluate_methods(task, benchmark, asked)
    first, *others = benchmark.kinds
    result = {
        **found.tables[first],
        "damping": found.dampings.get("concept_trak"),
        "dampings": found.dampings,
        "steps": found.steps,
        "forwards_per_query": found.cost,
        **{kind: found.tables[kind] for kind in others},
        "queries": asked[first].pictures,
    }
    table = markdown(found)
    with result_folder(task.settings, "eval", name, task.train_identity()) as folder:
        write_metrics(folder, "metrics", result, task.settings)
        write_bytes(folder / "table.md", f"{table}\n".encode())
        write_bytes(folder / "recall.png", png(against_k(found.curves, "recall")))
    print(table)
    print(json.dumps(result))
    return result
