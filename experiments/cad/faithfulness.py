"""Do scores predict what a knock-out does? Predicted, -sum of alpha, against true change; and with
what the first order leaves out, + sum of `components.second_order.knockout_curvature`.

Masks are random, of 0.05 to 1 % of the selected weights, and are zeroed. J is asked at the states
that the scores were made at, in two readings: with the base branch of the unedited model, as J is
defined, and with it made anew by the edited one, as a user of the edited model meets it. The judge
names pictures drawn under some of the masks: its probability of the concept, mean over pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr
from tqdm import tqdm

from concept_trak.components.edit_operators import Operator, new_values
from concept_trak.components.edits import EditedNetwork, make_edit
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import score
from concept_trak.components.second_order import knockout_curvature
from concept_trak.components.selection import Picked
from concept_trak.gradients.state import rebatch

from .baselines import random_mask
from .testbed import EraseSetup, Target

SHARES = (0.0005, 0.01)  # of a mask, log-uniform between
PICTURES = 4  # of the target, a mask that is judged
PROBES = 8  # random cotangents a state
READINGS = ("fixed", "second", "anew", "judge")


def measure(
    setup: EraseSetup, target: Target, selection: str, num_masks: int, judged: int
) -> dict[str, Any]:
    """{"predicted", "bent", "fixed", "anew": [num_masks], "judge": [judged]}: changes of J and of
    the judge's probability.
    """
    model, aim, asked = setup.model, COMPONENT_OBJECTIVES["erase"], setup.asked(target)
    among, rng = select(model.network, selection), np.random.default_rng(0)
    states = list(asked.states(model, aim, 0))
    scores = score(model, aim, among, lambda _: states, 1)
    bent = knockout_curvature(model, aim, among, lambda _: states, 1, PROBES)
    together = list(rebatch(states, len(states)))
    targets = [aim.target(model, s) for s in together]
    before = mean_value(aim, model, together, targets)
    seen = judge_chance(setup, target) if judged else 0.0
    found: dict[str, Any] = {name: [] for name in ("predicted", "bent", "fixed", "anew", "judge")}
    edited = EditedNetwork(model.network)
    for i in tqdm(range(num_masks), desc=f"masks, {target.name}"):
        picked = random_mask(among, float(np.exp(rng.uniform(*np.log(SHARES)))), rng)
        edit = make_edit(model.network, new_values(Operator(), among, picked), picked, edited.base)
        found["predicted"].append(-summed(scores.mean, picked))
        found["bent"].append(summed(bent, picked))
        edited.apply(edit)
        found["fixed"].append(mean_value(aim, model, together, targets) - before)
        found["anew"].append(mean_value(aim, model, together) - before)
        edited.undo()
        if i < judged:
            setup.mirror(edit)
            found["judge"].append(judge_chance(setup, target) - seen)
            setup.mirror(edit, undo=True)
    return found


def summed(values: dict[str, torch.Tensor], picked: Picked) -> float:
    """Of values of weights, over what is picked."""
    return sum(float(values[name].flatten()[index].sum()) for name, index in picked.items())


def judge_chance(setup: EraseSetup, target: Target) -> float:
    """Mean probability of the target over pictures of it, by the twin as it stands."""
    drawn = setup.draw(setup.prompts(target, PICTURES), range(20_000, 20_000 + PICTURES))
    wanted = drawn.wanted[target.kind]
    return float(drawn.chances[target.kind][np.arange(len(wanted)), wanted].mean())


def pearson(found: dict[str, Any]) -> dict[str, float | None]:
    """Of `measure`: of the scores with J's change, its base branch fixed or made anew, and with the
    judge's; "second": of scores and bends with the first of them.
    """
    both = [a + b for a, b in zip(found["predicted"], found["bent"], strict=True)]
    told = {n: correlation(found["predicted"], found[n]) for n in READINGS if n != "second"}
    return told | {"second": correlation(both, found["fixed"])}


def correlation(predicted: list[float], true: list[float]) -> float | None:
    """Pearson; None for fewer than three, or where nothing varies."""
    n = min(len(predicted), len(true))
    if n < 3 or np.ptp(predicted[:n]) == 0 or np.ptp(true[:n]) == 0:
        return None
    return float(pearsonr(predicted[:n], true[:n]).statistic)
