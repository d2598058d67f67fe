"""Hidden concepts: are pictures found whose caption leaves the concept out?"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from concept_trak.attribution.corpus import Corpus
from concept_trak.models.text_to_image import TextToImage

from .. import omitted_captions, wrong_captions
from ..queries import ask, corpus_of
from ..setup import (
    OF_MANY,
    SEEDS,
    bench_of,
    damping_of,
    figures_markdown,
    joined,
    keep_model,
    measured_part,
    models_there,
    plan_of,
    rankings,
    written,
)
from ..subsets import KINDS, Subset, groups, hidden_plan
from ..train_many import presences_of


def table(corpus: Corpus) -> dict[str, Any]:
    """{kind: {ranker: figures}, "taught"} over the "report" concepts and the seeds there are."""
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan = plan_of(corpus, "hidden", lambda: hidden_plan(data, SEEDS))
    there = measured_part(corpus, plan, 2)
    presences = presences_of(bench_of(corpus), there, held_out)
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
        told = omitted_captions.taught(kind, *both, data, held_out)
        effects.append({"kind": kind, "seed": learned.seed, **told})
        if corpus.settings.retrain and learned.seed == SEEDS[0]:
            keep_model(corpus, plan.name, learned)
    asked_of = replace(plan, subsets=tuple(learned for learned, _ in pairs))
    for learned, model in models_there(corpus, asked_of):
        for name, figures in _hidden_of(corpus, learned, model).items():
            each[omitted_captions.kind_of(learned)].setdefault(name, []).append(figures)
    found: dict[str, Any] = {
        kind: {name: wrong_captions.summary(joined(parts)) for name, parts in rankers.items()}
        for kind, rankers in each.items()
    }
    markdown = figures_markdown(found, omitted_captions.FIGURES)
    return written(corpus, "hidden", found | {"taught": effects}, markdown)


def _hidden_of(
    corpus: Corpus, subset: Subset, model: TextToImage
) -> dict[str, dict[str, np.ndarray]]:
    """{ranker: figures} of the "report" concepts on one model."""
    kind, data = omitted_captions.kind_of(subset), corpus.train
    asking = corpus_of(corpus, model, subset)
    asked = ask(asking, corpus.everything.split("held_out"))

    def at(group: str, values: np.ndarray) -> dict[str, np.ndarray]:
        names = groups(data)[group][kind]
        return omitted_captions.figures(asked.mean(values, kind, names)[0], data, subset, names)

    found = {}
    for name, values in rankings(asking, asked, OF_MANY).items():
        quality = [at("tune", values[[d]])["auc_hidden"].mean() for d in range(len(values))]
        d = damping_of(name, corpus, values, functools.partial(int, np.argmax(quality)))
        found[name] = at("report", values[[d]])
    return found
