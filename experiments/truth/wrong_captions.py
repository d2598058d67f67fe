"""Lies: pictures under wrong captions. Does a ranking look at the picture, or read the caption?

For every concept that lies claim, among the pictures that may be ranked for it:

    honest      caption and picture say it
    lie         the caption says it, the picture does not
    unrelated   neither does

    auc             P(a lie is ranked below an honest picture)
    auc_unrelated   P(a lie is ranked below an unrelated picture): right where lies harm
    lies_in_top10   share of a concept's lies that are among its ten highest scores
    recall_at_10    honest pictures among these ten

"trained" models have learned the lies, "untrained" ones are shown them for the first time. Whether
a lie harms the concept that it claims is measured: presences of the models that learned it, against
those of models that never saw these pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.scoring.metrics import bootstrap_interval, recall_at_k
from concept_trak.scoring.ranking import ranking

from .concept_likelihood import ConceptMeasurements
from .statistics import auc_below
from .subsets import KINDS, Subset, texts

FIGURES = ("auc", "auc_unrelated", "lies_in_top10", "recall_at_10")


def claimed_concepts(data: ImageCaptionDataset, subset: Subset, kind: str) -> np.ndarray:
    """[N]: the concept that each lie claims, empty for honest pictures."""
    alone = {
        texts(r["object_phrase"], r["style_phrase"])[1 + KINDS.index(kind)]: r[kind]
        for r in data.records
    }
    found = np.full(len(data), "", dtype=object)
    for row, told in subset.captions.items():
        found[row] = alone[told[1 + KINDS.index(kind)]]
    return found


def claimed(data: ImageCaptionDataset, subset: Subset, kind: str, among: list[str]) -> list[str]:
    """Those of the concepts that lies claim."""
    told = set(claimed_concepts(data, subset, kind))
    return [name for name in among if name in told]


def figures(
    scores: np.ndarray, data: ImageCaptionDataset, subset: Subset, kind: str, names: list[str]
) -> dict[str, np.ndarray]:
    """{figure: [C]} of the concepts `names`, which lies claim; scores [C, N]."""
    said, shown = claimed_concepts(data, subset, kind), np.array(data.column(kind))
    lying = said != ""
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for row, name in zip(scores, names, strict=True):
        lie, honest = said == name, (shown == name) & ~lying
        unrelated = (shown != name) & ~lie
        top = ranking(row)[:10]
        found["auc"].append(auc_below(row, lie, honest))
        found["auc_unrelated"].append(auc_below(row, lie, unrelated))
        found["lies_in_top10"].append(lie[top].sum() / lie.sum())
        found["recall_at_10"].append(float(recall_at_k(row, honest)))
    return {figure: np.array(values) for figure, values in found.items()}


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with 95 % intervals over concepts (and seeds, where they are concatenated)."""
    told: dict[str, Any] = {}
    for figure, values in found.items():
        low, high = bootstrap_interval(values)
        told[figure] = round(float(values.mean()), 4)
        told[f"{figure}_ci95"] = [round(low, 4), round(high, 4)]
    return told


def effect_on_claimed(
    with_lies: ConceptMeasurements,
    without: ConceptMeasurements,
    held_out: ImageCaptionDataset,
    data: ImageCaptionDataset,
    subset: Subset,
) -> dict[str, dict[str, Any]]:
    """{kind: presences that the lies of one seed took from the concepts they claim}.

    claimed: J_c(with) - J_c(without), mean over claimed concepts, against `others`, those neither
    claimed nor shown by a liar (for styles, of which all are both, there are none). Negative:
    lies harm. relative: to the mean presence.
    """
    told = {}
    for kind in KINDS:
        names = sorted(set(data.column(kind)))
        said = set(claimed_concepts(data, subset, kind))
        lost = {data.records[row][kind] for row in subset.captions}
        change = with_lies.of_concepts(kind, held_out, names)
        base = without.of_concepts(kind, held_out, names)
        change = change - base
        is_claimed = np.array([name in said for name in names])
        is_other = np.array([name not in said and name not in lost for name in names])
        told[kind] = {
            "claimed": _mean(change[is_claimed]),
            "others": _mean(change[is_other]),
            "relative": round(float(change[is_claimed].mean() / base.mean()), 3),
        }
    return told


def _mean(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"concepts": 0}
    low, high = bootstrap_interval(values)
    told = {"mean": float(f"{values.mean():.3g}")}
    return told | {"ci95": [float(f"{low:.3g}"), float(f"{high:.3g}")], "concepts": len(values)}
