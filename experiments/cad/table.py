"""The table of `run_eval.sh`: does an edit erase, and only that? See the module docstrings of
`setup`, `tuning`, `controls` and `faithfulness` for each part.

Parts are measured in the order of their worth, cell by cell; a run that ends goes on there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from concept_trak.components.concept_plan import edit_from_scores, edited_values
from concept_trak.components.edits import make_edit
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import select
from concept_trak.components.selection import Selection
from concept_trak.scoring.metrics import bootstrap_interval

from . import faithfulness
from .amplify import Amplified
from .baselines import CONTROLS, ranked_by, same_counts
from .model_selection import (
    COUNTS,
    FINAL,
    GOALS,
    RATIOS,
    SELECTIONS,
    SPARED,
    Key,
    MeasuredEdits,
    mean_over_targets,
    tune,
    value,
)
from .result_cache import MeasurementCache, figures
from .testbed import EraseSetup, Target

CONTROLLED = 8  # objects under every control


@dataclass(frozen=True)
class Size:
    """Numbers of a run. headline: pictures of the target and of what is kept. controls: the same
    for each control. targets: at most so many of a kind, 0: all. masks, judged: of faithfulness.
    searched: pictures of each object among which the weakest are found.
    """

    headline: tuple[int, int]
    controls: tuple[int, int]
    targets: int = 0
    masks: int = 500
    judged: int = 64
    searched: int = 12

    @staticmethod
    def of(judged: int, targets: int) -> Size:
        """From JUDGED and NUM_QUERIES; few masks where that bounds the targets."""
        few, masks = max(4, judged // 4), (6, 2, 1) if targets else (500, 48, 12)
        return Size((judged, judged), (few, few), targets, *masks)


def evaluate(setup: EraseSetup, size: Size) -> dict[str, Any]:
    """Measure everything there is to measure; see the module docstring."""
    measured = MeasuredEdits(setup, MeasurementCache(setup))
    few = (size.controls, size.controls)
    chosen = tune(measured, *(few if size.targets else (COUNTS, FINAL)))
    targets = {k: setup.targets[k][: size.targets or None] for k in ("object", "style")}
    found: dict[str, Any] = {"chosen": chosen, "pictures": list(size.headline)}

    def under(key: Key, kind: str) -> dict[str, Any]:
        return {t.name: _headline(measured, t, key, size) for t in targets[kind]}

    plans = style_plans(chosen["best"]) if len(targets["style"]) > 1 else [chosen["best"]]
    found["best"] = {"object": under(chosen["best"], "object")}
    by_plan = {plan: under(plan, "style") for plan in plans}
    found["styles_by_plan"] = {" ".join(map(str, plan)): each for plan, each in by_plan.items()}
    found["best"]["style"] = chosen_by_others(by_plan, "style")
    found["paper"] = {kind: under(chosen["paper"], kind) for kind in targets}
    found["controls"] = _controls(measured, targets["object"][:CONTROLLED], size, chosen["best"])
    found["faithfulness"] = _faithful(measured, targets["object"][:2], size, chosen["best"])
    amplified = Amplified(measured, size.controls, chosen["best"])
    found["amplify"] = amplified.after_erasing(targets["object"][:CONTROLLED])
    found["amplify_weak"] = amplified.weakest(size.searched, size.targets or CONTROLLED)
    found["amplify_curve"] = amplified.curve(targets["object"][0])
    return found


def _headline(measured: MeasuredEdits, target: Target, key: Key, size: Size) -> dict[str, Any]:
    """Figures of a target under a plan, told as soon as they are there."""
    found = measured.figures(target, key, size.headline)
    cells = (
        f"{figure} {found[figure]:.2f} [{found[f'{figure}_ci95'][0]:.2f}, "
        f"{found[f'{figure}_ci95'][1]:.2f}]"
        for figure in ("ua", "ira", "cra")
    )
    told = f"{key.selection}, {key.ratio}, {target.kind} {target.name}"
    print(f"{told}: {', '.join(cells)}", flush=True)
    return found


def style_plans(best: Key) -> list[Key]:
    """What a style's plan is chosen from, see `chosen_by_others`: the objects', the same at twice
    the ratio, and concepts spared in place of captions, which takes less of a style's weights away.
    """
    bare = [best._replace(ratio=r, spared=SPARED[0], others="concepts") for r in RATIOS]
    return list(dict.fromkeys([best, best._replace(ratio=2 * best.ratio), *bare]))


def chosen_by_others(
    by_plan: dict[Key, dict[str, dict[str, Any]]], kind: str
) -> dict[str, dict[str, Any]]:
    """{target: its figures under the plan that is best for the *others*, "plan"}: where there is
    nothing but the reported targets to choose by, none has a say in its own plan.

    by_plan: {plan: {target: figures}}, the first plan the one that a single target gets.
    """
    first, found = next(iter(by_plan)), {}
    for name in by_plan[first]:
        worth = {
            plan: value([f for other, f in each.items() if other != name], kind)
            for plan, each in by_plan.items()
            if len(each) > 1
        }
        best = max(worth, key=worth.__getitem__, default=first)
        found[name] = by_plan[best][name] | {"plan": list(best)}
    return found


def _controls(
    measured: MeasuredEdits, targets: list[Target], size: Size, key: Key
) -> dict[str, dict[str, Any]]:
    """{"cad" or control: UA, IRA and CRA over targets, and by how much CAD's `tuning.value` is
    higher, paired over targets}. A control that ruins the model has a high UA, so UA alone does not
    compare them.
    """
    each: dict[str, list[dict[str, Any]]] = {name: [] for name in ("cad", *CONTROLS)}
    for i, target in enumerate(targets):
        other = targets[i - 1] if len(targets) > 1 else measured.setup.targets["tune"][0]
        bare = measured.bare(target, size.headline)
        cells = {"cad": measured.cell(target, key, size.controls)}
        for name in CONTROLS:
            cells[name] = _control(measured, (target, other), name, key, size.controls)
        for name, cell in cells.items():
            each[name].append(figures(target, cell, bare))
    told = {}
    for name, found in each.items():
        pairs = zip(each["cad"], found, strict=True)
        gains = np.array(
            [value([own], "object") - value([theirs], "object") for own, theirs in pairs]
        )
        low, high = bootstrap_interval(gains)
        told[name] = mean_over_targets(found) | {"cad_above": float(gains.mean())}
        told[name]["cad_above_ci95"] = [float(low), float(high)]
        print(f"{name}: {told[name]}", flush=True)
    return told


def _control(
    measured: MeasuredEdits,
    pair: tuple[Target, Target],
    name: str,
    key: Key,
    counts: tuple[int, int],
) -> dict[str, Any]:
    """Of a pair (target, another concept), as many weights in the same tensors by a control."""
    setup, plan, target = measured.setup, key.plan, pair[0]

    def make() -> dict[str, Any]:
        model, asked = setup.model, setup.asked(target)
        among = select(model.network, plan.selection)
        elsewhere = measured.scores(pair[1]) if name == "other_concept" else None
        scores = measured.spared(target, key)
        edit, _ = edit_from_scores(model, scores, plan, asked)
        values = ranked_by(name, model, among, scores, (asked, elsewhere))
        picked = same_counts(values, {k: index for k, (index, _, _) in edit.changes.items()})
        new = {k: edit.changes[k][2] for k in picked}
        if plan.operator.name != "zero":  # else what the edit writes there is right as it is
            aim = COMPONENT_OBJECTIVES["erase"]
            new = edited_values(model, Selection(picked, (), 0), plan, asked, aim)
        return setup.measure(target, make_edit(model.network, new, picked, edit.model), counts)

    return measured.cells.cell(target, ["control", name, pair[1].name, *key, *counts], make)


def _faithful(
    measured: MeasuredEdits, targets: list[Target], size: Size, key: Key
) -> dict[str, dict[str, Any]]:
    """{selection: Pearson of predicted and true changes, mean over targets}; the judge looks at
    masks of the plan's selection alone.
    """
    each, told = size.masks // len(targets), {}
    for selection in dict.fromkeys((key.selection, *SELECTIONS)):
        judged = size.judged // len(targets) if selection == key.selection else 0
        found = []
        for target in targets:
            args = measured.setup, target, selection, each, judged
            what = ["faithfulness, second order", selection, each, judged]
            cell = measured.cells.cell(target, what, lambda a=args: faithfulness.measure(*a))
            found.append(faithfulness.pearson(cell))
        values = {n: [r[n] for r in found if r[n] is not None] for n in faithfulness.READINGS}
        told[selection] = {n: float(np.mean(v)) if v else None for n, v in values.items()}
        told[selection] |= {"masks": each * len(targets), "masks_judged": judged * len(targets)}
    return told


def json_summary(found: dict[str, Any]) -> dict[str, Any]:
    """The one line of JSON: the best plan's cells, and what became of the goals."""
    best, meeting = found["best"], {}
    for kind, goals in GOALS.items():
        each = best[kind].values()
        ok = (
            all(f[n] >= g for n, g in zip(("ua", "ira", "cra"), goals, strict=True)) for f in each
        )
        meeting[kind] = sum(ok)
    others = [each for name, each in found["controls"].items() if name != "cad"]
    pearson = found["faithfulness"][found["chosen"]["best"].selection]
    return {
        "objects": best["object"],
        "styles": best["style"],
        "styles_by_plan": found["styles_by_plan"],
        "paper": found["paper"],
        "chosen": {k: list(found["chosen"][k]) for k in ("best", "paper")},
        "tried": found["chosen"]["tried"],
        "pictures": found["pictures"],
        "objects_meeting": meeting["object"],
        "styles_meeting": meeting["style"],
        "controls": found["controls"],
        "controls_beaten": all(each["cad_above_ci95"][0] > 0 for each in others),
        "faithfulness": found["faithfulness"],
        "pearson_j": pearson["fixed"],
        "pearson_j_second_order": pearson["second"],
        "pearson_judge": pearson["judge"],
        "amplify_gain": found["amplify"]["gain"],
        "amplify_gain_ci95": found["amplify"]["gain_ci95"],
        "amplify_kept": found["amplify"]["kept"],
        "amplify_weak": found["amplify_weak"],
        "amplify_curve": found["amplify_curve"],
    }
