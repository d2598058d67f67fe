"""The tables of the bench of truth: every ranker on the small models, held against presences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ...attribution.corpus import Corpus
from ...errors import UserError
from ...models.text_to_image import TextToImage
from ...registry import RANKERS
from . import counterfactual, hidden, lds, lies
from .asked import Asked, ask, corpus_of
from .fleet import presences_of
from .plan import (
    KINDS,
    Plan,
    Subset,
    counterfactual_plan,
    groups,
    hidden_plan,
    lds_plan,
    lies_plan,
    read_plan,
)
from .presence import Presences
from .shared import (
    FIXED,
    KEPT,
    SEEDS,
    base_of,
    bench_of,
    cell,
    damping_of,
    keep_model,
    measured_part,
    model_of,
    of_all_pictures,
    plan_of,
    rankings,
    written,
)

LDS_SUBSETS, LDS_AGAIN = 48, 16


# ---- lies


def lies_table(corpus: Corpus) -> dict[str, Any]:
    """{"trained", "untrained": {kind: {ranker: figures}}, "harm"} over the "report" concepts and
    the seeds whose models are there.
    """
    plan = plan_of(corpus, "lies", lambda: lies_plan(corpus.train, SEEDS))
    told = [s for s in plan.subsets if s.captions]
    base, found = base_of(corpus), {}
    if corpus.settings.retrain:
        keep_model(corpus, base.subsets[0])
        keep_model(corpus, told[0])
    for state, of in (("untrained", base), ("trained", replace(plan, subsets=tuple(told)))):
        each: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {kind: {} for kind in KINDS}
        for subset, model in _there(corpus, of):
            lying = told[[s.seed for s in told].index(subset.seed)]
            asking = corpus_of(corpus, model, lying)
            asked = ask(asking, corpus.everything.split("held_out"))
            for name, values in rankings(asking, asked).items():
                for kind, figures in _lies_of(asking, lying, asked, name, values).items():
                    each[kind].setdefault(name, []).append(figures)
        found[state] = {
            kind: {name: lies.summary(_joined(parts)) for name, parts in rankers.items()}
            for kind, rankers in each.items()
        }
    found["harm"] = _harm(corpus, plan)
    return written(corpus, "lies", found, _lies_markdown(found))


def _there(corpus: Corpus, plan: Plan) -> list[tuple[Subset, TextToImage]]:
    """The subsets whose models can be had; UserError if not even the first can."""
    found: list[tuple[Subset, TextToImage]] = []
    for subset in plan.subsets:
        try:
            found.append((subset, model_of(corpus, plan.name, subset)))
        except UserError:
            if not found:
                raise
    return found


def _lies_of(
    corpus: Corpus, subset: Subset, asked: Asked, name: str, values: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """{kind: figures} of the claimed "report" concepts; values [D, Q, N]."""
    data = corpus.train

    def at(group: str, kind: str, d: int) -> dict[str, np.ndarray]:
        names = lies.claimed(data, subset, kind, groups(data)[group][kind])
        scores = asked.mean(values[d : d + 1], kind, names)[0]
        return lies.figures(scores, data, subset, kind, names)

    def quality(d: int) -> float:
        tuned = [at("tune", kind, d) for kind in KINDS]
        wanted = ("auc", "auc_unrelated", "recall_at_10")
        return float(np.mean([t[figure].mean() for t in tuned for figure in wanted]))

    d = damping_of(
        name, corpus, values, lambda: int(np.argmax([quality(d) for d in range(len(values))]))
    )
    return {kind: at("report", kind, d) for kind in KINDS}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {figure: np.concatenate([part[figure] for part in parts]) for figure in parts[0]}


def _harm(corpus: Corpus, plan: Plan) -> list[dict[str, Any]]:
    """What retraining says of the lies of each seed that was trained with and without them."""
    data, held_out, bench = corpus.train, corpus.everything.split("held_out"), bench_of(corpus)
    told = []
    for with_lies, without in zip(plan.subsets[::2], plan.subsets[1::2], strict=True):
        both = Plan(plan.name, plan.data, (with_lies, without))
        if all(bench.presences(plan.name, s).exists() for s in both.subsets):
            found = presences_of(bench, both, held_out)
            of = found[with_lies.name], found[without.name]
            told.append(lies.harm(*of, held_out, data, with_lies) | {"seed": with_lies.seed})
    return told


def _lies_markdown(found: dict[str, Any]) -> str:
    states = ("trained", "untrained")
    tables = {f"{state}, {kind}": found[state][kind] for state in states for kind in KINDS}
    return _figures_markdown(tables, lies.FIGURES)


def _figures_markdown(tables: dict[str, Any], figures: tuple[str, ...]) -> str:
    """A table for each heading, a row a ranker."""
    lines = []
    for heading, table in tables.items():
        lines += [f"\n**{heading}**\n", f"| method | {' | '.join(figures)} |"]
        lines.append("|---" * (1 + len(figures)) + "|")
        for name, told in table.items():
            cells = (cell(told[f], told[f"{f}_ci95"]) for f in figures)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- hidden


def hidden_table(corpus: Corpus) -> dict[str, Any]:
    """{kind: {ranker: figures}, "taught"} over the "report" concepts and the seeds there are."""
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan = plan_of(corpus, "hidden", lambda: hidden_plan(data, SEEDS))
    there = measured_part(corpus, plan, 2)
    presences = presences_of(bench_of(corpus), there, held_out)
    each: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {kind: {} for kind in KINDS}
    effects: list[dict[str, Any]] = []
    for learned, gone in zip(plan.subsets[::2], plan.subsets[1::2], strict=True):
        if {learned.name, gone.name} <= presences.keys():
            kind = hidden.kind_of(learned)
            both = presences[learned.name], presences[gone.name]
            told = hidden.taught(kind, *both, data, held_out)
            effects.append({"kind": kind, "seed": learned.seed, **told})
            for name, figures in _hidden_of(corpus, learned).items():
                each[kind].setdefault(name, []).append(figures)
    found: dict[str, Any] = {
        kind: {name: lies.summary(_joined(parts)) for name, parts in rankers.items()}
        for kind, rankers in each.items()
    }
    markdown = _figures_markdown(found, hidden.FIGURES)
    return written(corpus, "hidden", found | {"taught": effects}, markdown)


def _hidden_of(corpus: Corpus, subset: Subset) -> dict[str, dict[str, np.ndarray]]:
    """{ranker: figures} of the "report" concepts on one model."""
    kind, data = hidden.kind_of(subset), corpus.train
    asking = corpus_of(corpus, model_of(corpus, "hidden", subset), subset)
    asked = ask(asking, corpus.everything.split("held_out"))

    def at(group: str, values: np.ndarray) -> dict[str, np.ndarray]:
        names = groups(data)[group][kind]
        return hidden.figures(asked.mean(values, kind, names)[0], data, subset, names)

    found = {}
    for name, values in rankings(asking, asked).items():
        quality = [at("tune", values[[d]])["auc_hidden"].mean() for d in range(len(values))]
        d = damping_of(name, corpus, values, functools.partial(int, np.argmax(quality)))
        found[name] = at("report", values[[d]])
    return found


# ---- LDS


def lds_table(corpus: Corpus) -> dict[str, Any]:
    """{ranker: {"lds", "partial", intervals, "style": {...}}, "ceiling", "agreement", "subsets"}:
    objects at the top; over the "report" concepts, scores on the small model of all pictures.
    """
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan_of(corpus, "lds", lambda: lds_plan(data, LDS_SUBSETS, LDS_AGAIN))
    there, found, truths = _truths(corpus)
    asking, asked = of_all_pictures(corpus)
    grouped, table = groups(data), {}
    scored = rankings(asking, asked)
    for name, values in {**scored, "labels": _labels(asked, truths)}.items():
        d = damping_of(name, corpus, values, _by_lds(asked, truths, grouped["tune"], values))
        told = {}
        for kind in KINDS:
            names = grouped["report"][kind]
            scores = asked.mean(values[d : d + 1], kind, names)[0]
            told[kind] = lds.summary(lds.scored(scores, truths[kind].of(names)))
        table[name] = {**told["object"], "style": told["style"]}
    table["ceiling"] = _ceilings(there, found, held_out, grouped["report"])
    table["subsets"] = len(truths["object"].kept)
    if FIXED in scored:
        table["agreement"] = _agreement(corpus, asked, scored[FIXED])
    return written(corpus, "lds", table, _lds_markdown(table))


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


def _truths(corpus: Corpus) -> tuple[Plan, dict[str, Presences], dict[str, lds.Measured]]:
    """(the part of the LDS plan that was measured, its presences, what they say of each kind)."""
    data, held_out = corpus.train, corpus.everything.split("held_out")
    there = measured_part(corpus, read_plan(KEPT / "plans/lds.json", data), 3)
    found = presences_of(bench_of(corpus), there, held_out)
    return there, found, {k: lds.measured(there, found, data, held_out, k) for k in KINDS}


def _by_lds(
    asked: Asked, truths: dict[str, lds.Measured], tune: dict[str, list[str]], values: np.ndarray
) -> Callable[[], int]:
    """`lds.best_damping`, when it is asked for."""
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


def _lds_markdown(table: dict[str, Any]) -> str:
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


# ---- counterfactual


def counterfactual_table(corpus: Corpus) -> dict[str, Any]:
    """{kind: {arm: drops}, "noise", "targets"}.

    The plan is the committed one; with RETRAIN=1 one that is not there is made from today's scores.
    """
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan = plan_of(corpus, "counterfactual", lambda: planned_counterfactual(corpus))
    bench = bench_of(corpus)
    bases = measured_part(corpus, base_of(corpus), 1)
    found = presences_of(bench, bases, held_out)
    whole = {s.seed: found[s.name] for s in bases.subsets}
    there = measured_part(corpus, plan, 1)
    there = replace(there, subsets=tuple(s for s in there.subsets if s.seed in whole))
    arms = presences_of(bench, there, held_out)
    told: dict[str, Any] = counterfactual.drops(there, arms, whole, data, held_out)
    markdown = _counterfactual_markdown(told)
    told["noise"] = counterfactual.noise(whole, data, held_out)
    told["targets"] = {kind: counterfactual.targets(data, kind) for kind in KINDS}
    return written(corpus, "counterfactual", told, markdown)


def planned_counterfactual(corpus: Corpus) -> Plan:
    """What every ranker of METHODS names on the model of all pictures."""
    data = corpus.train
    asking, asked = of_all_pictures(corpus)
    *_, truths = _truths(corpus)
    values, tune = rankings(asking, asked), groups(data)["tune"]
    chosen = {
        name: damping_of(name, corpus, of, _by_lds(asked, truths, tune, of))
        for name, of in values.items()
    }
    arms: dict[str, list[int]] = {}
    for kind in KINDS:
        names = counterfactual.targets(data, kind)
        scores = {n: asked.mean(of[[chosen[n]]], kind, names)[0] for n, of in values.items()}
        arms |= counterfactual.arms(data, kind, scores, FIXED)
    return counterfactual_plan(data, arms, SEEDS)


def _counterfactual_markdown(found: dict[str, Any]) -> str:
    figures = ("target_drop", "untouched_drop", "other_drop", "judge_drop")
    lines = []
    for kind in KINDS:
        lines += [f"\n**{kind}**\n", f"| removed | pictures | seeds | {' | '.join(figures)} |"]
        lines.append("|---" * (3 + len(figures)) + "|")
        for arm, told in found[kind].items():
            cells = [cell(told[f], told[f"{f}_ci95"]) if f in told else "" for f in figures]
            start = f"| {arm} | {told['removed']} | {told['seeds']} |"
            lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)
