"""What every test of the bench of truth shares: where plans, models and presences are, every
ranker's scores on a small model, and how a table is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from .asked import Asked, ask, corpus_of
from .fleet import Bench, retrain
from .plan import Plan, Subset, base_plan, read_plan
from .small import load, save
from .trainer import trained

KEPT = ROOT / "experiments/truth"  # plans, presences and tables that are committed
MODELS = ROOT / "data/truth"  # small models that are committed
SEEDS = (0, 1, 2)
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


def damping_of(name: str, corpus: Corpus, values: np.ndarray, choose: Callable[[], int]) -> int:
    """Index of a ranker's damping: the settings' for ours, for the others the best on "tune"."""
    if len(values) < len(DAMPINGS):
        return 0
    fixed = corpus.settings.damping
    return int(np.argmin(np.abs(np.log(np.array(DAMPINGS) / fixed)))) if name == FIXED else choose()


def of_all_pictures(corpus: Corpus) -> tuple[Corpus, Asked]:
    """The small model that learned all pictures, and the questions it is asked."""
    subset = base_plan(corpus.train, SEEDS).subsets[0]
    asking = corpus_of(corpus, model_of(corpus, subset), subset)
    return asking, ask(asking, corpus.everything.split("held_out"))


def measured_part(corpus: Corpus, plan: Plan, least: int) -> Plan:
    """The plan's subsets that have presences, in its order. UserError for fewer than `least`."""
    bench = bench_of(corpus)
    subsets = tuple(s for s in plan.subsets if bench.presences(plan.name, s).exists())
    if len(subsets) < least:
        of = f"{len(subsets)} of {len(plan.subsets)} models of the plan {plan.name}"
        remedy = "train them with RETRAIN=1 (some six minutes each on one core)"
        raise UserError(f"{of} have presences; {remedy}")
    return replace(plan, subsets=subsets)


def cell(value: float, interval: list[float]) -> str:
    """A figure with its interval."""
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def written(corpus: Corpus, test: str, found: dict[str, Any], markdown: str) -> dict[str, Any]:
    """Print the table, keep it below TRUTH_DIR/tables, and return what was found."""
    print(markdown)
    with results(corpus.settings, "tables", test, [test, corpus.train_identity()]) as folder:
        write_metrics(folder, "metrics", found, corpus.settings)
        write_bytes(folder / "table.md", f"{markdown}\n".encode())
    return found
