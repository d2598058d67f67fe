"""Which selection, ratio, granularity and operator: chosen on objects that are not reported.

First selection x ratio with operator zero on single weights, other concepts spared; then, at the
winner, no sparing, other granularities and operators; then whole captions spared in place of bare
concepts, and more; last the best of all again, on more pictures. The figure that is maximised is
mean UA + IRA + CRA with what exceeds the goals not counted, so that no gain there pays for a loss
elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from concept_trak.components.concept_plan import (
    EditPlan,
    attribute_components,
    edit_from_scores,
    plan_of,
)
from concept_trak.components.edit_operators import Operator
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import Component, components
from concept_trak.components.scores import Scores
from concept_trak.components.selection import subtract_others
from concept_trak.datasets.labels import STYLE_PREFIX
from concept_trak.scoring.metrics import bootstrap_interval

from .result_cache import MeasurementCache, figures
from .testbed import EraseSetup, Target

FIGURES = ("ua", "ira", "cra")
GOALS = {"object": (0.95, 0.97, 0.95), "style": (0.90, 0.92, 0.97)}  # UA, IRA, CRA
SELECTIONS = ("cross_attention", "feed_forward", "cross_attention|feed_forward")
RATIOS = (0.015, 0.03, 0.06)
SPARED = (1.0, 2.0)  # of the need of others, see `selection.subtract_others`
PAPER_RATIOS = (0.01, 0.02, 0.05)
COUNTS = (8, 12)  # pictures of the target, and of what is to be kept
FINAL = (24, 48)  # the same for the best of all
FINALISTS = 4
BARE = "unedited"


class Key(NamedTuple):
    """A plan. spared: weight of what others need; others: "concepts", "captions" or "" (nobody)."""

    selection: str
    ratio: float
    granularity: str = "scalar"
    operator: str = "zero"
    spared: float = SPARED[0]
    others: str = "concepts"

    @property
    def plan(self) -> EditPlan:
        """How its edit is made."""
        return plan_of(self.selection, self.ratio, self.granularity, Operator(self.operator))


def paper(ratio: float) -> Key:
    """The published rule."""
    return Key("paper", ratio, spared=0.0, others="")


class MeasuredEdits:
    """Cells of targets under plans; scores of a target are made once, when first needed."""

    def __init__(self, setup: EraseSetup, cells: MeasurementCache) -> None:
        self.setup, self.cells = setup, cells
        self._scores: tuple[str, Scores] | None = None

    def scores(self, target: Target) -> Scores:
        """J_erase of the transformers' weights; those of the last target are kept."""
        if self._scores is None or self._scores[0] != target.prompt:
            found = attribute_components(
                self.setup.model,
                self.setup.asked(target),
                COMPONENT_OBJECTIVES["erase"],
                self.among(),
            )
            self._scores = target.prompt, found
        return self._scores[1]

    def spared(self, target: Target, key: Key) -> Scores:
        """Those less what others need that do not show the target."""
        if not key.others:
            return self.scores(target)
        needs = {"concepts": self._concepts, "captions": self._captions}[key.others]
        others = [need for shown, need in needs if target.name not in shown]
        return subtract_others(self.scores(target), others, key.spared)

    @cached_property
    def _concepts(self) -> list[tuple[tuple[str, ...], Scores]]:
        """What each of four tuned objects and all styles needs, with the names that it shows."""
        each = (*self.setup.targets["tune"][:4], *self.setup.targets["style"])
        return [((t.name,), self._need(t.prompt)) for t in each]

    @cached_property
    def _captions(self) -> list[tuple[tuple[str, ...], Scores]]:
        """The same of captions, every style with two tuned objects."""
        tuned, needs = self.setup.targets["tune"], []
        for i, style in enumerate(self.setup.targets["style"]):
            for shown in (tuned[i % len(tuned)], tuned[(i + 3) % len(tuned)]):
                need = self._need(f"{shown.phrase}{STYLE_PREFIX}{style.phrase}")
                needs.append(((shown.name, style.name), need))
        return needs

    def _need(self, prompt: str) -> Scores:
        """Of a prompt, over one seed."""
        asked = replace(self.setup.asked(self.setup.targets["tune"][0]), prompt=prompt, num_seeds=1)
        return attribute_components(
            self.setup.model, asked, COMPONENT_OBJECTIVES["erase"], self.among()
        )

    def among(self) -> list[Component]:
        """The weights that are scored."""
        return [c for c in components(self.setup.model.network) if c.role not in SKIPPED]

    def cell(self, target: Target, key: Key, counts: tuple[int, int]) -> dict[str, Any]:
        """What the judge says under the edit of a plan."""

        def make() -> dict[str, Any]:
            asked = self.setup.asked(target)
            scores = self.spared(target, key)
            edit, _ = edit_from_scores(self.setup.model, scores, key.plan, asked)
            return self.setup.measure(target, edit, counts) | {"weights": edit.count}

        return self.cells.cell(target, [*key, *counts], make)

    def bare(self, target: Target, counts: tuple[int, int]) -> dict[str, Any]:
        """The unedited model on the pictures that are to be kept; drawn once for all targets that
        keep the same.
        """
        places = self.setup.kept(target, counts[1])
        pool = Target("pool", "pool", "")
        return self.cells.cell(pool, [BARE, places], lambda: self.setup.measure_kept(places))

    def figures(self, target: Target, key: Key, counts: tuple[int, int]) -> dict[str, Any]:
        """UA, IRA and CRA; see `result_cache.figures`."""
        return figures(target, self.cell(target, key, counts), self.bare(target, counts))


SKIPPED = ("convolution", "time", "projection")


def value(found: list[dict[str, Any]], kind: str) -> float:
    """What is maximised, over targets of a kind."""
    each = [sum(min(f[n], g) for n, g in zip(FIGURES, GOALS[kind], strict=True)) for f in found]
    return float(np.mean(each))


def tune(
    measured: MeasuredEdits, counts: tuple[int, int], final: tuple[int, int]
) -> dict[str, Any]:
    """{"best": key, "paper": key of the published rule, "tried": [{key, figures, value}]}.

    counts, final: pictures, see COUNTS and FINAL.
    """
    targets, tried = measured.setup.targets["tune"], []
    worth: dict[Key, float] = {}

    def try_out(keys: list[Key], counts: tuple[int, int] = counts) -> Key:
        of_target = [[measured.figures(t, key, counts) for key in keys] for t in targets]
        for i, key in enumerate(keys):
            of = [each[i] for each in of_target]
            worth[key] = value(of, "object")
            told = {"plan": list(key), "pictures": list(counts), "value": worth[key]}
            tried.append(told | mean_over_targets(of))
            print(f"{' '.join(map(str, key))}: {tried[-1]}", flush=True)
        return max(keys, key=worth.__getitem__)

    best = try_out([Key(s, r) for s in SELECTIONS for r in RATIOS])
    bare = best._replace(spared=0.0, others="")
    best = try_out(
        [best, bare, best._replace(granularity="row"), best._replace(operator="gradient")]
    )
    more = [best._replace(ratio=r, spared=w, others="captions") for w in SPARED for r in RATIOS]
    try_out(more)
    finalists = sorted(worth, key=worth.__getitem__, reverse=True)[:FINALISTS]
    best, published = try_out(finalists, final), try_out([paper(r) for r in PAPER_RATIOS])
    return {"best": best, "paper": published, "tried": tried}


def mean_over_targets(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of UA, IRA and CRA over targets, with bootstrap intervals over them."""
    told: dict[str, Any] = {}
    for name in FIGURES:
        values = np.array([f[name] for f in found])
        low, high = bootstrap_interval(values)
        told |= {name: round(float(values.mean()), 3)}
        told |= {f"{name}_ci95": [round(float(low), 3), round(float(high), 3)]}
    return told
