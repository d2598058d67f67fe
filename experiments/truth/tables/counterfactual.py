"""Counterfactual: without the pictures that a ranking names, is the concept lost?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from concept_trak.attribution.task import AttributionTask
from concept_trak.parsing import parse_methods

from .. import counterfactual, figures
from ..setup import (
    OURS,
    SEEDS,
    base_of,
    bench_of,
    damping_of,
    format_interval,
    full_data_models,
    measured_subset,
    plan_of,
    score_all_methods,
    write_table,
)
from ..subsets import KINDS, RetrainingPlan, counterfactual_plan, split_concepts
from ..train_many import load_measurements
from .lds import by_lds, truths_of


def table(task: AttributionTask) -> dict[str, Any]:
    """{arm: {figures of objects, "noise", "style": {...}}, "targets"}.

    The plan is the committed one; with RETRAIN=1 one that is not there is made from today's scores.
    """
    data, held_out = task.train, task.everything.split("held_out")
    named = parse_methods(task.settings.methods)
    plan = plan_of(task, "counterfactual", lambda: planned_counterfactual(task), named)
    bench = bench_of(task)
    bases = measured_subset(task, base_of(task), 1)
    found = load_measurements(bench, bases, held_out)
    whole = {s.seed: found[s.name] for s in bases.subsets}
    there = measured_subset(task, plan, 1)
    there = replace(there, subsets=tuple(s for s in there.subsets if s.seed in whole))
    arms = load_measurements(bench, there, held_out)
    drops = counterfactual.presence_drops(there, arms, whole, data, held_out, OURS)
    noise = counterfactual.seed_noise(whole, data, held_out)
    told = {arm: _of_arm(arm, drops, noise) for kind in KINDS for arm in drops[kind]}
    told["targets"] = {kind: counterfactual.targets(data, kind) for kind in KINDS}
    drawn = {"drops": figures.drops(drops, noise), "drawn": figures.drops(drops, {}, "judge_drop")}
    return write_table(task, "counterfactual", told, _markdown(drops, noise), drawn)


def _of_arm(arm: str, drops: dict[str, Any], noise: dict[str, Any]) -> dict[str, Any]:
    """An arm's figures: those of objects, and beside them of styles."""
    each = {kind: drops[kind][arm] | {"noise": noise[kind]} for kind in KINDS if arm in drops[kind]}
    return each.get("object", {}) | ({"style": each["style"]} if "style" in each else {})


def planned_counterfactual(task: AttributionTask) -> RetrainingPlan:
    """What every ranker of METHODS names on the first model of all pictures."""
    data = task.train
    asking, asked = next(full_data_models(task))
    *_, truths = truths_of(task)
    values, tune = score_all_methods(asking, asked), split_concepts(data)["tune"]
    chosen = {
        name: damping_of(name, task, of, by_lds(asked, truths, tune, of))
        for name, of in values.items()
    }
    arms: dict[str, list[int]] = {}
    for kind in KINDS:
        names = counterfactual.targets(data, kind)
        scores = {n: asked.mean(of[[chosen[n]]], kind, names)[0] for n, of in values.items()}
        arms |= counterfactual.removal_sets(data, kind, scores, OURS)
    return counterfactual_plan(data, arms, SEEDS)


FIGURES = (
    *("target_drop", "share_of_oracle", "behind_ours"),
    *("untouched_drop", "other_drop"),
    *("judge_drop", "judge_share_of_oracle", "judge_behind_ours"),
)


def _markdown(drops: dict[str, Any], noise: dict[str, Any]) -> str:
    lines = []
    for kind in filter(drops.get, KINDS):
        lines += [f"\n**{kind}**\n", f"| removed | pictures | seeds | {' | '.join(FIGURES)} |"]
        lines.append("|---" * (3 + len(FIGURES)) + "|")
        for arm, told in drops[kind].items():
            cells = [
                format_interval(told[f], told[f"{f}_ci95"]) if f in told else "" for f in FIGURES
            ]
            start = f"| {arm} | {told['removed']} | {told['seeds']} |"
            lines.append(f"{start} {' | '.join(cells)} |")
        spread = noise[kind] or {}
        cells = [f"{spread[f]:.2f}" if f in spread else "" for f in FIGURES]
        lines.append(f"| (between seeds) | 0 | | {' | '.join(cells)} |")
    return "\n".join(lines)
