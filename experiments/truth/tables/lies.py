"""Lies: does a ranking believe wrong captions? On models that learned them, and on one that did
not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from concept_trak.attribution.ekfac import batches
from concept_trak.attribution.task import AttributionTask
from concept_trak.gradients.caption_fit import caption_llr, fit_weight

from .. import wrong_captions
from ..queries import ConceptQueries, make_queries, task_of
from ..setup import (
    OF_MANY,
    OURS,
    SEEDS,
    base_of,
    bench_of,
    concatenate,
    damping_of,
    figures_markdown,
    keep_model,
    model_of,
    models_there,
    plan_of,
    score_all_methods,
    write_table,
)
from ..subsets import KINDS, RetrainingPlan, Subset, lies_plan, split_concepts
from ..train_many import load_measurements

UNWEIGHTED = "contrast"  # ours without its weight
OUTSIDE = "outside_fit"


def table(task: AttributionTask) -> dict[str, Any]:
    """{"trained", "untrained": {kind: {ranker: figures}}, "harm"} over the "report" concepts and
    the seeds whose models are there.

    `outside_fit`, where `contrast` is compared, is ours with another judge of how well captions
    fit: the model that has not learned the lies. What is then still fooled is not the judge.
    """
    plan = plan_of(task, "lies", lambda: lies_plan(task.train, SEEDS))
    told = [s for s in plan.subsets if s.captions]
    base, found = base_of(task), {}
    if task.settings.retrain:
        keep_model(task, base.name, base.subsets[0])
        keep_model(task, plan.name, told[0])
    for state, of in (("untrained", base), ("trained", replace(plan, subsets=tuple(told)))):
        each: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {kind: {} for kind in KINDS}
        for subset, model in models_there(task, of):
            lying = told[[s.seed for s in told].index(subset.seed)]
            asking = task_of(task, model, lying)
            asked = make_queries(asking, task.everything.split("held_out"))
            scored = score_all_methods(asking, asked, OF_MANY)
            if state == "trained" and UNWEIGHTED in scored:
                judge = model_of(task, base.name, base.subsets[0])
                fit = _fit_of(task_of(task, judge, lying))
                scored[OUTSIDE] = scored[UNWEIGHTED] * fit
            for name, values in scored.items():
                of = OURS if name == OUTSIDE else name
                for kind, figures in _lies_of(asking, lying, asked, of, values).items():
                    each[kind].setdefault(name, []).append(figures)
        found[state] = {
            kind: {
                name: wrong_captions.summary(concatenate(parts)) for name, parts in rankers.items()
            }
            for kind, rankers in each.items()
        }
    found["harm"] = _harm(task, plan)
    return write_table(task, "lies", found, _lies_markdown(found))


def llr_of(task: AttributionTask, rows: range) -> np.ndarray:
    """`caption_llr` of consecutive train pictures under their captions."""
    x0, cond = task.data.batch(rows)
    return caption_llr(task.model, x0, cond, task.cond_null).float().cpu().numpy()


def _fit_of(task: AttributionTask) -> np.ndarray:
    """[N]: `fit_weight` of all of them."""
    parts = batches(len(task.train), task.settings.batch_size)
    llr = np.concatenate([llr_of(task, rows) for rows in parts])
    return fit_weight(llr, llr)


def _lies_of(
    task: AttributionTask, subset: Subset, asked: ConceptQueries, name: str, values: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """{kind: figures} of the claimed "report" concepts; values [D, Q, N]."""
    data = task.train

    def at(group: str, kind: str, d: int) -> dict[str, np.ndarray]:
        names = wrong_captions.claimed(data, subset, kind, split_concepts(data)[group][kind])
        scores = asked.mean(values[d : d + 1], kind, names)[0]
        return wrong_captions.figures(scores, data, subset, kind, names)

    def quality(d: int) -> float:
        tuned = [at("tune", kind, d) for kind in KINDS]
        wanted = ("auc", "auc_unrelated", "recall_at_10")
        return float(np.mean([t[figure].mean() for t in tuned for figure in wanted]))

    d = damping_of(
        name, task, values, lambda: int(np.argmax([quality(d) for d in range(len(values))]))
    )
    return {kind: at("report", kind, d) for kind in KINDS}


def _harm(task: AttributionTask, plan: RetrainingPlan) -> list[dict[str, Any]]:
    """What retraining says of the lies of each seed that was trained with and without them."""
    data, held_out, bench = task.train, task.everything.split("held_out"), bench_of(task)
    told = []
    for with_lies, without in zip(plan.subsets[::2], plan.subsets[1::2], strict=True):
        both = RetrainingPlan(plan.name, plan.data, (with_lies, without))
        if all(bench.presences(plan.name, s).exists() for s in both.subsets):
            found = load_measurements(bench, both, held_out)
            of = found[with_lies.name], found[without.name]
            told.append(
                wrong_captions.effect_on_claimed(*of, held_out, data, with_lies)
                | {"seed": with_lies.seed}
            )
    return told


def _lies_markdown(found: dict[str, Any]) -> str:
    states = ("trained", "untrained")
    tables = {f"{state}, {kind}": found[state][kind] for state in states for kind in KINDS}
    return figures_markdown(tables, wrong_captions.FIGURES)
