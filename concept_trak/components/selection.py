"""Scores -> which weights to edit.

By score (default): over all selected components together, groups of the asked granularity in the
order of their mean score a weight, until they hold `ratio` of the selected weights; at least one
group, and none whose score has the wrong sign. No step of it rounds to nothing.

The published rule, `of_rows`: in each row of n weights the first floor(ratio n), of which those
with a strictly negative score are left out. At small ratios the floor is 0 for short rows: those
layers are then never edited, and `Selection.untouched` names them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UserError, script_hint
from .objective import COMPONENT_OBJECTIVES
from .parameter_groups import Component
from .scores import Scores

Picked = dict[str, torch.Tensor]  # weight's name -> flat positions, ascending


@dataclass(frozen=True)
class SelectionRule:
    """How many weights, in which groups. ratio: share of the selected weights, (0, 1]. paper: the
    published rule, for which granularity does not count.
    """

    ratio: float
    granularity: str = "scalar"
    paper: bool = False


@dataclass(frozen=True)
class Selection:
    """What a rule picks: positions by weight; weights that it could not touch because of its
    rounding; the number of scalars that it chose among.
    """

    picked: Picked
    untouched: tuple[str, ...]
    among: int

    @property
    def count(self) -> int:
        """Scalars picked."""
        return sum(len(index) for index in self.picked.values())


def subtract_others(scores: Scores, others: Sequence[Scores], weight: float) -> Scores:
    """Scores less `weight` times the mean magnitude of other concepts' scores, alpha_c - weight
    mean_k |alpha_k|: what others need, too, is left alone.
    """
    if not others or weight == 0:
        return scores
    removes = COMPONENT_OBJECTIVES[scores.aim].removes
    mean = {}
    for name, alpha in scores.mean.items():
        need = sum((o.mean[name].abs() for o in others), torch.zeros_like(alpha)) / len(others)
        mean[name] = alpha - removes * weight * need
    return replace(scores, mean=mean)


def choose(
    scores: Scores, among: Sequence[Component], rule: SelectionRule, removes: int = 1
) -> Selection:
    """The weights that serve the aim most. removes: +1 takes the highest scores, -1 the lowest.

    UserError for a ratio outside (0, 1], scores that are NaN or of other weights, and a choice that
    is empty, with what would mend it.
    """
    if not 0 < rule.ratio <= 1:
        raise UserError(f"RATIO={rule.ratio:g} is out of range; set RATIO above 0 and at most 1")
    signed = {}
    for c in among:
        if c.name not in scores.mean or scores.mean[c.name].shape != c.weight.shape:
            raise UserError(f"these scores do not hold {c.name}; make them for this SELECTION")
        signed[c.name] = removes * scores.mean[c.name]
        if not signed[c.name].isfinite().all():
            raise UserError(
                f"scores of {c.name} are NaN or infinite; make them again: "
                f"{script_hint('cad/run_cad.sh', CONCEPT='cat')}"
            )
    picked = of_rows(signed, rule.ratio) if rule.paper else _of_groups(signed, among, rule)
    total = sum(c.weight.numel() for c in among)
    short = rule.paper and [c.name for c in among if not int(rule.ratio * _row_length(c))]
    found = Selection({k: v for k, v in picked.items() if len(v)}, tuple(short or ()), total)
    if not found.count:
        raise UserError(_empty(rule, among))
    return found


def _empty(rule: SelectionRule, among: Sequence[Component]) -> str:
    longest = max(map(_row_length, among))
    if rule.paper and int(rule.ratio * longest) == 0:
        return (
            f"RATIO={rule.ratio:g} edits nothing: the published rule rounds down in each row, and "
            f"the longest has {longest} weights; set RATIO to at least {1 / longest:.2g}"
        )
    if rule.granularity == "head":
        return "no attention head is to be edited; use another SELECTION or GRANULARITY=module"
    return "no score has the sign that this edit removes; use another SELECTION or PROMPT"


def _row_length(component: Component) -> int:
    return component.weight[0].numel()


def of_rows(signed: Picked, ratio: float) -> Picked:
    """The published rule (module docstring) on scores by weight; for the row-wise choice a weight
    [out, in, ...] has `out` rows.
    """
    picked = {}
    for name, values in signed.items():
        rows = values.flatten(1)
        count = math.floor(ratio * rows.shape[1])
        column = rows.sort(dim=1, descending=True, stable=True).indices[:, :count]
        places = column + torch.arange(len(rows))[:, None] * rows.shape[1]
        places = places[rows.gather(1, column) >= 0]
        picked[name] = places.sort().values
    return picked


def _of_groups(signed: Picked, among: Sequence[Component], rule: SelectionRule) -> Picked:
    if rule.granularity == "scalar":  # one top-k; the loop below would visit every weight
        return _of_scalars(signed, rule.ratio)
    groups = [c.grouped(signed[c.name], rule.granularity) for c in among]
    means = torch.cat([g.mean(1) for g in groups]) if groups else torch.zeros(0)
    sizes = torch.cat([torch.full((len(g),), g.shape[1]) for g in groups])
    owner = torch.cat([torch.full((len(g),), i) for i, g in enumerate(groups)])
    place = torch.cat([torch.arange(len(g)) for g in groups])
    order = means.argsort(descending=True, stable=True)
    order = order[means[order] > 0]
    room = rule.ratio * sum(c.weight.numel() for c in among)
    taken = order[: max(1, int((sizes[order].cumsum(0) <= room).sum()))]
    return {
        c.name: c.members(place[taken[owner[taken] == i]], rule.granularity)
        for i, c in enumerate(among)
    }


def _of_scalars(signed: Picked, ratio: float) -> Picked:
    flat = torch.cat([values.flatten() for values in signed.values()])
    count = max(1, round(ratio * len(flat)))
    values, places = flat.topk(count)
    places, picked, start = places[values > 0].sort().values, {}, 0
    for name, weight in signed.items():
        end = start + weight.numel()
        low, high = torch.searchsorted(places, torch.tensor([start, end])).tolist()
        picked[name] = places[low:high] - start
        start = end
    return picked
