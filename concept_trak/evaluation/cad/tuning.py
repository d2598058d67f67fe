"""Which selection, ratio, granularity and operator: chosen on objects that are not reported.

First selection x ratio with operator zero on single weights, other concepts spared; then, at the
winner, no sparing, other granularities and operators. The figure that is maximised is mean UA + IRA
+ CRA with what exceeds the goals (0.95 each) not counted, so that no gain there pays for a loss
elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ...components.concept import Plan, edit_of, plan_of, scores_of
from ...components.objective import AIMS
from ...components.operators import Operator
from ...components.roles import Component, components
from ...components.scores import Scores
from ...components.selection import sparing
from ...scoring.metrics import bootstrap_interval
from .bed import Bed, Target
from .cells import Cells, figures

GOAL = 0.95
SELECTIONS = ("cross_attention", "feed_forward", "cross_attention|feed_forward")
RATIOS = (0.015, 0.03, 0.06)
SPARED = 1.0  # of the need of other concepts, see `selection.sparing`
PAPER_RATIOS = (0.01, 0.02, 0.05)
VARIANTS = (("scalar", "zero", 0.0), ("row", "zero", SPARED), ("scalar", "gradient", SPARED))
COUNTS = (8, 12)  # pictures of the target, and of what is to be kept
BARE = "unedited"

Key = tuple[str, float, str, str, float]  # selection, ratio, granularity, operator, spared


def plan_from(key: Key) -> Plan:
    """The plan that a key names."""
    return plan_of(key[0], key[1], key[2], Operator(key[3]))


class Measured:
    """Cells of targets under plans; scores of a target are made once, when first needed."""

    def __init__(self, bed: Bed, cells: Cells) -> None:
        self.bed, self.cells = bed, cells
        self._scores: tuple[str, Scores] | None = None

    def scores(self, target: Target) -> Scores:
        """J_erase of the transformers' weights; those of the last target are kept."""
        if self._scores is None or self._scores[0] != target.prompt:
            found = scores_of(self.bed.model, self.bed.asked(target), AIMS["erase"], self.among())
            self._scores = target.prompt, found
        return self._scores[1]

    def spared(self, target: Target, key: Key) -> Scores:
        """Those less what other concepts need: four tuned objects and all styles, itself not."""
        if key[4] == 0:
            return self.scores(target)
        tuned = self.bed.targets["tune"][:4]
        others = [t for t in (*tuned, *self.bed.targets["style"]) if t.prompt != target.prompt]
        return sparing(self.scores(target), [self._needs[t.prompt] for t in others], key[4])

    @cached_property
    def _needs(self) -> dict[str, Scores]:
        """Of every concept that may be spared, over one seed."""
        tuned, among = self.bed.targets["tune"][:4], self.among()
        return {
            t.prompt: scores_of(
                self.bed.model, replace(self.bed.asked(t), num_seeds=1), AIMS["erase"], among
            )
            for t in (*tuned, *self.bed.targets["style"])
        }

    def among(self) -> list[Component]:
        """The weights that are scored."""
        return [c for c in components(self.bed.model.network) if c.role not in SKIPPED]

    def cell(self, target: Target, key: Key, counts: tuple[int, int]) -> dict[str, Any]:
        """What the judge says under the edit of a plan."""

        def make() -> dict[str, Any]:
            asked = self.bed.asked(target)
            scores = self.spared(target, key)
            edit, _ = edit_of(self.bed.model, scores, plan_from(key), asked)
            return self.bed.measure(target, edit, counts) | {"weights": edit.count}

        return self.cells.cell(target, [*key, *counts], make)

    def bare(self, target: Target, counts: tuple[int, int]) -> dict[str, Any]:
        """The unedited model on the pictures that are to be kept; drawn once for all targets that
        keep the same.
        """
        places = self.bed.kept(target, counts[1])
        pool = Target("pool", "pool", "")
        return self.cells.cell(pool, [BARE, places], lambda: self.bed.measure_kept(places))

    def figures(self, target: Target, key: Key, counts: tuple[int, int]) -> dict[str, Any]:
        """UA, IRA and CRA; see `cells.figures`."""
        return figures(target, self.cell(target, key, counts), self.bare(target, counts))


SKIPPED = ("convolution", "time", "projection")


def value(found: list[dict[str, Any]]) -> float:
    """What is maximised, over targets."""
    return float(np.mean([sum(min(f[n], GOAL) for n in ("ua", "ira", "cra")) for f in found]))


def tune(measured: Measured, counts: tuple[int, int] = COUNTS) -> dict[str, Any]:
    """{"best": key, "paper": key of the published rule, "tried": [{key, figures, value}]}."""
    targets, tried = measured.bed.targets["tune"], []

    def try_out(keys: list[Key]) -> Key:
        found = []
        of_target = [[measured.figures(t, key, counts) for key in keys] for t in targets]
        for i, key in enumerate(keys):
            of = [each[i] for each in of_target]
            found.append((value(of), key))
            means = _over_targets(of)
            tried.append({"plan": list(key), "value": found[-1][0], **means})
            print(f"{key}: {means}", flush=True)
        return max(found)[1]

    first = try_out([(s, r, "scalar", "zero", SPARED) for s in SELECTIONS for r in RATIOS])
    second = [(first[0], first[1], *variant) for variant in VARIANTS]
    best = try_out([first, *second])
    paper = try_out([("paper", r, "scalar", "zero", 0.0) for r in PAPER_RATIOS])
    return {"best": best, "paper": paper, "tried": tried}


def _over_targets(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of UA, IRA and CRA over targets, with bootstrap intervals over them."""
    told: dict[str, Any] = {}
    for name in ("ua", "ira", "cra"):
        values = np.array([f[name] for f in found])
        low, high = bootstrap_interval(values)
        told |= {name: round(float(values.mean()), 3)}
        told |= {f"{name}_ci95": [round(float(low), 3), round(float(high), 3)]}
    return told
