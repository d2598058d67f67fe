"""Which k still ranks as well: the embedded rows and queries, made again with other projections.

Each PROJ_DIM is a projection of its own of the same gradients. A ranking is compared with the
pictures that carry the concept, and with the ranking at the largest k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from concept_trak.attribution.attributors import GradientAttributor
from concept_trak.attribution.find_store import find_store
from concept_trak.attribution.question import Query
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.train_grad import open_store, train_grad
from concept_trak.process import log
from concept_trak.scoring import metrics
from concept_trak.scoring.ranking import ranking
from concept_trak.scoring.scores import precondition_and_score

PROJ_DIMS = (1024, 2048, 4096, 8192)

Keep = Callable[[GradientAttributor, Sequence[Query]], np.ndarray]  # -> query rows [Q, k]


def scores_at(task: AttributionTask, asked: Sequence[Query], keep: Keep) -> tuple[int, np.ndarray]:
    """(k, float32 [Q, N] scores at DAMPING) under the settings of a task; its rows are made where
    there are none yet.
    """
    there = find_store(task.settings, task.train_identity())
    store = open_store(task) if there else train_grad(task)
    ranker, fisher = GradientAttributor(task, store), task.preconditioner
    rows, damping = keep(ranker, asked), [task.settings.damping]
    return store.dim, precondition_and_score(store, rows, damping, fisher, ranker.row_weight())[0]


def recall_by_width(
    task: AttributionTask,
    asked: Sequence[Query],
    relevant: np.ndarray,
    keep: Keep,
    proj_dims: Sequence[int] = PROJ_DIMS,
) -> list[dict[str, Any]]:
    """An entry a k: "k"; "recall_at_10" of the pictures that carry the concept, mean over queries,
    and its "ci95"; "same_at_10", "same_at_100", the share of the first ten and hundred that are
    those of the last k.

    relevant: bool [Q, N].
    """
    found: dict[int, np.ndarray] = {}
    for proj_dim in proj_dims:
        log(f"PROJ_DIM={proj_dim} ...")
        other = task.with_settings(task.settings.but(proj_dim=proj_dim))
        k, values = scores_at(other, asked, keep)
        found[k] = values
    last, table = list(found.values())[-1], []
    for k, values in found.items():
        recall = metrics.recall_at_k(values, relevant)
        entry: dict[str, Any] = {"k": k, "recall_at_10": float(recall.mean())}
        entry["ci95"] = list(metrics.bootstrap_interval(recall))
        table.append(entry | {f"same_at_{n}": _same(values, last, n) for n in (10, 100)})
    return table


def _same(found: np.ndarray, other: np.ndarray, k: int) -> float:
    """Mean share of the first k [Q, N] that the two have in common."""
    pairs = zip(ranking(found, k=k), ranking(other, k=k), strict=True)
    return float(np.mean([np.isin(a, b).mean() for a, b in pairs]))


def lines(table: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    last = table[-1]["k"]
    told = [
        f"| k | recall@10 of the labels | first 10 as at {last:,} | first 100 |",
        "|---|---|---|---|",
    ]
    for e in table:
        low, high = e["ci95"]
        label = f"{e['recall_at_10']:.3f} [{low:.3f}, {high:.3f}]"
        told.append(f"| {e['k']:,} | {label} | {e['same_at_10']:.3f} | {e['same_at_100']:.3f} |")
    return "\n".join(told)
