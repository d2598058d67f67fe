"""Scores: the true change of J for an infinitesimal knock-out; error bars; one trajectory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_trak.components import states
from concept_trak.components.edit_operators import write_weights
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import components, select
from concept_trak.components.scores import score
from concept_trak.errors import UserError
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import sampling_timesteps


def conds():
    g = torch.Generator().manual_seed(0)
    return Condition(torch.randn(1, 3, 6, generator=g)), Condition(torch.zeros(1, 3, 6))


def states_of(denoiser, aim, seed=0):
    if COMPONENT_OBJECTIVES[aim].against == "base":
        return states.trajectory(denoiser, *conds(), seed, states.Sampling(3.0, 5, 5))
    x0 = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return states.noised_states(denoiser, x0, conds(), seed, 4)


@pytest.mark.parametrize("aim", ["erase", "amplify"])
@pytest.mark.parametrize("role", ["cross_attention.k", "feed_forward", "convolution", "time"])
def test_a_score_is_the_true_change_of_J_for_an_infinitesimal_knock_out(tiny_denoiser, aim, role):
    network = tiny_denoiser.network
    seen = states_of(tiny_denoiser, aim)
    chosen, aim = select(network, role)[:1], COMPONENT_OBJECTIVES[aim]
    found = score(tiny_denoiser, aim, chosen, lambda _: seen, 1)
    network.double().requires_grad_(False)
    seen = [as_double(s) for s in seen]
    targets = [aim.target(tiny_denoiser, s) for s in seen]
    weight, alpha, h = chosen[0].weight, found.mean[chosen[0].name].flatten(), 1e-3
    for place in alpha.abs().topk(3).indices.tolist() + [0]:
        there, values = float(weight.flatten()[place]), []
        for shift in (-h, h):  # J of w_i (1 -+ h)
            write_weights(
                weight, torch.tensor([place]), torch.tensor([there * (1 + shift)]).double()
            )
            values.append(mean_value(aim, tiny_denoiser, seen, targets))
        write_weights(weight, torch.tensor([place]), torch.tensor([there]).double())
        true = (values[1] - values[0]) / (2 * h)
        assert true == pytest.approx(
            float(alpha[place]), rel=5e-3, abs=1e-4 * float(alpha.abs().max())
        )


def as_double(state):
    def double(cond):
        return Condition(cond.embeddings.double())

    eps = None if state.eps is None else state.eps.double()
    changes = {"cond": double(state.cond), "cond_neg": double(state.cond_neg), "eps": eps}
    return replace(state, x_t=state.x_t.double(), **changes)


def test_mean_and_error_are_those_of_the_seeds_by_themselves(tiny_denoiser):
    chosen, aim = select(tiny_denoiser.network, "cross_attention"), COMPONENT_OBJECTIVES["erase"]

    def of(seed):
        return states_of(tiny_denoiser, "erase", seed)

    whole = score(tiny_denoiser, aim, chosen, of, 4)
    each = [score(tiny_denoiser, aim, chosen, lambda _, s=s: of(s), 1) for s in range(4)]
    for c in chosen:
        stacked = torch.stack([e.mean[c.name] for e in each])
        torch.testing.assert_close(whole.mean[c.name], stacked.mean(0), rtol=1e-4, atol=1e-6)
        error = stacked.std(0) / 2
        torch.testing.assert_close(whole.stderr[c.name], error, rtol=1e-3, atol=1e-6)
    assert each[0].stderr[chosen[0].name].isinf().all()
    totals = [float(whole.mean[c.name].sum()) for c in chosen]
    np.testing.assert_allclose(whole.profile.sum(0), totals, rtol=1e-3, atol=1e-4)
    assert whole.levels == sampling_timesteps(5) and whole.profile.shape == (5, len(chosen))
    assert all(p.grad is None and p.requires_grad for p in tiny_denoiser.network.parameters())


def test_states_are_read_at_their_own_timestep_on_one_trajectory(gaussian):
    from concept_trak.models.ddim import GuidedDenoiser, ddim_sample
    from concept_trak.models.sample import initial_noise

    gaussian.network = torch.nn.Linear(1, 1)
    gaussian.device = torch.device("cpu")
    cond, base = conds()
    calls = []
    inner = gaussian.eps
    gaussian.eps = lambda x, t, c: (calls.append(t), inner(x, t, c))[1]
    seen = states.trajectory(gaussian, cond, base, 3, states.Sampling(3.0, 50, 50))
    assert len(calls) == 50  # guided steps; the published schedule takes 1,275
    x_T = initial_noise(gaussian.latent_shape, 3)
    guided = GuidedDenoiser(gaussian, cond, base, 3.0)
    for state in seen[::10]:
        alone, _ = ddim_sample(guided, x_T, 50, stop=state.t)
        torch.testing.assert_close(state.x_t, alone)


def test_levels_are_spread_over_the_grid():
    levels = states.Sampling(3.0, 50, 5).levels()
    assert levels == [881, 681, 481, 281, 81]


def test_every_weight_has_one_role_and_attention_is_told_apart(tiny_denoiser):
    found = {c.name: c for c in components(tiny_denoiser.network)}
    weights = [n for n, p in tiny_denoiser.network.named_parameters() if p.dim() > 1]
    assert list(found) == weights
    for name, c in found.items():
        if ".attn2.to_k." in name:
            assert (c.role, c.heads, c.head_axis) == ("cross_attention.k", 2, 0)
        if ".attn1.to_out." in name:
            assert (c.role, c.head_axis) == ("self_attention.out", 1)
        if ".ff." in name:
            assert c.role == "feed_forward"
        if "time_emb" in name:
            assert c.role == "time"
        if ".conv1." in name:
            assert c.role == "convolution"
    paper = {c.name for c in select(tiny_denoiser.network, "paper")}
    assert paper == {n for n in weights if "ff" in n and found[n].weight.dim() == 2}


def test_a_selection_that_matches_nothing_or_is_none_is_refused(tiny_denoiser):
    with pytest.raises(UserError, match="SELECTION=feed_forward matches no weight"):
        select(torch.nn.Conv2d(1, 1, 1), "feed_forward")
    with pytest.raises(UserError, match="SELECTION names 'attn2'"):
        select(tiny_denoiser.network, "cross_attention|attn2")


def test_half_precision_and_nan_are_refused(tiny_denoiser):
    chosen, aim = select(tiny_denoiser.network, "cross_attention"), COMPONENT_OBJECTIVES["erase"]
    seen = states_of(tiny_denoiser, "erase")
    chosen[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        score(tiny_denoiser, aim, chosen, lambda _: seen, 1)
    tiny_denoiser.network.half()
    with pytest.raises(UserError, match="DTYPE=fp32"):
        score(tiny_denoiser, aim, chosen, lambda _: seen, 1)
