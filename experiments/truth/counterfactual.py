"""Counterfactual: without the pictures that a ranking names, does the model lose the concept?

For `TARGETS` "report" concepts of a kind, each ranker names its highest `TOP` pictures; a model is
trained again without the union of them (one training answers for all targets; MUCS), for each seed.

    target_drop      mean over targets of (J_c(all pictures) - J_c(without them)), in units of their
                     mean J_c(all pictures): 1 is all that was known of them
    untouched_drop   the same for the other "report" concepts of the kind
    other_drop       the same for the concepts of the other kind, which these pictures show, too
    judge_drop       of the judge's rate of the targets in pictures drawn
    share_of_oracle  target_drop as a part of what removing as many labelled pictures takes
    behind_ours      by how much ours takes more, target by target
    judge_...        the last two of judge_drop

Arms beside the rankers: `labels` removes as many labelled pictures (the oracle), `random` as many
at random, `least` the lowest of ours. `seed_noise` is the standard deviation, between seeds of the
model of all pictures, of such a mean: what chance does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.scoring.metrics import bootstrap_interval, resampled_means
from concept_trak.scoring.ranking import ranking

from .concept_likelihood import ConceptMeasurements
from .subsets import GROUP_SEED, RetrainingPlan, Subset, kinds_of, other_kind, split_concepts

TARGETS = {"object": 16, "style": 4}
TOP = {"object": 7, "style": 56}  # of 7 and 112 labelled pictures
LABELS, RANDOM, LEAST = "labels", "random", "least"

Lost = Mapping[int, Mapping[str, np.ndarray]]  # of one arm: seed -> figure -> [its concepts]


def targets(data: ImageCaptionDataset, kind: str) -> list[str]:
    """The "report" concepts that are removed, drawn once."""
    names = split_concepts(data)["report"][kind]
    rng = np.random.default_rng([GROUP_SEED, 17, kinds_of(data).index(kind)])
    return sorted(names[i] for i in rng.permutation(len(names))[: TARGETS.get(kind)])


def top_of(data: ImageCaptionDataset, kind: str) -> int:
    """How many pictures a ranker names for each target: `TOP`, else as many as are labelled with
    the rarest. Half of those were too few to ask with: of 240 pictures of a shape the other 120
    teach it as well, whoever chose them.
    """
    shown = np.array(data.column(kind))
    return TOP.get(kind) or min((shown == name).sum() for name in targets(data, kind))


def removal_sets(
    data: ImageCaptionDataset, kind: str, scores: Mapping[str, np.ndarray], ours: str
) -> dict[str, list[int]]:
    """{"{kind}-{arm}": rows to remove}; scores {ranker: [C, N]} of the `targets` in their order."""
    names, k, count = targets(data, kind), top_of(data, kind), len(data)
    shown, rng = np.array(data.column(kind)), np.random.default_rng([GROUP_SEED, 19])
    found = {name: [ranking(row)[:k] for row in values] for name, values in scores.items()}
    if ours in scores:
        found[LEAST] = [ranking(row, largest=False)[:k] for row in scores[ours]]
    labelled = [rng.permutation(np.flatnonzero(shown == name)) for name in names]
    found[LABELS] = [rows[:k] for rows in labelled]
    found[RANDOM] = [rng.permutation(count)[:k] for _ in names]
    return {
        f"{kind}-{arm}": np.unique(np.concatenate(rows)).tolist() for arm, rows in found.items()
    }


def presence_drops(
    plan: RetrainingPlan,
    found: Mapping[str, ConceptMeasurements],
    whole: Mapping[int, ConceptMeasurements],
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
    ours: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind: {arm: figures}} over the seeds of each arm; whole: presences of the models of all
    pictures, by seed.
    """
    told: dict[str, dict[str, dict[str, Any]]] = {k: {} for k in kinds_of(data)}
    for kind in told:
        of_kind = _arms_of(plan, kind)
        lost = {
            arm.removeprefix(f"{kind}-"): {
                s.seed: _lost(whole[s.seed], found[s.name], kind, data, held_out) for s in subsets
            }
            for arm, subsets in of_kind.items()
        }
        for arm, by_seed in lost.items():
            removed = len(of_kind[f"{kind}-{arm}"][0].removed)
            about = {"removed": removed, "seeds": len(by_seed)}
            told[kind][arm] = about | _summary(by_seed) | _difference_to_ours(by_seed, lost, ours)
    return told


def _lost(
    before: ConceptMeasurements,
    after: ConceptMeasurements,
    kind: str,
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
) -> dict[str, np.ndarray]:
    """{figure: [its concepts]} of one model."""
    lost = {
        figure: _drop(before, after, of, held_out, which)
        for figure, (of, which) in asked(data, kind).items()
        if which
    }
    rates = [p.judged_of(kind, held_out, targets(data, kind)) for p in (before, after)]
    return lost | {"judge_drop": rates[0] - rates[1]}


def asked(data: ImageCaptionDataset, kind: str) -> dict[str, tuple[str, list[str]]]:
    """{figure: (kind, concepts)}: whose presences each drop is about."""
    names, other = targets(data, kind), other_kind(data, kind)
    return {
        "target_drop": (kind, names),
        "untouched_drop": (
            kind,
            [n for n in split_concepts(data)["report"][kind] if n not in names],
        ),
        "other_drop": (other, sorted(set(data.column(other)))),
    }


def _arms_of(plan: RetrainingPlan, kind: str) -> dict[str, list[Subset]]:
    """{"{kind}-{arm}": its subsets}, one a seed."""
    found: dict[str, list[Subset]] = {}
    for s in plan.subsets:
        arm = s.name.rsplit("-", 1)[0]
        if arm.startswith(f"{kind}-"):
            found.setdefault(arm, []).append(s)
    return found


def _drop(
    before: ConceptMeasurements,
    after: ConceptMeasurements,
    kind: str,
    held_out: ImageCaptionDataset,
    names: list[str],
) -> np.ndarray:
    """[C] J_c lost, in units of the mean J_c before."""
    first, second = (p.of_concepts(kind, held_out, names) for p in (before, after))
    return (first - second) / first.mean()


def _summary(by_seed: Lost) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for figure in next(iter(by_seed.values())):
        values = np.concatenate([lost[figure] for lost in by_seed.values()])
        told |= _told(figure, float(values.mean()), bootstrap_interval(values))
    return told


def _difference_to_ours(by_seed: Lost, lost: Mapping[str, Lost], ours: str) -> dict[str, Any]:
    """An arm's drops of the targets beside the oracle's and ours, over the seeds that both have."""
    told: dict[str, Any] = {}
    for prefix, figure in (("", "target_drop"), ("judge_", "judge_drop")):
        if LABELS in lost and (both := sorted(by_seed.keys() & lost[LABELS].keys())):
            own, oracle = (_targets(of, both, figure) for of in (by_seed, lost[LABELS]))
            told[f"{prefix}oracle_drop"] = round(float(oracle.mean()), 4)
            means = resampled_means(np.stack([own, oracle]))
            if (means[1] > 0).all():  # else a share of it means nothing
                low, high = np.quantile(means[0] / means[1], (0.025, 0.975))
                share = float(own.mean() / oracle.mean())
                told |= _told(f"{prefix}share_of_oracle", share, (float(low), float(high)))
        if ours in lost and (both := sorted(by_seed.keys() & lost[ours].keys())):
            behind = _targets(lost[ours], both, figure) - _targets(by_seed, both, figure)
            told |= _told(f"{prefix}behind_ours", float(behind.mean()), bootstrap_interval(behind))
    return told


def _targets(by_seed: Lost, seeds: list[int], figure: str) -> np.ndarray:
    return np.concatenate([by_seed[seed][figure] for seed in seeds])


def _told(figure: str, value: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {
        figure: round(value, 4),
        f"{figure}_ci95": [round(interval[0], 4), round(interval[1], 4)],
    }


def seed_noise(
    whole: Mapping[int, ConceptMeasurements],
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
) -> dict[str, dict[str, float] | None]:
    """{kind: {figure: standard deviation between seeds of such a mean drop}}; None for one seed."""
    told: dict[str, dict[str, float] | None] = {}
    for kind in kinds_of(data):
        spread = {}
        for figure, (of, which) in asked(data, kind).items():
            if which and len(whole) > 1:
                means = [p.of_concepts(of, held_out, which).mean() for p in whole.values()]
                spread[figure] = round(float(np.std(means, ddof=1) * 2**0.5 / np.mean(means)), 4)
        told[kind] = spread or None
    return told
