"""A concept of a model, asked of its weights: what its prompt is, at which states, which scores.

>>> query = ComponentQuery("a rocket")            # a concept's words, or any prompt
>>> among = select(model.network, "cross_attention")
>>> scores = attribute_components(model, query, COMPONENT_OBJECTIVES["erase"], among)
>>> plan = EditPlan("cross_attention", SelectionRule(0.02))
>>> edit, chosen = edit_from_scores(model, scores, plan, query)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..gradients.state import State
from ..models.condition import Condition
from ..models.text_to_image import TextToImage
from . import states
from .edit_operators import Operator, gradient_values, new_values
from .edits import Edit, make_edit
from .objective import COMPONENT_OBJECTIVES, ComponentObjective
from .parameter_groups import PAPER, Component, select
from .scores import Scores, score
from .selection import Selection, SelectionRule, choose
from .states import Sampling

NOISINGS = 10  # of a picture, where an aim is asked at noised pictures
FIRST_SEED = 7_000  # of trajectories: other noise than that of pictures which are judged


@dataclass(frozen=True)
class ComponentQuery:
    """prompt: of the concept. base: what it is held against. num_seeds: trajectories, or pictures
    drawn, over which scores are averaged. real: latents [n, ...] of the concept's real pictures;
    None: the model draws its own. sampling: see `states`.
    """

    prompt: str
    base: str = ""
    num_seeds: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    real: torch.Tensor | None = None

    def conditions(self, model: TextToImage) -> tuple[Condition, Condition]:
        """c and c_b, of one prompt each."""
        cond, base = model.encode_prompts([self.prompt, self.base]).split()
        return cond, base

    def states(self, model: TextToImage, aim: ComponentObjective, seed: int) -> Sequence[State]:
        """A trajectory for what is held against the base, noisings of a picture for a loss."""
        cond, base = self.conditions(model)
        number = FIRST_SEED + seed
        if aim.against == "base":
            return states.trajectory(model, cond, base, number, self.sampling)
        if self.real is None:
            x0 = states.generate(model, cond, base, number, self.sampling)
        else:
            x0 = self.real[seed % len(self.real)][None].to(model.device)
        return states.noised_states(model, x0, (cond, base), number, NOISINGS)


@dataclass(frozen=True)
class EditPlan:
    """How an edit is made: SELECTION, rule and operator."""

    selection: str
    rule: SelectionRule
    operator: Operator = field(default_factory=Operator)


def plan_of(selection: str, ratio: float, granularity: str, operator: Operator) -> EditPlan:
    """A plan in the user's words; SELECTION=paper has the published rule."""
    return EditPlan(selection, SelectionRule(ratio, granularity, selection == PAPER), operator)


def attribute_components(
    model: TextToImage, asked: ComponentQuery, aim: ComponentObjective, among: Sequence[Component]
) -> Scores:
    """Scores of a concept's components; see `scores.score`."""
    return score(model, aim, among, lambda n: asked.states(model, aim, n), asked.num_seeds)


def edit_from_scores(
    model: TextToImage, scores: Scores, plan: EditPlan, asked: ComponentQuery, base: str = ""
) -> tuple[Edit, Selection]:
    """The edit of a plan, and what it chose. base: hash of the model's network without edits."""
    aim, among = COMPONENT_OBJECTIVES[scores.aim], select(model.network, plan.selection)
    chosen = choose(scores, among, plan.rule, aim.removes)
    new = edited_values(model, chosen, plan, asked, aim)
    return make_edit(model.network, new, chosen.picked, base), chosen


def edited_values(
    model: TextToImage,
    chosen: Selection,
    plan: EditPlan,
    asked: ComponentQuery,
    aim: ComponentObjective,
) -> dict[str, torch.Tensor]:
    """What the plan's operator makes of weights that are chosen; the model is left as it is."""
    among = select(model.network, plan.selection)
    if plan.operator.name == "gradient":
        seen = (model, aim, asked.states(model, aim, 0))
        return gradient_values(plan.operator, among, chosen.picked, seen)
    return new_values(plan.operator, among, chosen.picked)
