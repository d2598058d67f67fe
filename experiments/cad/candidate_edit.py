"""One erasing edit of many that could be made: its plan, its edit, and what the judge says of it.

Plans are screened on few pictures; those that look best are confirmed on other noise and more of
it, so that the choice does not flatter what it chose. Intervals are Wilson's: unlike a bootstrap's
they do not shrink to a point where all pictures agree.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from concept_trak.components.concept_plan import EditPlan, edit_from_scores, plan_of
from concept_trak.components.edit_operators import Operator
from concept_trak.components.edits import Edit

from .model_selection import SPARED, Key, MeasuredEdits
from .testbed import EraseSetup, Target

FRESH = 30_000  # first seed of the pictures that confirm


@dataclass(frozen=True)
class Attempt:
    """SELECTION, RATIO, OPERATOR and STRENGTH of an edit of single weights, captions spared."""

    selection: str
    ratio: float
    operator: str = "zero"
    strength: float = 1.0

    @property
    def key(self) -> Key:
        """As `tuning` names it, the strength left out; it spares what the best plan there does."""
        spares = {"spared": SPARED[-1], "others": "captions"}
        return Key(self.selection, self.ratio, operator=self.operator, **spares)

    def plan(self) -> EditPlan:
        """How its edit is made."""
        operator = Operator(self.operator, self.strength)
        return plan_of(self.selection, self.ratio, "scalar", operator)

    def edit(self, measured: MeasuredEdits, target: Target) -> Edit:
        """The edit, with what made it."""
        setup = measured.setup
        scores = measured.spared(target, self.key)
        edit, _ = edit_from_scores(setup.model, scores, self.plan(), setup.asked(target))
        edit.about.update(aim="erase", prompt=target.prompt, plan=list(astuple(self)))
        edit.about.update(model_path=setup.task.settings.sd_model_path)
        return edit

    def screened(
        self, measured: MeasuredEdits, target: Target, counts: tuple[int, int]
    ) -> dict[str, Any]:
        """The judge's hits on the pictures that choose; see `EraseSetup.measure`."""

        def make() -> dict[str, Any]:
            edit = self.edit(measured, target)
            return measured.setup.measure(target, edit, counts) | {"weights": edit.count}

        return measured.cells.cell(target, ["screened", *self.key, self.strength, *counts], make)

    def confirmed(self, measured: MeasuredEdits, target: Target, count: int) -> dict[str, Any]:
        """The same on fresh noise, `count` pictures of the target and as many to be kept."""

        def make() -> dict[str, Any]:
            edit = self.edit(measured, target)
            measured.setup.mirror(edit)
            try:
                return confirm(measured.setup, target, count) | {"weights": edit.count}
            finally:
                measured.setup.mirror(edit, undo=True)

        return measured.cells.cell(target, ["confirmed", *self.key, self.strength, count], make)


def unedited(measured: MeasuredEdits, target: Target, count: int) -> dict[str, Any]:
    """Hits of the model as it is, on the pictures that confirm."""
    what = ["confirmed", "unedited", count]
    return measured.cells.cell(target, what, lambda: confirm(measured.setup, target, count))


def confirm(setup: EraseSetup, target: Target, count: int) -> dict[str, Any]:
    """Hits by the twin as it stands, on noise that no screening saw."""
    asked = setup.draw(setup.prompts(target, count), range(FRESH, FRESH + count))
    places = setup.kept(target, count)
    kept = setup.draw([setup.pool[i] for i in places], [2 * FRESH + i for i in places])
    names = {"object": setup.judge.objects, "style": setup.judge.styles}[target.kind]
    seen, times = np.unique(asked.chances[target.kind].argmax(1), return_counts=True)
    became = {names[i]: int(n) for i, n in zip(seen, times, strict=True)}
    return {
        "shown": asked.right(target.kind).astype(int).tolist(),
        **{kind: kept.right(kind).astype(int).tolist() for kind in ("object", "style")},
        "became": dict(sorted(became.items(), key=lambda item: -item[1])[:5]),
    }


def wilson_interval(hits: Any, level: float = 0.95) -> dict[str, Any]:
    """{"value", "interval", "pictures"} of hits 0 and 1, the interval Wilson's."""
    values = np.asarray(hits, dtype=int)
    found = binomtest(int(values.sum()), len(values)).proportion_ci(level, method="wilson")
    ends = [round(float(found.low), 4), round(float(found.high), 4)]
    return {"value": round(float(values.mean()), 4), "interval": ends, "pictures": len(values)}


def judged(
    target: Target, cell: dict[str, Any], bare: dict[str, Any], level: float = 0.95
) -> dict[str, Any]:
    """{"ua", "ira", "cra"}: see `wilson_interval`; the last two as a share of the unedited
    model's."""
    other = "style" if target.kind == "object" else "object"
    found = {"ua": wilson_interval(1 - np.asarray(cell["shown"]), level)}
    for name, kind in (("ira", target.kind), ("cra", other)):
        before, after = float(np.mean(bare[kind])) or 1.0, wilson_interval(cell[kind], level)
        after["interval"] = [round(end / before, 4) for end in after["interval"]]
        found[name] = after | {"value": round(after["value"] / before, 4)}
    return found
