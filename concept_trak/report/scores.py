"""The scores of all training pictures of one concept, as data.

scores.csv   at the fixed damping, the highest first: rank, score, percentile (percent of the
             pictures that score lower), file_name, caption, what the labels say, how well the
             caption fits, whether the labels name the concept (match), index (row of scores.npy)
scores.npy   float32 [dampings, pictures]; the dampings are those of metrics.json, in its order
scores-METHOD.npy   the same of another method; one row for a method that knows no damping
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.emoji import COLUMNS
from ..files import write_bytes
from ..scoring.concept import ConceptResult
from ..scoring.ranking import ranking
from .shown import Shown

CSV, NPY = "scores.csv", "scores.npy"


def npy_of(method: str) -> str:
    """Name of another method's scores."""
    return f"scores-{method}.npy"


def percentiles(scores: np.ndarray) -> np.ndarray:
    """[N] percent of the pictures that score lower."""
    return 100 * np.searchsorted(np.sort(scores), scores) / len(scores)


def write_scores(
    folder: Path, concept: ConceptResult, shown: Shown, others: Mapping[str, np.ndarray]
) -> None:
    """The files of the module's docstring. others: {method: [D or 1, N]}."""
    write_bytes(folder / CSV, _table(concept, shown))
    for name, values in {NPY: concept.scores, **{npy_of(k): v for k, v in others.items()}}.items():
        content = io.BytesIO()
        np.save(content, np.asarray(values, "<f4"), allow_pickle=False)
        write_bytes(folder / name, content.getvalue())


def _table(concept: ConceptResult, shown: Shown) -> bytes:
    scores = concept.scores[concept.damping_index(shown.fixed_damping)]
    records, captions = shown.dataset.records, shown.dataset.captions
    known: dict[str, list[Any]] = {
        name: [record.get(name) for record in records] for name in COLUMNS
    }
    known = {name: values for name, values in known.items() if any(values)}
    if shown.fit is not None:
        known["fit"] = [f"{value:.3f}" for value in shown.fit]
    if concept.relevant is not None:
        known["match"] = concept.relevant.astype(int).tolist()
    places, text = percentiles(scores), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "score", "percentile", "file_name", "caption", *known, "index"])
    for rank, i in enumerate(ranking(scores).tolist(), 1):
        about = [
            f"{scores[i]:.6e}",
            f"{places[i]:.2f}",
            records[i].get("file_name", ""),
            captions[i],
        ]
        writer.writerow([rank, *about, *(values[i] for values in known.values()), i])
    return text.getvalue().encode(errors="backslashreplace")
