"""LDS: do summed scores predict what a model knows that learned a part of the pictures?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from concept_trak.attribution.task import AttributionTask
from concept_trak.errors import UserError
from concept_trak.registry import RANKERS

from .. import figures as plots
from .. import lds
from ..concept_likelihood import ClassifierRates, ConceptMeasurements
from ..counterfactual import TOP
from ..queries import ConceptQueries, make_queries
from ..setup import (
    KEPT,
    OURS,
    Scores,
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
from ..subsets import KINDS, RetrainingPlan, kept_plan, lds_plan, split_concepts
from ..train_many import load_measurements

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUBSETS, AGAIN = 32, 8
SCATTERED = ("concept_trak", "das", "labels")  # whose predictions are drawn point by point
CURVES = (*SCATTERED, "reference", "d_trak", "latent_neighbours")  # more would hide one another


def table(task: AttributionTask) -> dict[str, Any]:
    """{ranker: {`lds.FIGURES`, intervals, "style": the same, "drawn": all of it once more},
    "ceiling", "ceiling_drawn", "agreement", "subsets", "models"}: objects at the top; over the
    "report" concepts, means over the small models of all pictures that are there.

    drawn: against the judge's rates instead of presences. models: whose scores were taken.
    """
    data, held_out = task.train, task.everything.split("held_out")
    plan_of(task, "lds", lambda: lds_plan(data, SUBSETS, AGAIN))
    there, found, truths = truths_of(task)
    rates = {name: ClassifierRates(of) for name, of in found.items()}
    each = []
    for asking, asked in full_data_models(task):
        scores = score_all_methods(asking, asked)
        everyone = {**scores, "labels": _labels(asked, truths)}
        told, chosen = _figures(task, asked, everyone, truths)
        drawn, _ = _figures(task, asked, everyone, _measured(task, there, rates))
        each.append((told, drawn, chosen, asked, scores))
    table = {
        name: _mean([told[name] for told, *_ in each])
        | {"drawn": _mean([drawn[name] for _, drawn, *_ in each])}
        for name in each[0][0]
    }
    report = split_concepts(data)["report"]
    table["ceiling"] = _ceilings(there, found, held_out, report)
    table["ceiling_drawn"] = _ceilings(there, rates, held_out, report)
    table |= {"subsets": len(truths["object"].kept), "models": len(each)}
    *_, chosen, asked, scores = each[0]
    if OURS in scores:
        table["agreement"] = _agreement(task, asked, scores[OURS])
    plots = _plots(task, chosen, {k: t.of(report[k]) for k, t in truths.items()})
    return write_table(task, "lds", table, _markdown(table), plots)


Figures = dict[str, dict[str, np.ndarray]]  # {kind: {figure: [C]}}


def _figures(
    task: AttributionTask,
    asked: ConceptQueries,
    everyone: Scores,
    truths: dict[str, lds.GroundTruth],
) -> tuple[dict[str, Figures], dict[str, dict[str, np.ndarray]]]:
    """({ranker: figures}, {ranker: {kind: scores [C, N]}}) of the "report" concepts on one model,
    each ranker at its damping for these truths.
    """
    grouped, told, chosen = split_concepts(task.train), {}, {}
    for name, values in everyone.items():
        d = damping_of(name, task, values, by_lds(asked, truths, grouped["tune"], values))
        named = grouped["report"]
        chosen[name] = {kind: asked.mean(values[[d]], kind, named[kind])[0] for kind in KINDS}
        told[name] = {
            kind: lds.lds_metrics(scores, truths[kind].of(named[kind]))
            for kind, scores in chosen[name].items()
        }
    return told, chosen


def _mean(of_models: list[Figures]) -> dict[str, Any]:
    """Of each concept over the models, then `lds.summary` over concepts: objects, and "style"."""
    objects, styles = (
        lds.summary({f: np.mean([of[kind][f] for of in of_models], 0) for f in lds.FIGURES})
        for kind in KINDS
    )
    return objects | {"style": styles}


def _plots(
    task: AttributionTask,
    chosen: dict[str, dict[str, np.ndarray]],
    truths: dict[str, lds.GroundTruth],
) -> dict[str, Figure]:
    """Of the scores {ranker: {kind: [C, N]}} of the concepts of `truths`."""
    bases = measured_subset(task, base_of(task), 1)
    held_out = task.everything.split("held_out")
    whole = load_measurements(bench_of(task), bases, held_out).values()
    curves: dict[str, dict[str, lds.Curve]] = {}
    for kind, truth in truths.items():
        unit = float(np.mean([p.of_concepts(kind, held_out, truth.names) for p in whole]))
        curves[kind] = {
            name: lds.presence_vs_removed(scores[kind], truth, TOP[kind], unit)
            for name, scores in chosen.items()
            if name in CURVES
        }
    points = {
        name: lds.predictions(scores["object"], truths["object"])
        for name, scores in chosen.items()
        if name in SCATTERED
    }
    drawn = {"removed": plots.presence_against_removed(curves)}
    return drawn | ({"predicted": plots.predicted_against_measured(points)} if points else {})


def _agreement(task: AttributionTask, asked: ConceptQueries, small: np.ndarray) -> dict[str, float]:
    """{kind: mean Spearman correlation of our scores on the small and on the embedded model}."""
    whole = make_queries(task, task.everything.split("held_out"))
    large = RANKERS.get(OURS)(task).rank(whole.questions)
    d = damping_of(OURS, task, large, lambda: 0)
    told = {}
    for kind in KINDS:
        names = split_concepts(task.train)["report"][kind]
        pairs = zip(
            asked.mean(small, kind, names)[d], whole.mean(large, kind, names)[d], strict=True
        )
        told[kind] = round(float(np.mean([spearmanr(a, b).statistic for a, b in pairs])), 4)
    return told


def truths_of(
    task: AttributionTask,
) -> tuple[RetrainingPlan, dict[str, ConceptMeasurements], dict[str, lds.GroundTruth]]:
    """(the part of the LDS plan that was measured, its presences, what they say of each kind)."""
    data, held_out = task.train, task.everything.split("held_out")
    there = measured_subset(task, kept_plan(KEPT / "plans", "lds", data), 3)
    found = load_measurements(bench_of(task), there, held_out)
    return there, found, _measured(task, there, found)


def _measured(
    task: AttributionTask, there: RetrainingPlan, found: Any
) -> dict[str, lds.GroundTruth]:
    """{kind: what these presences say}."""
    data, held_out = task.train, task.everything.split("held_out")
    return {kind: lds.measured(there, found, data, held_out, kind) for kind in KINDS}


def by_lds(
    asked: ConceptQueries,
    truths: dict[str, lds.GroundTruth],
    tune: dict[str, list[str]],
    values: np.ndarray,
) -> Callable[[], int]:
    """A choice for `damping_of`: `lds.best_damping`, when it is asked for."""
    return lambda: lds.best_damping(values, asked, truths, tune)


def _labels(asked: ConceptQueries, truths: dict[str, lds.GroundTruth]) -> np.ndarray:
    """[1, Q, N]: the labels as scores; what counting them predicts."""
    out = np.zeros((1, len(asked.questions), truths["object"].relevant.shape[1]))
    for kind, truth in truths.items():
        for name, relevant in zip(truth.names, truth.relevant, strict=True):
            out[0, asked.of[kind].get(name, [])] = relevant
    return out


def _ceilings(plan: RetrainingPlan, found: Any, held_out: Any, report: Any) -> dict[str, Any]:
    """{kind: mean correlation of two seeds}; None while fewer than three subsets have both."""
    told: dict[str, Any] = {}
    for kind in KINDS:
        try:
            values = lds.seed_agreement(plan, found, held_out, kind, report[kind])
            told[kind] = round(float(values.mean()), 4)
        except UserError:
            told[kind] = None
    return told


def _markdown(table: dict[str, Any]) -> str:
    """A table for what was measured, a row a ranker."""
    heads = [f"{kind} {figure}" for kind in KINDS for figure in ("LDS", *lds.FIGURES[1:])]
    lines = []
    for title, key in (("presence on held-out pictures", ""), ("what is drawn", "drawn")):
        lines += [f"\n**{title}**\n", f"| method | {' | '.join(heads)} |"]
        lines.append("|---" * (1 + len(heads)) + "|")
        for name, whole in table.items():
            if isinstance(whole, dict) and "lds" in whole:
                told = whole[key] if key else whole
                cells = [
                    format_interval(part[figure], part[lds.interval_of(figure)])
                    for part in (told, told["style"])
                    for figure in lds.FIGURES
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
