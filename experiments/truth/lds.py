"""Concept-LDS: do summed scores predict how much a model knows that learned only a part?

Over random subsets, the Spearman correlation of sum_{i kept} score_i with J_c (linear datamodeling
score; Park et al. 2023), a mean over concepts. Captions name the concepts here, so counting the
labelled pictures predicts much of it, and so does counting all, as subsets differ in size: random
positive scores have an LDS. `partial` is what is left when both counts are given. The
ceiling is the correlation of the presences of two seeds on the same subsets: of what one training
says about another. All of it also with `presence.Drawn` in the place of presences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.scoring.ranking import ranking

from .concept_likelihood import ConceptMeasurements
from .queries import ConceptQueries
from .statistics import TRAIN, lds, partial_lds
from .subsets import RetrainingPlan

MOST_POINTS, LEAST_POINTS = 8, 5  # of a curve; concepts and subsets behind each
FIGURES = ("lds", "partial", "squared", "own", "others")  # see `lds_metrics`


@dataclass(frozen=True)
class GroundTruth:
    """What retraining says of one kind of concept. names [C]. kept: bool [S, N], of the subsets
    trained with the first seed. presences [S, C]. relevant: bool [C, N], the labels.
    """

    names: list[str]
    kept: np.ndarray
    presences: np.ndarray
    relevant: np.ndarray

    def of(self, names: list[str]) -> GroundTruth:
        """Of some of the concepts only."""
        at = [self.names.index(name) for name in names]
        return GroundTruth(names, self.kept, self.presences[:, at], self.relevant[at])


@dataclass(frozen=True)
class Curve:
    """Mean presence [R] (with 95 % intervals), where `removed` [R] of a ranker's `top` pictures
    were not learned.
    """

    top: int
    removed: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Predicted:
    """Of each concept in each subset's model [C * S], in standard deviations over the subsets."""

    predicted: np.ndarray
    measured: np.ndarray
    lds: float
    partial: float


def measured(
    plan: RetrainingPlan,
    found: Mapping[str, ConceptMeasurements],
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
    kind: str,
) -> GroundTruth:
    """From the presences of the plan's models."""
    first = [s for s in plan.subsets if s.seed == plan.subsets[0].seed]
    names, shown = sorted(set(data.column(kind))), np.array(data.column(kind))
    presences = [found[s.name].of_concepts(kind, held_out, names) for s in first]
    kept = np.stack([s.kept(len(data)) for s in first])
    return GroundTruth(names, kept, np.stack(presences), np.stack([shown == n for n in names]))


def seed_agreement(
    plan: RetrainingPlan,
    found: Mapping[str, ConceptMeasurements],
    held_out: ImageCaptionDataset,
    kind: str,
    names: list[str],
) -> np.ndarray:
    """[C] Spearman correlations of two seeds' presences over the subsets trained with both.
    UserError for fewer than three of them.

    One seed's presences stand where summed scores do, each subset keeping a row of its own.
    """
    by_removed: dict[tuple[int, ...], list[np.ndarray]] = {}
    for s in plan.subsets:
        values = found[s.name].of_concepts(kind, held_out, names)
        by_removed.setdefault(s.removed, []).append(values)
    pairs = [values for values in by_removed.values() if len(values) > 1]
    if not pairs:
        raise UserError(f"no subset was trained with two seeds; {TRAIN}")
    first, second = (np.stack([values[i] for values in pairs]) for i in (0, 1))
    return lds(second.T, first, np.eye(len(pairs), dtype=bool))


def lds_metrics(values: np.ndarray, truth: GroundTruth) -> dict[str, np.ndarray]:
    """{"lds", "partial", "squared", "own", "others": [C]} of scores [C, N].

    squared: partial of the squared scores with their signs. No ranking knows the difference, but a
    sum does: it hears less of the long middle. Some rankers (DAS as its paper has it) square by
    themselves; here all do. own, others: partial, where only the scores of a concept's labelled
    pictures count, or only those of all the others. What a ranker says is in one of them or in
    both.
    """
    shown = truth.relevant
    parts = {"partial": values, "squared": values * np.abs(values)}
    parts |= {"own": values * shown, "others": values * ~shown}
    return {"lds": lds(values, truth.presences, truth.kept)} | {
        figure: _partial(part, truth) for figure, part in parts.items()
    }


def _partial(values: np.ndarray, truth: GroundTruth) -> np.ndarray:
    return partial_lds(values, truth.presences, truth.kept, truth.relevant)


def presence_vs_removed(values: np.ndarray, truth: GroundTruth, top: int, unit: float) -> Curve:
    """Presence, in units of `unit`, against how many of each concept's `top` highest scores [C, N]
    are missing from a subset; numbers that fewer than five concepts and subsets show are left out.
    """
    highest = np.stack([ranking(row)[:top] for row in values])
    missing = (~truth.kept[:, highest]).sum(2).ravel()  # [S * C]
    step = max(1, top // MOST_POINTS)
    places, presences = missing // step, truth.presences.ravel() / unit
    groups = [(p, presences[places == p]) for p in np.unique(places)]
    shown = [(p, found) for p, found in groups if len(found) >= LEAST_POINTS]
    low, high = np.array([bootstrap_interval(found) for _, found in shown]).T
    removed = np.array([missing[places == p].mean() for p, _ in shown])
    return Curve(top, removed, np.array([found.mean() for _, found in shown]), low, high)


def predictions(values: np.ndarray, truth: GroundTruth) -> Predicted:
    """What scores [C, N] say of every subset, beside what was measured."""
    whole, given = lds(values, truth.presences, truth.kept), _partial(values, truth)
    predicted, presences = (_standard(v) for v in (truth.kept @ values.T, truth.presences))
    return Predicted(predicted.ravel(), presences.ravel(), float(whole.mean()), float(given.mean()))


def _standard(values: np.ndarray) -> np.ndarray:
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread == 0, 1, spread)


def best_damping(
    values: np.ndarray,
    asked: ConceptQueries,
    truths: dict[str, GroundTruth],
    tune: dict[str, list[str]],
) -> int:
    """Index of the damping with the largest mean of both correlations over the "tune" concepts, a
    mean over their kinds; values [D, Q, N].
    """
    totals = np.zeros(len(values))
    for kind in tune:
        of_concepts = asked.mean(values, kind, tune[kind])
        for d, scores in enumerate(of_concepts):
            truth = truths[kind].of(tune[kind])
            totals[d] += float(lds(scores, truth.presences, truth.kept).mean())
            totals[d] += float(_partial(scores, truth).mean())
    return int(totals.argmax())


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with 95 % intervals over concepts."""
    told: dict[str, Any] = {}
    for figure, values in found.items():
        low, high = bootstrap_interval(values)
        told[figure] = round(float(values.mean()), 4)
        told[interval_of(figure)] = [round(low, 4), round(high, 4)]
    return told


def interval_of(figure: str) -> str:
    """The name of a figure's interval in `summary`."""
    return "ci95" if figure == "lds" else f"{figure}_ci95"
