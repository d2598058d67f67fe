"""Hidden concepts: are pictures found whose caption leaves the concept out?"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from concept_trak.attribution.task import AttributionTask
from concept_trak.models.text_to_image import TextToImage

from .. import omitted_captions, wrong_captions
from ..queries import make_queries, task_of
from ..setup import (
    OF_MANY,
    SEEDS,
    bench_of,
    concatenate,
    damping_of,
    figures_markdown,
    keep_model,
    measured_subset,
    models_there,
    plan_of,
    score_all_methods,
    write_table,
)
from ..subsets import KINDS, Subset, hidden_plan, split_concepts
from ..train_many import load_measurements


def table(task: AttributionTask) -> dict[str, Any]:
    """{kind: {ranker: figures}, "taught"} over the "report" concepts and the seeds there are."""
    data, held_out = task.train, task.everything.split("held_out")
    plan = plan_of(task, "hidden", lambda: hidden_plan(data, SEEDS))
    there = measured_subset(task, plan, 2)
    presences = load_measurements(bench_of(task), there, held_out)
    each: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {kind: {} for kind in KINDS}
    effects: list[dict[str, Any]] = []
    pairs = [
        (learned, gone)
        for learned, gone in zip(plan.subsets[::2], plan.subsets[1::2], strict=True)
        if {learned.name, gone.name} <= presences.keys()
    ]
    for learned, gone in pairs:
        kind, both = (
            omitted_captions.kind_of(learned),
            (presences[learned.name], presences[gone.name]),
        )
        told = omitted_captions.presence_lost(kind, *both, data, held_out)
        effects.append({"kind": kind, "seed": learned.seed, **told})
        if task.settings.retrain and learned.seed == SEEDS[0]:
            keep_model(task, plan.name, learned)
    asked_of = replace(plan, subsets=tuple(learned for learned, _ in pairs))
    for learned, model in models_there(task, asked_of):
        for name, figures in _hidden_of(task, learned, model).items():
            each[omitted_captions.kind_of(learned)].setdefault(name, []).append(figures)
    found: dict[str, Any] = {
        kind: {name: wrong_captions.summary(concatenate(parts)) for name, parts in rankers.items()}
        for kind, rankers in each.items()
    }
    markdown = figures_markdown(found, omitted_captions.FIGURES)
    return write_table(task, "hidden", found | {"taught": effects}, markdown)


def _hidden_of(
    task: AttributionTask, subset: Subset, model: TextToImage
) -> dict[str, dict[str, np.ndarray]]:
    """{ranker: figures} of the "report" concepts on one model."""
    kind, data = omitted_captions.kind_of(subset), task.train
    asking = task_of(task, model, subset)
    asked = make_queries(asking, task.everything.split("held_out"))

    def at(group: str, values: np.ndarray) -> dict[str, np.ndarray]:
        names = split_concepts(data)[group][kind]
        return omitted_captions.figures(asked.mean(values, kind, names)[0], data, subset, names)

    found = {}
    for name, values in score_all_methods(asking, asked, OF_MANY).items():
        quality = [at("tune", values[[d]])["auc_hidden"].mean() for d in range(len(values))]
        d = damping_of(name, task, values, functools.partial(int, np.argmax(quality)))
        found[name] = at("report", values[[d]])
    return found
