"""Cotangents: what a step against their gradient does to the model."""

import pytest
import torch

from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import concept_cotangent, contrast, dps, presence
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.sample_grads import dense
from concept_trak.gradients.state import State
from concept_trak.gradients.states import noising_schedule, train_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import predict_x0
from concept_trak.registry import OBJECTIVES


def state_of(n=4, seed=0, t=500):
    g = torch.Generator().manual_seed(seed)
    x_t, x0 = (torch.randn(n, 2, 4, 4, generator=g) for _ in range(2))
    cond, null = Condition(torch.randn(n, 5, 6, generator=g)), Condition(torch.zeros(n, 5, 6))
    return State(t, x_t, cond, null, None, x0)


def part_of(state, i):
    one = slice(i, i + 1)
    return State(state.t, state.x_t[one], state.cond[one], state.cond_neg[one], x0=state.x0[one])


def test_dps_equals_autograd_of_its_definition(tiny_denoiser):
    state = state_of()
    x, level = state.x_t.clone().requires_grad_(), tiny_denoiser.schedule.level(500)
    x0_hat = predict_x0(x, tiny_denoiser.eps(x, 500, state.cond), level)
    error = (x0_hat - state.x0).square().flatten(1).mean(1).sum()
    want = -torch.autograd.grad(error, x)[0]
    torch.testing.assert_close(dps(tiny_denoiser, state)[1], want, rtol=1e-4, atol=1e-6)


def test_dps_does_not_depend_on_batch_size(tiny_denoiser):
    state = state_of()
    singles = torch.cat([dps(tiny_denoiser, part_of(state, i))[1] for i in range(4)])
    torch.testing.assert_close(dps(tiny_denoiser, state)[1], singles, rtol=1e-4, atol=1e-6)


def test_dps_points_to_states_from_which_the_picture_is_predicted_better(tiny_denoiser):
    state, level = state_of(), tiny_denoiser.schedule.level(500)
    g = dps(tiny_denoiser, state)[1]

    def error(x):
        with torch.no_grad():
            x0_hat = predict_x0(x, tiny_denoiser.eps(x, 500, state.cond), level)
        return (x0_hat - state.x0).square().flatten(1).mean(1)

    step = 1e-3 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (error(state.x_t + step) < error(state.x_t)).all()


def step_against(denoiser, state, cotangent):
    """(change of eps_hat [1, ...] at cond, v) after a small step of the attn2 weights against the
    gradient of a cotangent.
    """
    with PerSampleVjp(denoiser.network, "attn2") as tape:
        eps_hat, v = cotangent(denoiser, state)
        before = eps_hat.detach()[: len(state)]
        flat = dense(tape.vjp(eps_hat, v, len(state)))[0]
        step = 1e-2 * flat / flat.norm()
        with torch.no_grad():
            for name, p in tape.parameters.items():
                first = tape.offsets[name]
                p -= step[first : first + p.numel()].view_as(p)
            return denoiser.eps(state.x_t, state.t, state.cond) - before, v


def test_a_step_against_the_dps_gradient_moves_the_prediction_along_minus_g(tiny_denoiser):
    change, g = step_against(tiny_denoiser, state_of(1), dps)
    assert (change * -g).sum() > 0


@pytest.mark.parametrize("cotangent", [presence, contrast])
def test_a_step_against_the_slider_gradient_strengthens_the_concept(cotangent, tiny_denoiser):
    state = state_of(1)

    def both():
        with torch.no_grad():
            return [tiny_denoiser.eps(state.x_t, 500, c) for c in (state.cond, state.cond_neg)]

    pos, neg = both()
    step_against(tiny_denoiser, state, cotangent)
    after = both()
    if cotangent is presence:
        after[1] = neg  # which it holds fixed
    assert ((after[0] - after[1]) * (pos - neg)).sum() > (pos - neg).square().sum()


def test_train_and_query_agree_in_sign(tiny_denoiser):
    """The train row of a picture and the query of its caption, read at the same states, point the
    same way.
    """
    state = state_of(1)
    count = PerSampleVjp(tiny_denoiser.network, "attn2").input_dim
    maker = GradientComputer(tiny_denoiser, make_projection("identity", count, 0, 0), "attn2", True)
    inputs = state.x0, state.cond, state.cond_neg
    for name in ("presence", "contrast"):
        train = OBJECTIVES.get(name).cotangent
        seen = list(train_states_of(tiny_denoiser, *inputs, noising_schedule(5)))
        row = maker.rows(seen, train, 1).values
        asked = (s.contrasting(state.cond, state.cond_neg) for s in seen)
        got = maker.mean_row(asked, concept_cotangent(name)) * len(seen)
        torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-6)


def test_a_concept_query_is_two_sided_where_its_train_rows_are():
    sides = {name: concept_cotangent(name) is contrast for name in OBJECTIVES.names()}
    assert sides.pop("contrast") and sides.pop("contrast_llr") and not any(sides.values())


def test_rows_are_weighted_by_das_and_by_the_fit_of_the_caption():
    weighted = [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).row_weight]
    assert weighted == ["contrast_llr", "das", "das_mean"]
