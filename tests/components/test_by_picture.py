"""Images x weights: the split adds up to the data-side score, by module and by head."""

import pytest
import torch

from concept_trak.components.data_influence import ComponentSplitter, gradient_of, group_names
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import select
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.sample_grads import module_layout
from concept_trak.gradients.select import select_parameters
from concept_trak.gradients.state import State
from concept_trak.gradients.states import noising_schedule, train_states_of
from concept_trak.models.condition import Condition
from concept_trak.registry import OBJECTIVES

SELECTED = "cross_attention|feed_forward|convolution"


@pytest.fixture
def asked(tiny_denoiser):
    g = torch.Generator().manual_seed(0)

    def cond(n):
        return Condition(torch.randn(n, 3, 6, generator=g))

    tiny_denoiser.network.requires_grad_(False)
    x0, null = torch.randn(3, 2, 4, 4, generator=g), cond(1)
    of = cond(3)

    def states():
        return train_states_of(tiny_denoiser, x0, of, null, noising_schedule(3))

    concept = [State(t, torch.randn(2, 2, 4, 4, generator=g), cond(2), null) for t in (100, 700)]
    concept = [s.contrasting(s.cond[:1], null) for s in concept]
    chosen = select(tiny_denoiser.network, SELECTED)
    return tiny_denoiser, chosen, concept, states


@pytest.mark.parametrize("f", ["contrast", "dsm"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_sum_over_weights_is_the_score_of_the_picture(asked, f, normalize):
    denoiser, chosen, concept, states = asked
    cotangent = OBJECTIVES.get(f).cotangent
    gradient = gradient_of(denoiser, COMPONENT_OBJECTIVES["erase"], chosen, concept)
    names = set(gradient)
    layout = module_layout(select_parameters(denoiser.network, lambda n: n in names))
    count = sum(g.numel() for g in gradient.values())
    projection = make_projection("identity", count, 0, 0, layout=layout, separate=True)
    maker = GradientComputer(denoiser, projection, lambda n: n in names, normalize)
    rows = maker.rows(states(), cotangent, 3).values
    order = [n for n, _ in denoiser.network.named_parameters() if n in names]
    wanted = -rows @ torch.cat([gradient[n].flatten() for n in order])
    for granularity in ("module", "head"):
        through = ComponentSplitter(chosen, gradient, granularity, normalize)
        found = through.of(denoiser, states(), cotangent, 3)
        assert found.shape == (3, len(group_names(chosen, granularity)))
        scale = float(found.abs().sum(1).max())
        torch.testing.assert_close(found.sum(1), wanted, rtol=1e-5, atol=1e-5 * scale)


def test_heads_split_their_module_and_each_is_that_of_its_weights_alone(asked):
    denoiser, _, concept, states = asked
    cotangent = OBJECTIVES.get("contrast").cotangent
    for role in ("cross_attention.k", "cross_attention.out"):
        chosen = select(denoiser.network, role)
        gradient = gradient_of(denoiser, COMPONENT_OBJECTIVES["erase"], chosen, concept)
        by_head = ComponentSplitter(chosen, gradient, "head").of(denoiser, states(), cotangent, 3)
        by_module = ComponentSplitter(chosen, gradient).of(denoiser, states(), cotangent, 3)
        assert by_head.shape[1] == 2 * by_module.shape[1]
        torch.testing.assert_close(by_head.view(3, -1, 2).sum(2), by_module, rtol=1e-4, atol=1e-5)
        first = {k: torch.zeros_like(v) for k, v in gradient.items()}
        for c in chosen:  # the gradient of head 0 alone
            keep = c.grouped(torch.arange(c.weight.numel()).view(c.weight.shape), "head")[0]
            first[c.name].view(-1)[keep.flatten()] = gradient[c.name].flatten()[keep.flatten()]
        alone = ComponentSplitter(chosen, first).of(denoiser, states(), cotangent, 3)
        torch.testing.assert_close(alone, by_head[:, ::2], rtol=1e-4, atol=1e-5)


def test_a_picture_that_teaches_the_concept_raises_J(asked):
    """One descent on the loss -J: the change of J is what the split says, to first order."""
    denoiser, chosen, concept, _ = asked
    aim = COMPONENT_OBJECTIVES["erase"]
    gradient = gradient_of(denoiser, aim, chosen, concept)
    ascent = {k: g.clone() for k, g in gradient.items()}
    assert sum(float((gradient[k] * ascent[k]).sum()) for k in gradient) > 0
    through = ComponentSplitter(chosen, gradient)
    taught = iter([concept[0]])  # its own state under the contrast: G = -dJ/dw / 2 at c
    found = through.of(denoiser, taught, OBJECTIVES.get("presence").cotangent, 2)
    assert float(found.sum()) > 0
