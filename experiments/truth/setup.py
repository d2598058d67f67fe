"""What every test of the bench of truth shares: where plans, models and presences are, every
ranker's scores on a small model, and how a table is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concept_trak.atomic_io import make_folder, write_bytes
from concept_trak.attribution.methods import swept
from concept_trak.attribution.task import AttributionTask
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import TextToImage
from concept_trak.registry import RANKERS
from concept_trak.settings import DAMPINGS, ROOT
from experiments.benchmark.evaluate import chosen_rankers
from experiments.benchmark.plots import png
from experiments.benchmark.results import result_folder, write_metrics

from .concept_likelihood import weights_of
from .queries import ConceptQueries, make_queries, task_of
from .small_model import load, save
from .subsets import (
    RetrainingPlan,
    Subset,
    base_plan,
    kept_plan,
    read_plan,
    restore_hint,
    retrain_line,
    with_arms,
)
from .train import trained
from .train_many import RetrainingSetup, refuse_other_subset, retrain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = ROOT / "experiments/truth"  # plans, presences and tables that are committed
MODELS = ROOT / "data/truth"  # small models that are committed
SEEDS = (0, 1, 2)
# what METHODS compares where it is empty: minutes; every other ranker joins by its name. Rows of
# recipe reference take as long as all others: where several models are asked, on request only
OF_MANY = ("concept_trak", "contrast", "dps", "trak", "d_trak", "das")
COMPARED = ("concept_trak", "reference", *OF_MANY[1:])
OURS = "concept_trak"  # has one damping for all tests, that of the settings

Scores = dict[str, np.ndarray]  # ranker -> [D, Q, N]


def bench_of(task: AttributionTask) -> RetrainingSetup:
    """Where the models of this task are trained and measured."""
    s = task.settings
    return RetrainingSetup(s.sd_model_path, s.data_dir, Path(s.truth_dir), KEPT / "presences")


def plan_of(
    task: AttributionTask, name: str, make: Callable[[], RetrainingPlan], arms: Sequence[str] = ()
) -> RetrainingPlan:
    """The committed plan. With RETRAIN=1 it is made where there is none, gets the `arms` that it
    lacks, and its subsets without presences are trained.
    """
    folder = KEPT / "plans"
    if task.settings.retrain:
        keep_plan(folder / f"{name}.json", task.train, make, arms)
        retrain(bench_of(task), kept_plan(folder, name, task.train))
    return kept_plan(folder, name, task.train)


def keep_plan(
    path: Path, data: ImageCaptionDataset, make: Callable[[], RetrainingPlan], arms: Sequence[str]
) -> None:
    """Write the plan where there is none, or it has an arm too few; see `with_arms`."""
    there = read_plan(path, data) if path.exists() else None
    plan = with_arms(there or make(), arms, make)
    if plan != there:
        make_folder(path.parent)
        plan.write(path)


def base_of(task: AttributionTask) -> RetrainingPlan:
    """The plan of all pictures; see `plan_of`."""
    return plan_of(task, "base", lambda: base_plan(task.train, SEEDS))


def model_of(task: AttributionTask, plan: str, subset: Subset) -> TextToImage:
    """The small model of a plan's subset: the committed one, else the one trained in TRUTH_DIR.

    UserError when there is none, or it is not the one whose presences are known.
    """
    bench, path = bench_of(task), MODELS / f"{subset.name}.safetensors"
    if path.exists():
        model = load(task.model, path)
    else:
        line = retrain_line(plan, bench.work)
        model = trained(task.model, task.train, subset, bench.settings, bench.work, line)
    refuse_unmeasured(bench, plan, subset, model)
    return model


def refuse_unmeasured(
    bench: RetrainingSetup, plan: str, subset: Subset, model: TextToImage
) -> None:
    """UserError where presences are known, and are of another model, or of another subset or seed
    than the plan's.
    """
    measured = bench.presences(plan, subset)
    if measured.exists() and weights_of(measured) != model.weight_hash():
        raise UserError(
            f"{measured} was measured on another model of {subset.name}; {restore_hint(measured)}"
        )
    if measured.exists():
        refuse_other_subset(bench, plan, subset)


def models_there(
    task: AttributionTask, plan: RetrainingPlan
) -> Iterator[tuple[Subset, TextToImage]]:
    """The subsets whose models can be had, one at a time; UserError if not even the first can."""
    for place, subset in enumerate(plan.subsets):
        try:
            model = model_of(task, plan.name, subset)
        except UserError:
            if place == 0:
                raise
            continue
        yield subset, model


def keep_model(task: AttributionTask, plan: str, subset: Subset) -> None:
    """Write a plan's model of TRUTH_DIR where it is committed, unless one is there."""
    bench, path = bench_of(task), MODELS / f"{subset.name}.safetensors"
    if not path.exists():
        line = retrain_line(plan, bench.work)
        model = trained(task.model, task.train, subset, bench.settings, bench.work, line)
        make_folder(path.parent)
        save(model, path, bench.settings)


def score_all_methods(
    task: AttributionTask, asked: ConceptQueries, compared: Sequence[str] = COMPARED
) -> Scores:
    """Every ranker of METHODS, and the controls, on one model; empty METHODS is `compared`."""
    named = task.settings.methods or ",".join(compared)
    chosen = {name: RANKERS.get(name)(task) for name in chosen_rankers(named)}
    return {name: swept(ranker, asked.questions) for name, ranker in chosen.items()}


def damping_of(
    name: str, task: AttributionTask, values: np.ndarray, choose: Callable[[], int]
) -> int:
    """Index of a ranker's damping or step: the settings' damping for ours, for the others the best
    on "tune"; 0 for a ranker without any.
    """
    if name != OURS:
        return choose() if len(values) > 1 else 0
    fixed = np.abs(np.log(np.array(DAMPINGS) / task.settings.damping))
    return int(np.argmin(fixed)) if len(values) == len(DAMPINGS) else 0


def full_data_models(task: AttributionTask) -> Iterator[tuple[AttributionTask, ConceptQueries]]:
    """The small models that learned all pictures, and the questions they are asked: that of the
    first seed, and what else is there.
    """
    held_out = task.everything.split("held_out")
    for subset, model in models_there(task, base_of(task)):
        asking = task_of(task, model, subset)
        yield asking, make_queries(asking, held_out)


def measured_subset(task: AttributionTask, plan: RetrainingPlan, least: int) -> RetrainingPlan:
    """The plan's subsets that have presences, in its order. UserError for fewer than `least`."""
    bench = bench_of(task)
    subsets = tuple(s for s in plan.subsets if bench.presences(plan.name, s).exists())
    if len(subsets) < least:
        of = f"{len(subsets)} of {len(plan.subsets)} models of the plan {plan.name}"
        line = retrain_line(plan.name, bench.work)
        remedy = f"train them (some six minutes each on one core): {line}"
        raise UserError(f"{of} have presences; {remedy}")
    return replace(plan, subsets=subsets)


def format_interval(value: float, interval: list[float]) -> str:
    """A figure with its interval."""
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Figures of several models as if of one, concepts after concepts."""
    return {figure: np.concatenate([part[figure] for part in parts]) for figure in parts[0]}


def figures_markdown(tables: dict[str, Any], figures: tuple[str, ...]) -> str:
    """A table for each heading, a row a ranker."""
    lines = []
    for heading, table in tables.items():
        lines += [f"\n**{heading}**\n", f"| method | {' | '.join(figures)} |"]
        lines.append("|---" * (1 + len(figures)) + "|")
        for name, told in table.items():
            cells = (format_interval(told[f], told[f"{f}_ci95"]) for f in figures)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(
    task: AttributionTask,
    test: str,
    found: dict[str, Any],
    markdown: str,
    drawn: Mapping[str, Figure] | None = None,
) -> dict[str, Any]:
    """Print the table, keep it below TRUTH_DIR/tables with its plots, and return what was found.

    More presences make another table, so what was found is part of its folder's name.
    """
    print(markdown)
    made_from = [task.train_identity(), found]
    with result_folder(task.settings, "tables", test, made_from) as folder:
        write_metrics(folder, "metrics", found, task.settings)
        write_bytes(folder / "table.md", f"{markdown}\n".encode())
        for name, figure in (drawn or {}).items():
            write_bytes(folder / f"{name}.png", png(figure))
    return found
