"""The second order of a knock-out: against the explicit Jacobian, and against true changes of J."""

import numpy as np
import pytest
import torch
from test_component_scores import as_double, states_of

from concept_trak.components.edit_operators import write_weights
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import score
from concept_trak.components.second_order import knockout_curvature

FACTOR = {"erase": lambda d: 1.0, "amplify": lambda d: -1.0 / d}


def jacobian(denoiser, states, weight, place, h=1e-4):
    """d eps / dw_i of every state by central differences, [states, D]."""
    there, found = float(weight.flatten()[place]), []
    for shift in (-h, h):
        write_weights(weight, torch.tensor([place]), torch.tensor([there + shift]).double())
        with torch.no_grad():
            found.append(torch.cat([denoiser.eps(s.x_t, s.t, s.cond).flatten(1) for s in states]))
    write_weights(weight, torch.tensor([place]), torch.tensor([there]).double())
    return (found[1] - found[0]) / (2 * h)


@pytest.mark.parametrize("aim", ["erase", "amplify"])
@pytest.mark.parametrize("role", ["cross_attention.k", "feed_forward"])
def test_a_bend_is_the_squared_norm_of_the_predictions_derivative(tiny_denoiser, aim, role):
    seen, chosen = states_of(tiny_denoiser, aim), select(tiny_denoiser.network, role)[:1]
    found = knockout_curvature(
        tiny_denoiser, COMPONENT_OBJECTIVES[aim], chosen, lambda _: seen, 1, probes=150
    )
    tiny_denoiser.network.double().requires_grad_(False)
    seen = [as_double(s) for s in seen]
    weight, bend = chosen[0].weight, found[chosen[0].name].flatten()
    for place in bend.abs().topk(3).indices.tolist():
        slope = jacobian(tiny_denoiser, seen, weight, place)
        true = FACTOR[aim](slope.shape[1]) * float(weight.flatten()[place]) ** 2
        true *= float(slope.square().sum(1).mean())
        assert float(bend[place]) == pytest.approx(
            true, rel=0.3
        )  # of 150 random cotangents a state
    assert (
        bend * COMPONENT_OBJECTIVES[aim].removes >= 0
    ).all()  # knocking out costs, whatever the aim


def test_the_second_order_predicts_whole_knock_outs_better_than_the_first(tiny_denoiser):
    network, seen = tiny_denoiser.network, states_of(tiny_denoiser, "erase")
    chosen, aim = select(network, "feed_forward"), COMPONENT_OBJECTIVES["erase"]
    alpha = score(tiny_denoiser, aim, chosen, lambda _: seen, 1).mean
    bent = knockout_curvature(tiny_denoiser, aim, chosen, lambda _: seen, 1, probes=64)
    targets = [aim.target(tiny_denoiser, s) for s in seen]
    before, rng = mean_value(aim, tiny_denoiser, seen, targets), np.random.default_rng(0)
    errors = {"first": [], "second": []}
    for _ in range(12):
        c = chosen[int(rng.integers(len(chosen)))]
        places = torch.from_numpy(rng.permutation(c.weight.numel())[: c.weight.numel() // 4])
        old = c.weight.detach().flatten()[places].clone()
        write_weights(c.weight, places, torch.zeros_like(old))
        true = mean_value(aim, tiny_denoiser, seen, targets) - before
        write_weights(c.weight, places, old)
        first = -float(alpha[c.name].flatten()[places].sum())
        second = first + float(bent[c.name].flatten()[places].sum())
        errors["first"].append(abs(true - first))
        errors["second"].append(abs(true - second))
    assert np.mean(errors["second"]) < 0.6 * np.mean(errors["first"])


def test_the_network_is_left_as_it_was_and_a_second_time_says_the_same(tiny_denoiser):
    seen, chosen = states_of(tiny_denoiser, "erase"), select(tiny_denoiser.network, "paper")
    once = knockout_curvature(
        tiny_denoiser, COMPONENT_OBJECTIVES["erase"], chosen, lambda _: seen, 2
    )
    again = knockout_curvature(
        tiny_denoiser, COMPONENT_OBJECTIVES["erase"], chosen, lambda _: seen, 2
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert all(p.grad is None and p.requires_grad for p in tiny_denoiser.network.parameters())
