"""Erase a concept and prove it: the search for an edit that meets a target, and its certificate.

Target: UA at least TARGET_UA, IRA and CRA at least MIN_RETENTION. Plans are screened on few
pictures, for each selection from the smallest ratio until the concept is gone; other operators are
tried at the best plan. The best are confirmed, one by one, on other noise; the first whose lower
ends of the intervals all meet the target is certified. With MOST such looks each interval is at
1 - 0.05 / MOST, so that all of them hold together at 95 %. Where none does, the certificate says so
and shows the plan that falls least short.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

from concept_trak.components.edits import Edit
from concept_trak.datasets import labels
from concept_trak.errors import UserError, script_hint
from concept_trak.report.component_report import concept_prompts

from .candidate_edit import Attempt, judged, unedited
from .model_selection import FIGURES, MeasuredEdits
from .result_cache import MeasurementCache
from .robustness import decided_by, probes
from .testbed import EraseSetup, Target

SELECTIONS = ("cross_attention", "cross_attention|feed_forward", "feed_forward")
RATIOS = (0.005, 0.01, 0.015, 0.03, 0.06, 0.12)
OPERATORS = (("scale", 0.7), ("mean", 1.0), ("gradient", 3.0))  # beside zero
MOST = 3  # plans that are confirmed
LEVEL = 1 - 0.05 / MOST


@dataclass(frozen=True)
class EraseGoal:
    """What an edit is to reach, and the pictures that confirm it: as many are to be kept."""

    target_ua: float
    min_retention: float
    pictures: int

    @property
    def screened(self) -> tuple[int, int]:
        """Pictures that screen a plan: of the target, and of what is to be kept."""
        few = max(4, min(24, self.pictures // 4))
        return few, 2 * few

    def shortfall(self, found: dict[str, Any], low: bool = False) -> float:
        """By how much the worst figure misses its goal, 0 where all meet it. low: judged by the
        lower end of its interval.
        """
        goals = zip(FIGURES, (self.target_ua, self.min_retention, self.min_retention), strict=True)
        at = {n: found[n]["interval"][0] if low else found[n]["value"] for n in FIGURES}
        return max(0.0, *(goal - at[name] for name, goal in goals))


def target_of(setup: EraseSetup) -> Target:
    """CONCEPT, see `report.component_report.concept_prompts`. UserError for one that the judge
    does not know."""
    s = setup.task.settings
    words = concept_prompts(s)
    kind, name = labels.parse_concept(setup.task.train, words.name)
    known = setup.judge.objects if kind == "object" else setup.judge.styles
    if name not in known:
        raise UserError(
            f"the judge does not know {name!r}; set CONCEPT to one of these: "
            f"{script_hint('concepts.sh')}"
        )
    record = next(r for r in setup.task.train.records if r[kind] == name)
    return Target(kind, name, record.get(f"{kind}_phrase") or name)


def search(measured: MeasuredEdits, target: Target, goal: EraseGoal) -> list[dict[str, Any]]:
    """Screened plans, {"plan": Attempt, "weights", "figures", "shortfall"}, the best first."""
    tried: list[dict[str, Any]] = []

    def try_out(plan: Attempt) -> dict[str, Any]:
        cell = plan.screened(measured, target, goal.screened)
        found = judged(target, cell, measured.bare(target, goal.screened))
        tried.append(
            {"plan": plan, "weights": cell["weights"], "figures": found}
            | {"shortfall": round(goal.shortfall(found), 4)}
        )
        told = ", ".join(f"{n.upper()} {found[n]['value']:.2f}" for n in FIGURES)
        said = f"{plan.selection} {plan.ratio:g} {plan.operator} {plan.strength:g}: {told}"
        print(said, flush=True)
        return found

    for selection in SELECTIONS:
        for ratio in RATIOS:
            found = try_out(Attempt(selection, ratio))
            if found["ua"]["value"] >= max(goal.target_ua, 0.99):
                break  # a larger ratio only costs more of the rest
    best = min(tried, key=_order)["plan"]
    for operator, strength in OPERATORS:
        try_out(replace(best, operator=operator, strength=strength))
    return sorted(tried, key=_order)


def _order(entry: dict[str, Any]) -> tuple[float, float, int]:
    """The least short first; among those that are not, what keeps and erases most, then small."""
    spare = sum(entry["figures"][n]["interval"][0] for n in FIGURES)
    return entry["shortfall"], -round(spare, 2), entry["weights"]


def verify(setup: EraseSetup, target: Target, goal: EraseGoal) -> tuple[dict[str, Any], Edit]:
    """The certificate (JSON), and the edit it is about."""
    measured = MeasuredEdits(setup, MeasurementCache(setup))
    tried = search(measured, target, goal)
    bare = unedited(measured, target, goal.pictures)
    looks: list[dict[str, Any]] = []
    for entry in tried[:MOST]:
        cell = entry["plan"].confirmed(measured, target, goal.pictures)
        found = judged(target, cell, bare, LEVEL)
        short = {"shortfall": goal.shortfall(found), "sure": goal.shortfall(found, low=True)}
        looks.append({**entry, **short, "figures": found, "became": cell["became"]})
        if not short["sure"]:
            break
    best = min(looks, key=lambda look: (look["sure"], look["weights"]))
    edit = best["plan"].edit(measured, target)
    what = ["probe", edit.digest(), decided_by()]
    behind = {
        name: measured.cells.cell(target, [*what, name], lambda m=make: {"found": m()})["found"]
        for name, make in probes(setup, target, edit, best["plan"].selection).items()
    }
    told = {
        "concept": target.name,
        "kind": target.kind,
        "prompt": target.prompt,
        "target_ua": goal.target_ua,
        "min_retention": goal.min_retention,
        "met": best["sure"] == 0,
        "says": verdict(target, goal, best),
        "behind": robustness_verdict(behind),
        "level": round(LEVEL, 4),
        "unedited_shows": sum(bare["shown"]) / len(bare["shown"]),
        "edit": {"weights": edit.count, "digest": edit.digest(), "model": edit.model},
    }
    told |= {"plan": _named(best["plan"]), "figures": best["figures"], "became": best["became"]}
    return told | {"probes": behind, "confirmed": _plain(looks), "screened": _plain(tried)}, edit


def verdict(target: Target, goal: EraseGoal, best: dict[str, Any]) -> str:
    """The verdict in a sentence."""
    asked = f"UA {goal.target_ua:g} with IRA and CRA of at least {goal.min_retention:g}"
    if not best["sure"]:
        return f"certified: “{target.name}” is erased where it is asked for, {asked}"
    if not best["shortfall"]:
        return (
            f"no edit is sure to meet {asked}: this one does in its figures, not at their low end"
        )
    return f"no edit meets {asked}; this one falls least short, by {best['shortfall']:.3f}"


def robustness_verdict(found: dict[str, Any]) -> str:
    """What the probes found, in a sentence: a prompt that shows nothing is not all there is."""
    words = max(row["edited"]["value"] for row in found["paraphrases"].values())
    begun = ("edited", "edited_from_prompt")
    embedded = max(found["embedding"][name]["value"] for name in begun)
    steps = {
        name: f"more than {row['rates'][-1][0]}" if row["steps"] is None else str(row["steps"])
        for name, row in found["relearning"].items()
    }
    return (
        f"behind the prompt: other words show it in up to {words:.0%} of the pictures, an "
        f"optimised embedding in {embedded:.0%}; it is learned again in {steps['edited']} steps, "
        f"another object under a new word in {steps['new_word']}"
    )


def _named(plan: Attempt) -> dict[str, Any]:
    return dict(zip(("selection", "ratio", "operator", "strength"), astuple(plan), strict=True))


def _plain(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries as JSON."""
    return [entry | {"plan": _named(entry["plan"])} for entry in entries]
