"""Results by an index: the exact scores of the candidates, and a sample for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..datasets import labels as emoji
from ..errors import UserError
from ..index.rabitq import Index
from ..index.recall import keep_recall, kept_recall, measure
from ..index.search import Search, exact
from ..process import log
from ..scoring.candidate_result import CandidateResult
from ..settings import DAMPINGS, Settings
from ..store.store import Store
from .attributors import GradientAttributor
from .find_store import find_store
from .preflight import build_index_hint, missing_gradients_message
from .question import Query
from .task import AttributionTask

SAMPLE = 2048  # rows drawn by chance, which tell how all scores are spread
SAMPLE_SEED = 0


def search_settings(settings: Settings) -> Search:
    """How the settings search."""
    return Search(settings.candidates, settings.top_k)


def build_index(task: AttributionTask) -> Index:
    """The index of the settings' store, over the shards that are finished: what is missing is made,
    and, once no shard is pending, its recall is measured.

    UserError for rows that are not there or are of something else.
    """
    s, wanted = task.settings, task.train_identity()
    folder = find_store(s, wanted)
    if folder is None:
        raise UserError(missing_gradients_message(s))
    store = Store.read_manifest(folder)
    store.expect(wanted if "adopted" not in store.identity else {})
    index = Index.create(store, task.projection.widths, s.damping)
    made = index.update()
    log(f"{index.folder}: codes of {index.row_bytes} bytes a row; shards made: {len(made)}")
    if left := store.pending():
        log(f"{len(left)} shards of the rows are not finished; build again when they are")
        return index
    search = search_settings(s)
    if kept_recall(index, search) is None:
        ranker = GradientAttributor(task, store)
        log("measuring what it finds of what a scan finds ...")
        measured = measure(index, task.preconditioner, DAMPINGS, search, ranker.row_weight())
        keep_recall(index, search, measured)
    log(index_summary(index, search, s.damping))
    return index


def index_summary(index: Index, search: Search, damping: float) -> str:
    """How well an index finds, in a sentence; a result is shown with it."""
    measured = kept_recall(index, search)
    how = f"Found by an index; of each end the {search.candidates} likeliest at each damping are "
    how += "scored exactly."
    if measured is None:
        return (
            f"{how} What it finds of what a scan finds is not known: build it again to measure it."
        )
    entry = next((e for e in measured["dampings"] if np.isclose(e["damping"], damping)), {})
    if "recall_at_10" not in entry:
        return f"{how} There are too few images to measure what it finds."
    low, high = entry["ci95"]
    return (
        f"{how} At damping {damping:g} it finds {entry['recall_at_10']:.3f} [{low:.3f}, "
        f"{high:.3f}] of the ten highest scores of a scan, and "
        f"{entry['least_recall_at_10']:.3f} of the ten lowest (mean over {measured['queries']} "
        "rows asked for as queries, and its 95 % interval)."
    )


def search_index(
    ranker: GradientAttributor, store: Store, questions: Sequence[Query]
) -> list[CandidateResult]:
    """The result of each question. UserError for an index that is missing, not whole or of other
    rows.
    """
    task, s = ranker.task, ranker.task.settings
    index, search = Index.open(store, mend=build_index_hint(s)), search_settings(s)
    weight, labels = ranker.row_weight(), task.train
    chance = np.random.default_rng(SAMPLE_SEED)
    size = min(SAMPLE, store.num_rows)
    sampled = np.sort(chance.choice(store.num_rows, size, replace=False))
    told, results = index_summary(index, search, s.damping), []
    for question, solved in zip(questions, ranker.solved(questions), strict=True):
        found = search.find(index, solved, weight)
        spread = exact(index, sampled, solved, weight)
        truth = emoji.relevance_or_none(labels, question.words)
        result = CandidateResult(
            question.words,
            question.minus,
            found.scores,
            DAMPINGS,
            truth,
            rows=found.rows,
            num_rows=store.num_rows,
            sampled=sampled,
            sampled_scores=spread,
            told=told,
        )
        results.append(result)
    return results
