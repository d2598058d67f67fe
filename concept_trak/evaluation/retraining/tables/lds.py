"""LDS: do summed scores predict what a model knows that learned a part of the pictures?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from ....attribution.corpus import Corpus
from ....errors import UserError
from ....registry import RANKERS
from .. import lds, plots
from ..asked import Asked, ask
from ..counterfactual import TOP
from ..fleet import presences_of
from ..plan import KINDS, Plan, groups, lds_plan, read_plan
from ..presence import Presences
from ..shared import (
    FIXED,
    KEPT,
    base_of,
    bench_of,
    cell,
    damping_of,
    measured_part,
    of_all_pictures,
    plan_of,
    rankings,
    written,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUBSETS, AGAIN = 32, 8
SCATTERED = ("concept_trak", "das", "labels")  # whose predictions are drawn point by point
CURVES = (*SCATTERED, "reference", "d_trak", "latent_neighbours")  # more would hide one another


def table(corpus: Corpus) -> dict[str, Any]:
    """{ranker: {"lds", "partial", intervals, "style": {...}}, "ceiling", "agreement", "subsets"}:
    objects at the top; over the "report" concepts, scores on the small model of all pictures.
    """
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan_of(corpus, "lds", lambda: lds_plan(data, SUBSETS, AGAIN))
    there, found, truths = truths_of(corpus)
    asking, asked = of_all_pictures(corpus)
    grouped, table, chosen = groups(data), {}, {}
    scored = rankings(asking, asked)
    for name, values in {**scored, "labels": _labels(asked, truths)}.items():
        d = damping_of(name, corpus, values, by_lds(asked, truths, grouped["tune"], values))
        chosen[name] = {
            kind: asked.mean(values[[d]], kind, grouped["report"][kind])[0] for kind in KINDS
        }
        told = {
            kind: lds.summary(lds.scored(scores, truths[kind].of(grouped["report"][kind])))
            for kind, scores in chosen[name].items()
        }
        table[name] = {**told["object"], "style": told["style"]}
    table["ceiling"] = _ceilings(there, found, held_out, grouped["report"])
    table["subsets"] = len(truths["object"].kept)
    if FIXED in scored:
        table["agreement"] = _agreement(corpus, asked, scored[FIXED])
    drawn = _plots(corpus, chosen, {k: t.of(grouped["report"][k]) for k, t in truths.items()})
    return written(corpus, "lds", table, _markdown(table), drawn)


def _plots(
    corpus: Corpus, chosen: dict[str, dict[str, np.ndarray]], truths: dict[str, lds.Measured]
) -> dict[str, Figure]:
    """Of the scores {ranker: {kind: [C, N]}} of the concepts of `truths`."""
    bases = measured_part(corpus, base_of(corpus), 1)
    held_out = corpus.everything.split("held_out")
    whole = presences_of(bench_of(corpus), bases, held_out).values()
    curves: dict[str, dict[str, lds.Curve]] = {}
    for kind, truth in truths.items():
        unit = float(np.mean([p.of_concepts(kind, held_out, truth.names) for p in whole]))
        curves[kind] = {
            name: lds.against_removed(scores[kind], truth, TOP[kind], unit)
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


def _agreement(corpus: Corpus, asked: Asked, small: np.ndarray) -> dict[str, float]:
    """{kind: mean Spearman correlation of our scores on the small and on the embedded model}."""
    whole = ask(corpus, corpus.everything.split("held_out"))
    large = RANKERS.get(FIXED)(corpus).rank(whole.questions)
    d = damping_of(FIXED, corpus, large, lambda: 0)
    told = {}
    for kind in KINDS:
        names = groups(corpus.train)["report"][kind]
        pairs = zip(
            asked.mean(small, kind, names)[d], whole.mean(large, kind, names)[d], strict=True
        )
        told[kind] = round(float(np.mean([spearmanr(a, b).statistic for a, b in pairs])), 4)
    return told


def truths_of(corpus: Corpus) -> tuple[Plan, dict[str, Presences], dict[str, lds.Measured]]:
    """(the part of the LDS plan that was measured, its presences, what they say of each kind)."""
    data, held_out = corpus.train, corpus.everything.split("held_out")
    there = measured_part(corpus, read_plan(KEPT / "plans/lds.json", data), 3)
    found = presences_of(bench_of(corpus), there, held_out)
    return there, found, {k: lds.measured(there, found, data, held_out, k) for k in KINDS}


def by_lds(
    asked: Asked, truths: dict[str, lds.Measured], tune: dict[str, list[str]], values: np.ndarray
) -> Callable[[], int]:
    """A choice for `damping_of`: `lds.best_damping`, when it is asked for."""
    return lambda: lds.best_damping(values, asked, truths, tune)


def _labels(asked: Asked, truths: dict[str, lds.Measured]) -> np.ndarray:
    """[1, Q, N]: the labels as scores; what counting them predicts."""
    out = np.zeros((1, len(asked.questions), truths["object"].relevant.shape[1]))
    for kind, truth in truths.items():
        for name, relevant in zip(truth.names, truth.relevant, strict=True):
            out[0, asked.of[kind].get(name, [])] = relevant
    return out


def _ceilings(plan: Plan, found: Any, held_out: Any, report: Any) -> dict[str, Any]:
    """{kind: mean correlation of two seeds}; None while fewer than three subsets have both."""
    told: dict[str, Any] = {}
    for kind in KINDS:
        try:
            values = lds.ceiling(plan, found, held_out, kind, report[kind])
            told[kind] = round(float(values.mean()), 4)
        except UserError:
            told[kind] = None
    return told


def _markdown(table: dict[str, Any]) -> str:
    lines = [
        "| method | object LDS | object partial | style LDS | style partial |",
        "|---" * 5 + "|",
    ]
    for name, told in table.items():
        if isinstance(told, dict) and "lds" in told:
            cells = [
                cell(part[figure], part[interval])
                for part in (told, told["style"])
                for figure, interval in (("lds", "ci95"), ("partial", "partial_ci95"))
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
