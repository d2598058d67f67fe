"""Schedules: what a network predicts as the noise it stands for."""

import pytest
import torch
from torch import nn

from concept_trak.errors import UserError
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import implied_eps, predict_x0, q_sample
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.schedule import FlowMatching, VariancePreserving
from experiments.emoji.model.pipeline import build_scheduler

ABAR = build_scheduler().alphas_cumprod
OUTPUTS = {  # name: (schedule, what its network says of x0 and eps at a level)
    "epsilon": (VariancePreserving(ABAR), lambda x0, eps, level: eps),
    "v": (
        VariancePreserving(ABAR, "v_prediction"),
        lambda x0, eps, level: level.alpha * eps - level.sigma * x0,
    ),
    "flow": (FlowMatching(), lambda x0, eps, level: eps - x0),
    "shifted flow": (FlowMatching(shift=3.0), lambda x0, eps, level: eps - x0),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_is_converted_to_the_noise_it_stands_for(kind):
    """A network that is right gives eps back, and x0 by way of eps, at one level or at many."""
    schedule, output = OUTPUTS[kind]
    x0, eps = torch.randn(2, 3, 2, 4, 4).unbind(0)
    times = [1, 400, 999]
    levels = [schedule.level(t) for t in times]
    parts = zip(x0.split(1), eps.split(1), levels, strict=True)
    said = [output(a, e, level) for a, e, level in parts]
    x_t = [q_sample(a, e, lv) for a, e, lv in zip(x0.split(1), eps.split(1), levels, strict=True)]
    for i, t in enumerate(times):
        one = NetworkDenoiser(nn.Linear(1, 1), schedule, (2, 4, 4), lambda *_, i=i: said[i])
        got = one.eps(x_t[i], t, None)
        torch.testing.assert_close(got, eps[i : i + 1], rtol=1e-4, atol=1e-5)
        back = predict_x0(x_t[i], got, levels[i])
        if levels[i].alpha > 0.05:
            torch.testing.assert_close(back, x0[i : i + 1], rtol=1e-3, atol=1e-3)
    many = NetworkDenoiser(nn.Linear(1, 1), schedule, (2, 4, 4), lambda *_: torch.cat(said))
    got = many.eps(torch.cat(x_t), torch.tensor(times), None)
    torch.testing.assert_close(got, eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_levels_go_from_picture_to_noise(kind):
    levels = [OUTPUTS[kind][0].level(t) for t in range(1000)]
    alphas, sigmas = zip(*levels, strict=True)
    assert all(a > b for a, b in zip(alphas, alphas[1:], strict=False))
    assert all(a < b for a, b in zip(sigmas, sigmas[1:], strict=False))
    assert OUTPUTS[kind][0].level(-5) == levels[0]


def test_a_shift_moves_levels_towards_noise_and_keeps_the_ends():
    plain, shifted = FlowMatching(), FlowMatching(shift=3.0)
    assert shifted.level(0) == plain.level(0) and shifted.level(1000) == plain.level(1000) == (0, 1)
    assert all(shifted.level(t).sigma > plain.level(t).sigma for t in range(1, 1000))


def test_noise_of_a_state_is_what_made_it():
    x0, eps = torch.randn(2, 3, 2, 4, 4).unbind(0)
    for schedule, _ in OUTPUTS.values():
        level = schedule.level(500)
        torch.testing.assert_close(implied_eps(q_sample(x0, eps, level), x0, level), eps)


def test_an_unsupported_prediction_type_is_refused():
    with pytest.raises(UserError, match="sample"):
        VariancePreserving(torch.ones(1000), "sample")


def test_the_timestep_reaches_every_sample_of_the_batch():
    seen = {}

    def call(network, x_t, t, cond):
        return seen.update(t=t) or x_t

    denoiser = NetworkDenoiser(nn.Linear(1, 1), VariancePreserving(ABAR), (2, 4, 4), call)
    denoiser.eps(torch.zeros(3, 2, 4, 4), 123, None)
    assert seen["t"].tolist() == [123] * 3


def test_a_condition_keeps_its_parts_together():
    cond = Condition(torch.randn(3, 5, 6), {"pooled": torch.randn(3, 4)})
    assert len(cond) == 3 and len(cond[1:2].expand(7)) == 7 and cond.expand(3) is cond
    again = Condition.join(cond.split())
    assert torch.equal(again.embeddings, cond.embeddings)
    assert torch.equal(again.extra["pooled"], cond.extra["pooled"])
    half = cond.to(torch.zeros(1, dtype=torch.float16))
    assert half.embeddings.dtype == half.extra["pooled"].dtype == torch.float16


def test_further_inputs_of_a_condition_reach_the_network():
    seen = {}

    class Network(nn.Linear):
        def forward(self, x_t, t, encoder_hidden_states, pooled):
            seen.update(pooled=pooled)
            return type("Out", (), {"sample": x_t})

    cond = Condition(torch.randn(2, 5, 6), {"pooled": torch.randn(2, 4)})
    denoiser = NetworkDenoiser(Network(1, 1), VariancePreserving(ABAR), (2, 4, 4))
    denoiser.eps(torch.zeros(2, 2, 4, 4), 5, cond)
    assert torch.equal(seen["pooled"], cond.extra["pooled"])
