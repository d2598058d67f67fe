"""The tables of the bench of truth: every ranker on the small models, held against presences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...attribution.corpus import Corpus
from ...errors import UserError
from ...files import make_folder, write_bytes
from ...models.text_to_image import TextToImage
from ...registry import RANKERS
from ...settings import DAMPINGS, ROOT
from ..evaluate import chosen_rankers
from ..results import results, write_metrics
from . import lds, lies
from .asked import Asked, ask, corpus_of
from .fleet import Bench, presences_of, retrain
from .plan import KINDS, Plan, Subset, base_plan, groups, lds_plan, lies_plan, read_plan
from .small import load, save
from .trainer import trained

KEPT = ROOT / "experiments/truth"  # plans, presences and tables that are committed
MODELS = ROOT / "data/truth"  # small models that are committed
SEEDS = (0, 1, 2)
LDS_SUBSETS, LDS_AGAIN = 48, 16
FIXED = "concept_trak"  # has one damping for all tests, that of the settings

Scores = dict[str, np.ndarray]  # ranker -> [D, Q, N]


def bench_of(corpus: Corpus) -> Bench:
    """Where the models of this corpus are trained and measured."""
    s = corpus.settings
    return Bench(s.sd_model_path, s.data_dir, Path(s.truth_dir), KEPT / "presences")


def plan_of(corpus: Corpus, name: str, make: Callable[[], Plan]) -> Plan:
    """The committed plan; with RETRAIN=1 it is made anew, and what has no presences is trained."""
    path = KEPT / "plans" / f"{name}.json"
    if not corpus.settings.retrain:
        return read_plan(path, corpus.train)
    plan = make()
    plan.write(path)
    retrain(bench_of(corpus), plan)
    return plan


def model_of(corpus: Corpus, subset: Subset) -> TextToImage:
    """The small model of a subset: the committed one, else the one trained in TRUTH_DIR.

    UserError when there is none.
    """
    path = MODELS / f"{subset.name}.safetensors"
    if path.exists():
        return load(corpus.model, path)
    bench = bench_of(corpus)
    return trained(corpus.model, corpus.train, subset, bench.settings, bench.work)


def keep_model(corpus: Corpus, subset: Subset) -> Path:
    """Write a model of TRUTH_DIR where it is committed."""
    bench = bench_of(corpus)
    model = trained(corpus.model, corpus.train, subset, bench.settings, bench.work)
    path = MODELS / f"{subset.name}.safetensors"
    make_folder(path.parent)
    save(model, path, bench.settings)
    return path


def rankings(corpus: Corpus, asked: Asked) -> Scores:
    """Every ranker of METHODS, and the controls, on one model; empty METHODS is all there are."""
    named = corpus.settings.methods or ",".join(RANKERS.names())
    return {name: RANKERS.get(name)(corpus).rank(asked.questions) for name in chosen_rankers(named)}


def _damping(name: str, corpus: Corpus, values: np.ndarray, choose: Callable[[], int]) -> int:
    """Index of a ranker's damping: the settings' for ours, for the others the best on "tune"."""
    if len(values) < len(DAMPINGS):
        return 0
    fixed = corpus.settings.damping
    return int(np.argmin(np.abs(np.log(np.array(DAMPINGS) / fixed)))) if name == FIXED else choose()


# ---- lies


def lies_table(corpus: Corpus) -> dict[str, Any]:
    """{"trained", "untrained": {kind: {ranker: figures}}, "harm"} over the "report" concepts and
    the seeds whose models are there.
    """
    plan = plan_of(corpus, "lies", lambda: lies_plan(corpus.train, SEEDS))
    told = [s for s in plan.subsets if s.captions]
    base = base_plan(corpus.train, SEEDS).subsets
    found: dict[str, Any] = {}
    for state, of in (("untrained", base), ("trained", told)):
        each: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {kind: {} for kind in KINDS}
        for subset, model in _there(corpus, list(of)):
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
    return _written(corpus, "lies", found, _lies_markdown(found))


def _there(corpus: Corpus, subsets: list[Subset]) -> list[tuple[Subset, TextToImage]]:
    """The subsets whose models can be had; UserError if not even the first can."""
    found = []
    for subset in subsets:
        try:
            found.append((subset, model_of(corpus, subset)))
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

    d = _damping(name, corpus, values, lambda: int(np.argmax([quality(d) for d in range(9)])))
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
    lines = []
    for state in ("trained", "untrained"):
        for kind in KINDS:
            lines += [f"\n**{state}, {kind}**\n", f"| method | {' | '.join(lies.FIGURES)} |"]
            lines.append("|---" * (1 + len(lies.FIGURES)) + "|")
            for name, told in found[state][kind].items():
                cells = (_cell(told[f], told[f"{f}_ci95"]) for f in lies.FIGURES)
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float, interval: list[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


# ---- LDS


def lds_table(corpus: Corpus) -> dict[str, Any]:
    """{ranker: {"lds", "partial", intervals, "style": {...}}, "ceiling"}: objects at the top; over
    the "report" concepts, scores on the model of all pictures.
    """
    data, held_out = corpus.train, corpus.everything.split("held_out")
    plan = plan_of(corpus, "lds", lambda: lds_plan(data, LDS_SUBSETS, LDS_AGAIN))
    there = _measured_part(corpus, plan)
    found = presences_of(bench_of(corpus), there, held_out)
    truths = {kind: lds.measured(there, found, data, held_out, kind) for kind in KINDS}
    subset = base_plan(data, SEEDS).subsets[0]
    asking = corpus_of(corpus, model_of(corpus, subset), subset)
    asked, grouped = ask(asking, held_out), groups(data)
    table: dict[str, Any] = {}
    for name, values in {**rankings(asking, asked), "labels": _labels(asked, truths)}.items():
        tuned = functools.partial(lds.best_damping, values, asked, truths, grouped["tune"])
        d = _damping(name, corpus, values, tuned)
        told = {}
        for kind in KINDS:
            names = grouped["report"][kind]
            scores = asked.mean(values[d : d + 1], kind, names)[0]
            told[kind] = lds.summary(lds.scored(scores, truths[kind].of(names)))
        table[name] = {**told["object"], "style": told["style"]}
    table["ceiling"] = _ceilings(there, found, held_out, grouped["report"])
    table["subsets"] = len(truths["object"].kept)
    return _written(corpus, "lds", table, _lds_markdown(table))


def _measured_part(corpus: Corpus, plan: Plan) -> Plan:
    """The plan's subsets that have presences, in its order. UserError for fewer than three."""
    bench = bench_of(corpus)
    subsets = tuple(s for s in plan.subsets if bench.presences(plan.name, s).exists())
    if len(subsets) < 3:
        remedy = "train them with RETRAIN=1 (some six minutes each on one core)"
        raise UserError(f"{len(subsets)} of {len(plan.subsets)} subsets have presences; {remedy}")
    return Plan(plan.name, plan.data, subsets, plan.made_from)


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
                _cell(part[figure], part[interval])
                for part in (told, told["style"])
                for figure, interval in (("lds", "ci95"), ("partial", "partial_ci95"))
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(corpus: Corpus, test: str, found: dict[str, Any], markdown: str) -> dict[str, Any]:
    """Print the table, keep it below TRUTH_DIR/tables, and return what was found."""
    print(markdown)
    with results(corpus.settings, "tables", test, [test, corpus.train_identity()]) as folder:
        write_metrics(folder, "metrics", found, corpus.settings)
        write_bytes(folder / "table.md", f"{markdown}\n".encode())
    return found
