"""The scores of all training pictures of one concept, as data.

scores.csv   at the fixed damping, the highest first: rank, score, percentile (percent of the
             pictures that score lower), file_name, caption, what the labels say, how well the
             caption fits, whether the labels name the concept (match), index (row of scores.npy)
scores.npy   float32 [dampings, pictures]; the dampings are those of metrics.json, in its order
scores-METHOD.npy   the same of another method; one row for a method that knows no damping

Where an index was searched, scores are known of its candidates only. Then scores.csv lists these,
its percentile is that among a random sample of all pictures, its rank, which counts all pictures,
is empty unless all are candidates, and in the place of scores.npy stand
candidates.npy      float32 [dampings, candidates], and
candidates-rows.npy int64 [candidates], the pictures they are of: rows of the store, ascending
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_io import write_bytes
from ..datasets.labels import COLUMNS
from ..scoring.candidate_result import CandidateResult
from ..scoring.result import ConceptResult
from .context import ReportContext
from .tables import csv_bytes

CSV, NPY = "scores.csv", "scores.npy"
CANDIDATES, CANDIDATE_ROWS = "candidates.npy", "candidates-rows.npy"


def npy_of(method: str) -> str:
    """Name of another method's scores."""
    return f"scores-{method}.npy"


def percentiles(scores: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """[n] percent of the pictures, or of those `among` them, that score lower."""
    among = scores if among is None else among
    return 100 * np.searchsorted(np.sort(among), scores) / len(among)


def write_scores(
    folder: Path, concept: ConceptResult, shown: ReportContext, others: Mapping[str, np.ndarray]
) -> None:
    """The files of the module's docstring. others: {method: [D or 1, N]}."""
    write_bytes(folder / CSV, _table(concept, shown))
    if isinstance(concept, CandidateResult):
        _write_npy(folder / CANDIDATE_ROWS, concept.rows.astype("<i8"))
        _write_npy(folder / CANDIDATES, concept.scores.astype("<f4"))
        return
    for name, values in {NPY: concept.scores, **{npy_of(k): v for k, v in others.items()}}.items():
        _write_npy(folder / name, np.asarray(values, "<f4"))


def _write_npy(path: Path, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_bytes(path, content.getvalue())


def _table(concept: ConceptResult, shown: ReportContext) -> bytes:
    d = concept.damping_index(shown.fixed_damping)
    ranked = concept.ranked(d, concept.num_images)
    scores = concept.scores_of(d, ranked)
    records, captions = shown.dataset.records, shown.dataset.captions
    known: dict[str, list[Any]] = {
        name: [record.get(name) for record in records] for name in COLUMNS
    }
    known = {name: values for name, values in known.items() if any(values)}
    if shown.fit is not None:
        known["fit"] = [f"{value:.3f}" for value in shown.fit]
    if concept.relevant is not None:
        known["match"] = concept.relevant.astype(int).tolist()
    places, rows = percentiles(scores, concept.spread(d)[1]), []
    whole = len(ranked) == concept.num_images
    listed = zip(ranked, scores, places, strict=True)
    for rank, (i, score, place) in enumerate(listed, 1):
        about = [f"{score:.6e}", f"{place:.2f}", records[i].get("file_name", ""), captions[i]]
        rows.append([rank if whole else "", *about, *(values[i] for values in known.values()), i])
    return csv_bytes(["rank", "score", "percentile", "file_name", "caption", *known, "index"], rows)
