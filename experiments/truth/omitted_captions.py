"""Hidden concepts: half of the captions leave the style, or the object, out. Is a picture that
shows a concept under a caption that does not name it found, and did it teach the concept?

    auc_hidden   P(a picture that shows c is ranked above one that does not), both under captions
                 that leave c's kind out; 0.5 for a ranking that only reads
    auc_told     the same among pictures whose captions name it
    taught       J_c of the model that learned them, less that of the model without those that show
                 a "report" concept, in units of the mean presence: over "report" concepts, and
                 over "tune" ones, whose pictures both models learned
"""

from __future__ import annotations

from typing import Any

import numpy as np

from concept_trak.datasets.image_folder import ImageCaptionDataset

from .concept_likelihood import ConceptMeasurements
from .statistics import auc_below
from .subsets import Subset, split_concepts

FIGURES = ("auc_hidden", "auc_told")


def kind_of(subset: Subset) -> str:
    """What the captions of a subset of `plan.hidden_plan` leave out."""
    return subset.name.split("-")[1]


def figures(
    scores: np.ndarray, data: ImageCaptionDataset, subset: Subset, names: list[str]
) -> dict[str, np.ndarray]:
    """{figure: [C]} of the concepts `names` of the hidden kind; scores [C, N]."""
    shown = np.array(data.column(kind_of(subset)))
    hidden = np.zeros(len(data), dtype=bool)
    hidden[list(subset.captions)] = True
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for row, name in zip(scores, names, strict=True):
        for figure, among in (("auc_hidden", hidden), ("auc_told", ~hidden)):
            shows, does_not = among & (shown == name), among & (shown != name)
            if shows.any():  # by chance an object's pictures may all be told
                found[figure].append(auc_below(row, does_not, shows))
    return {figure: np.array(values) for figure, values in found.items()}


def presence_lost(
    kind: str,
    learned: ConceptMeasurements,
    gone: ConceptMeasurements,
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
) -> dict[str, Any]:
    """{"report", "tune": mean presence lost without the hidden pictures of "report" concepts}."""
    told = {}
    for group, of_kinds in split_concepts(data).items():
        first, second = (p.of_concepts(kind, held_out, of_kinds[kind]) for p in (learned, gone))
        told[group] = round(float((first - second).mean() / first.mean()), 4)
    return told
