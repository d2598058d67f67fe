"""Does amplifying raise the judge's rate: of concepts that were erased before, and of those that
the model draws worst?
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from concept_trak.components.concept_plan import (
    ComponentQuery,
    attribute_components,
    edit_from_scores,
)
from concept_trak.components.edits import Edit, EditedNetwork
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import Scores
from concept_trak.components.second_order import knockout_curvature
from concept_trak.scoring.metrics import bootstrap_interval

from .faithfulness import summed
from .model_selection import Key, MeasuredEdits
from .testbed import Target

AMPLIFIED = 0.005  # share of the weights that amplifying removes; higher ratios hurt the rest
CURVE = (0.00005, 0.0005, 0.005)  # shares at which the change of J is held against the scores
SEARCH = 50_000  # first seed of the pictures that find the weakest objects


@dataclass(frozen=True)
class Amplified:
    """Amplifying edits of single weights of the key's selection, from real pictures of the target.

    counts: pictures of the target, and of what is to be kept. key: of the erasing edit.
    """

    measured: MeasuredEdits
    counts: tuple[int, int]
    key: Key

    def after_erasing(self, targets: list[Target]) -> dict[str, Any]:
        """`mean_gain` of concepts that were erased, by what is put on top."""
        cells = self.measured.cells
        pairs = [
            (
                self.measured.cell(target, self.key, self.counts),
                cells.cell(
                    target, ["amplify", *self.key, *self.counts], lambda t=target: self._recalled(t)
                ),
            )
            for target in targets
        ]
        return mean_gain(pairs)

    def weakest(self, searched: int, count: int) -> dict[str, Any]:
        """`mean_gain` of the objects that the model draws worst, amplified as they are, and
        {object:
        (rate before, after)}. They are found on other noise than what measures them, so that no
        gain is a return to the mean; searched: pictures of each object for that.
        """
        setup, cells = self.measured.setup, self.measured.cells
        pairs, told = [], {}
        for target in self._weakest(searched, count):
            before = cells.cell(
                target,
                ["as it is", *self.counts],
                lambda t=target: setup.measure(t, None, self.counts),
            )
            after = cells.cell(
                target,
                ["amplify", self.key.selection, AMPLIFIED, *self.counts],
                lambda t=target: setup.measure(t, self._edit(t), self.counts),
            )
            pairs.append((before, after))
            told[target.name] = [float(np.mean(cell["shown"])) for cell in (before, after)]
            print(f"{target.name}, amplified: {told[target.name]}", flush=True)
        return mean_gain(pairs) | {"concepts": told}

    def _weakest(self, searched: int, count: int) -> list[Target]:
        """Objects that the unedited model draws worst, none of the tuned ones."""
        setup = self.measured.setup
        phrases = {r["object"]: r["object_phrase"] for r in setup.pool}
        targets = [Target("object", name, phrases[name]) for name in sorted(phrases)]

        def make() -> dict[str, Any]:
            shown = {}
            for target in tqdm(targets, desc="objects drawn unedited"):
                seeds = range(SEARCH, SEARCH + searched)
                drawn = setup.draw(setup.prompts(target, searched), seeds)
                shown[target.name] = int(drawn.right("object").sum())
            return {"shown": shown}

        cells = self.measured.cells
        shown = cells.cell(Target("pool", "pool", ""), ["weakest", searched], make)["shown"]
        return sorted(targets, key=lambda t: (shown[t.name], t.name))[:count]

    def curve(self, target: Target) -> list[dict[str, float]]:
        """{"ratio", "weights", "predicted", "second", "true"}: the change of J that the scores of
        what is removed promise, - sum alpha, with its curvature, and the one there is, at each of
        CURVE.
        """

        def make() -> dict[str, Any]:
            model, aim, real = (
                self.measured.setup.model,
                COMPONENT_OBJECTIVES["amplify"],
                self._real(target),
            )
            states = [s for n in range(real.num_seeds) for s in real.states(model, aim, n)]
            scores, before = self._scores(real), mean_value(aim, model, states)
            among = select(model.network, self.key.plan.selection)
            bent = knockout_curvature(
                model, aim, among, lambda n: real.states(model, aim, n), real.num_seeds
            )
            found = []
            for ratio in CURVE:
                edit, chosen = edit_from_scores(
                    model, scores, Key(self.key.selection, ratio).plan, real
                )
                first = -summed(scores.mean, chosen.picked)
                second = first + summed(bent, chosen.picked)
                with EditedNetwork(model.network) as edited:
                    edited.apply(edit)
                    true = mean_value(aim, model, states) - before
                told = {"ratio": ratio, "weights": edit.count, "true": true}
                found.append(told | {"predicted": first, "second": second})
            return {"curve": found}

        what = ["amplify, change of J, second order", self.key.selection, CURVE]
        return self.measured.cells.cell(target, what, make)["curve"]

    def _real(self, target: Target) -> ComponentQuery:
        """The target's training pictures."""
        setup, task = self.measured.setup, self.measured.setup.task
        rows = [i for i, r in enumerate(task.train.records) if r[target.kind] == target.name]
        return replace(setup.asked(target), real=task.latents[rows], num_seeds=len(rows))

    def _scores(self, real: ComponentQuery) -> Scores:
        model = self.measured.setup.model
        among = select(model.network, self.key.plan.selection)
        return attribute_components(model, real, COMPONENT_OBJECTIVES["amplify"], among)

    def _edit(self, target: Target, base: str = "") -> Edit:
        """The amplifying edit of the network as it stands. base: as `concept.edit_of`."""
        real, plan = self._real(target), Key(self.key.selection, AMPLIFIED).plan
        return edit_from_scores(self.measured.setup.model, self._scores(real), plan, real, base)[0]

    def _recalled(self, target: Target) -> dict[str, Any]:
        """The judge's view after the erasing edit and an amplifying one on top."""
        measured, setup, model = self.measured, self.measured.setup, self.measured.setup.model
        scores = measured.spared(target, self.key)
        edit, _ = edit_from_scores(model, scores, self.key.plan, setup.asked(target))
        with EditedNetwork(model.network) as edited:
            edited.apply(edit)
            again = self._edit(target, edited.base)
            setup.mirror(edit)
            try:
                before = {k: (i, _at(model, k, i), n) for k, (i, _, n) in again.changes.items()}
                return setup.measure(target, replace(again, changes=before), self.counts)
            finally:
                setup.mirror(edit, undo=True)


def mean_gain(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """By how much the judge's rate of the target rose from the first cell of a pair to the second,
    mean over pairs with its interval, and the share of other objects that was kept.
    """
    shown = np.array([[np.mean(cell["shown"]) for cell in pair] for pair in pairs])
    others = np.array([[np.mean(cell["object"]) for cell in pair] for pair in pairs])
    gains = shown[:, 1] - shown[:, 0]
    low, high = bootstrap_interval(gains)
    return {
        "gain": float(gains.mean()),
        "gain_ci95": [float(low), float(high)],
        "kept": float((others[:, 1] / others[:, 0].clip(1e-9)).mean()),
    }


def _at(model: Any, name: str, index: Any) -> Any:
    """What stands at positions of a weight."""
    return model.network.get_parameter(name).detach().flatten()[index].clone()
