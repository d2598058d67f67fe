"""Other weights than those that the scores name: as many, in the same tensors.

    random          drawn
    magnitude       the largest |w|
    gradient        the largest |dJ/dw|
    wanda           the largest |w| x norm of its input on the concept's states (Sun et al. 2024;
                    ConceptPrune's measure of a skilled neuron)
    other_concept   CAD scores of another concept
    training_loss   CAD scores with the training loss in place of J_erase

An edit that does no better than these owes its effect to how many weights it removes, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from concept_trak.components.concept_plan import ComponentQuery, attribute_components
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import Component
from concept_trak.components.scores import Scores
from concept_trak.components.selection import Picked
from concept_trak.models.text_to_image import TextToImage

CONTROLS = ("random", "magnitude", "gradient", "wanda", "other_concept", "training_loss")


def ranked_by(
    name: str, model: TextToImage, among: Sequence[Component], scores: Scores, others: tuple
) -> dict[str, torch.Tensor]:
    """{weight: values, the highest to be removed} of a control. others: (Asked of the concept,
    Scores of another concept).
    """
    asked, of_other = others
    weights = {c.name: c.weight.detach() for c in among}
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        return {k: torch.rand(w.shape, generator=generator) for k, w in weights.items()}
    if name == "magnitude":
        return {k: w.abs() for k, w in weights.items()}
    if name == "gradient":
        return {k: (scores.mean[k] / w).nan_to_num(0, 0, 0).abs() for k, w in weights.items()}
    if name == "wanda":
        norms = input_norms(model, asked, among)
        return {k: w.abs() * norms[k].view(1, -1, *[1] * (w.dim() - 2)) for k, w in weights.items()}
    if name == "other_concept":
        return {k: of_other.mean[k] for k in weights}
    return dict(
        attribute_components(model, asked, COMPONENT_OBJECTIVES["training_loss"], among).mean
    )


def same_counts(values: dict[str, torch.Tensor], picked: Picked) -> Picked:
    """The highest values of each tensor, as many as `picked` has there."""
    return {
        name: values[name].flatten().topk(len(index)).indices.sort().values
        for name, index in picked.items()
    }


def input_norms(
    model: TextToImage, asked: ComponentQuery, among: Sequence[Component]
) -> dict[str, torch.Tensor]:
    """{weight: norm of each of its inputs [in]} over the states of the concept's first seed."""
    owners, states = (
        dict(model.network.named_modules()),
        asked.states(model, COMPONENT_OBJECTIVES["erase"], 0),
    )
    square = {c.name: torch.zeros(c.weight.shape[1]) for c in among}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            a = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).float()
            channel = 1 if module.weight.dim() > 2 else a.dim() - 1
            square[name] += a.square().movedim(channel, -1).flatten(0, -2).sum(0).cpu()

        return keep

    handles = [
        owners[c.name.rpartition(".")[0]].register_forward_hook(hook(c.name), with_kwargs=True)
        for c in among
    ]
    try:
        with torch.no_grad():
            for state in states:
                model.eps(state.x_t, state.t, state.cond)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.sqrt() for name, value in square.items()}


def random_mask(among: Sequence[Component], share: float, rng: np.random.Generator) -> Picked:
    """A share of all scalars, each as likely as any other; at least one."""
    sizes = np.array([c.weight.numel() for c in among])
    count = max(1, round(share * int(sizes.sum())))
    places = np.sort(rng.choice(int(sizes.sum()), count, replace=False))
    ends = np.cumsum(sizes)
    picked = {}
    for c, start, end in zip(among, ends - sizes, ends, strict=True):
        inside = places[np.searchsorted(places, start) : np.searchsorted(places, end)] - start
        if len(inside):
            picked[c.name] = torch.from_numpy(inside)
    return picked
