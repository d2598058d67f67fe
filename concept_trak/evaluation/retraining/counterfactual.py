"""Counterfactual: without the pictures that a ranking names, does the model lose the concept?

For `TARGETS` "report" concepts of a kind, each ranker names its highest `TOP` pictures; a model is
trained again without the union of them (one training answers for all targets; MUCS), for each seed.

    target_drop      mean over targets of (J_c(all pictures) - J_c(without them)), in units of their
                     mean J_c(all pictures): 1 is all that was known of them
    untouched_drop   the same for the other "report" concepts of the kind
    other_drop       the same for the concepts of the other kind, which these pictures show, too
    judge_drop       of the judge's rate of the targets in pictures drawn

Arms beside the rankers: `labels` removes as many labelled pictures (the oracle), `random` as many
at random, `least` the lowest of ours. `noise` is the standard deviation, between seeds of the model
of all pictures, of such a mean over targets: what chance does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...datasets.folder import ImageCaptionDataset
from ...scoring.metrics import bootstrap_interval
from ...scoring.ranking import ranking
from .plan import GROUP_SEED, KINDS, WITHOUT, Plan, groups
from .presence import Presences

TARGETS = {"object": 16, "style": 4}
TOP = {"object": 7, "style": 56}  # of 7 and 112 labelled pictures
LABELS, RANDOM, LEAST = "labels", "random", "least"


def targets(data: ImageCaptionDataset, kind: str) -> list[str]:
    """The "report" concepts that are removed, drawn once."""
    names = groups(data)["report"][kind]
    rng = np.random.default_rng([GROUP_SEED, 17, KINDS.index(kind)])
    return sorted(names[i] for i in rng.permutation(len(names))[: TARGETS[kind]])


def arms(
    data: ImageCaptionDataset, kind: str, scores: Mapping[str, np.ndarray], ours: str
) -> dict[str, list[int]]:
    """{"{kind}-{arm}": rows to remove}; scores {ranker: [C, N]} of the `targets` in their order."""
    names, k, count = targets(data, kind), TOP[kind], len(data)
    shown, rng = np.array(data.column(kind)), np.random.default_rng([GROUP_SEED, 19])
    found = {name: [ranking(row)[:k] for row in values] for name, values in scores.items()}
    found[LEAST] = [ranking(row, largest=False)[:k] for row in scores[ours]]
    labelled = [rng.permutation(np.flatnonzero(shown == name)) for name in names]
    found[LABELS] = [rows[:k] for rows in labelled]
    found[RANDOM] = [rng.permutation(count)[:k] for _ in names]
    return {
        f"{kind}-{arm}": np.unique(np.concatenate(rows)).tolist() for arm, rows in found.items()
    }


def drops(
    plan: Plan,
    found: Mapping[str, Presences],
    whole: Mapping[int, Presences],
    data: ImageCaptionDataset,
    held_out: ImageCaptionDataset,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind: {arm: figures}} over the seeds of each arm; whole: presences of the models of all
    pictures, by seed.
    """
    told: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        names = targets(data, kind)
        others = [n for n in groups(data)["report"][kind] if n not in names]
        other = sorted(set(data.column(WITHOUT[kind])))
        asked = {
            "target_drop": (kind, names),
            "untouched_drop": (kind, others),
            "other_drop": (WITHOUT[kind], other),
        }
        for arm in _arms_of(plan, kind):
            subsets = [s for s in plan.subsets if s.name.rsplit("-", 1)[0] == arm]
            each: dict[str, list[np.ndarray]] = {figure: [] for figure in (*asked, "judge_drop")}
            for s in subsets:
                before, after = whole[s.seed], found[s.name]
                for figure, (of, which) in asked.items():
                    if which:
                        each[figure].append(_drop(before, after, of, held_out, which))
                rates = [p.judged_of(kind, held_out, names) for p in (before, after)]
                each["judge_drop"].append(rates[0] - rates[1])
            removed = len(subsets[0].removed)
            about = {"removed": removed, "seeds": len(subsets)}
            told[kind][arm.removeprefix(f"{kind}-")] = about | _summary(each)
    return told


def _arms_of(plan: Plan, kind: str) -> list[str]:
    names = (s.name.rsplit("-", 1)[0] for s in plan.subsets)
    return [name for name in dict.fromkeys(names) if name.startswith(f"{kind}-")]


def _drop(
    before: Presences, after: Presences, kind: str, held_out: ImageCaptionDataset, names: list[str]
) -> np.ndarray:
    """[C] J_c lost, in units of the mean J_c before."""
    first, second = (p.of_concepts(kind, held_out, names) for p in (before, after))
    return (first - second) / first.mean()


def _summary(each: Mapping[str, list[np.ndarray]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for figure, parts in each.items():
        if parts:
            values = np.concatenate(parts)
            low, high = bootstrap_interval(values)
            told[figure] = round(float(values.mean()), 4)
            told[f"{figure}_ci95"] = [round(low, 4), round(high, 4)]
    return told


def noise(
    whole: Mapping[int, Presences], data: ImageCaptionDataset, held_out: ImageCaptionDataset
) -> dict[str, float | None]:
    """{kind: standard deviation between seeds of a mean drop over targets}; None for one seed."""
    told: dict[str, float | None] = {}
    for kind in KINDS:
        names = targets(data, kind)
        means = [p.of_concepts(kind, held_out, names).mean() for p in whole.values()]
        spread = np.std(means, ddof=1) * 2**0.5 / np.mean(means) if len(means) > 1 else None
        told[kind] = None if spread is None else round(float(spread), 4)
    return told
