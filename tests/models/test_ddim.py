"""Schedules, DDIM steps, guidance against diffusers and the Gaussian whose exact eps is known."""

import pytest
import torch
from conftest import GaussianDenoiser

from concept_trak.models import ddim
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import DdimNoise, GuidedDenoiser, ddim_invert, ddim_sample
from concept_trak.models.schedule import FlowMatching
from experiments.emoji.model.pipeline import build_scheduler

SCHEDULES = {
    "variance preserving": None,
    "flow": FlowMatching(),
    "shifted": FlowMatching(shift=3.0),
}


class Counting:
    """Wraps a denoiser and records the batch size, timestep and condition of every forward."""

    def __init__(self, inner):
        self.inner, self.schedule, self.calls = inner, inner.schedule, []

    def eps(self, x_t, t, cond):
        self.calls.append((len(x_t), t, cond))
        return self.inner.eps(x_t, t, cond)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unguided(denoiser):
    return GuidedDenoiser(denoiser, None, None, 1)


def conditions(n=3):
    return Condition(torch.ones(n, 1, 1)), Condition(torch.zeros(n, 1, 1))


@pytest.mark.parametrize("steps", [7, 10, 20, 50, 100])
def test_schedule_matches_diffusers(steps):
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    assert ddim.sampling_timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_ddim_step_matches_diffusers_at_every_level(eta, gaussian):
    scheduler, level = build_scheduler(), gaussian.schedule.level
    scheduler.set_timesteps(20)
    x_t, eps, z = randn(2, 2, 4, 4), randn(2, 2, 4, 4, seed=1), randn(2, 2, 4, 4, seed=2)
    for t in ddim.sampling_timesteps(20):
        want = scheduler.step(eps, t, x_t, eta=eta, variance_noise=z).prev_sample
        got = ddim.ddim_step(x_t, eps, level(t), level(t - 50), eta, z)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_reference_grid_of_the_inversion_is_0_19_39_to_979_999():
    assert ddim.inversion_timesteps(50) == [0, *range(19, 980, 20), 999]


def exact_flow(denoiser, x0, t):
    """Where the probability flow takes x0 ~ N(mean, variance): the same quantile at level t."""
    alpha, sigma = denoiser.schedule.level(t)
    spread = (alpha**2 * denoiser.variance + sigma**2) / denoiser.variance
    return alpha * denoiser.mean + (x0 - denoiser.mean) * spread**0.5


@pytest.mark.parametrize("kind", SCHEDULES)
def test_inversion_follows_the_exact_probability_flow_of_a_gaussian(kind):
    gaussian = GaussianDenoiser(schedule=SCHEDULES[kind])
    x0 = gaussian.mean + gaussian.variance**0.5 * randn(3, 2, 4, 4)
    steps = list(range(1 if kind == "variance preserving" else 0, 1000))
    for t, x_t in ddim_invert(unguided(gaussian), x0, steps, {99, 499, 899}):
        torch.testing.assert_close(x_t, exact_flow(gaussian, x0, t), rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_invert_then_sample_is_identity_on_gaussian_denoiser(kind):
    gaussian, errors = GaussianDenoiser(schedule=SCHEDULES[kind]), []
    x0 = gaussian.mean + gaussian.variance**0.5 * randn(3, 2, 4, 4)
    for steps in (50, 500):
        grid = ddim.sampling_timesteps(steps)[::-1]
        ((_, x_T),) = ddim_invert(unguided(gaussian), x0, grid, {grid[-1]})
        back, _ = ddim_sample(unguided(gaussian), x_T, steps)
        errors.append((back - x0).abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_stochastic_sampling_of_a_gaussian_has_its_mean_and_variance(kind):
    gaussian = GaussianDenoiser(schedule=SCHEDULES[kind])
    x_T, noises = randn(1, 4, 64, 64), torch.Generator().manual_seed(1)

    def noise(t):
        return torch.randn(x_T.shape, generator=noises, dtype=x_T.dtype)

    x0, _ = ddim_sample(unguided(gaussian), x_T, 500, DdimNoise(1.0, noise))
    assert abs(x0.mean().item() - gaussian.mean) < 0.02
    assert abs(x0.var().item() / gaussian.variance - 1) < 0.05


def test_inversion_makes_no_step_beyond_the_last_kept_state(gaussian):
    counted, grid = Counting(gaussian), ddim.inversion_timesteps(50)
    kept = set(range(99, 900, 100))
    states = dict(ddim_invert(unguided(counted), randn(1, 2, 4, 4), grid, kept))
    assert sorted(states) == sorted(kept)
    assert [t for _, t, _ in counted.calls] == grid[:45]


def test_sampling_that_stops_at_a_level_returns_the_state_that_a_whole_run_passes(gaussian):
    x_T, counted = randn(2, 2, 4, 4), Counting(gaussian)
    _, states = ddim_sample(unguided(gaussian), x_T, 50, keep={981, 501})
    stopped, _ = ddim_sample(unguided(counted), x_T, 50, stop=501)
    torch.testing.assert_close(stopped, states[501])
    torch.testing.assert_close(states[981], x_T)
    assert counted.calls[-1][1] == 521


def test_guidance_costs_one_forward_of_its_branch_at_0_and_1_and_follows_its_formula(gaussian):
    x_t, (cond, null), counted = randn(3, 2, 4, 4), conditions(), Counting(gaussian)
    with_cond, without = (GuidedDenoiser(counted, cond, null, w).eps(x_t, 500) for w in (1, 0))
    assert [(n, c is cond) for n, _, c in counted.calls] == [(3, True), (3, False)]
    got = GuidedDenoiser(counted, cond, null, 7.5).eps(x_t, 500)
    torch.testing.assert_close(got, without + 7.5 * (with_cond - without))
    assert counted.calls[-1][0] == 6


@pytest.mark.parametrize("scale", [1, 7.5])
def test_a_prediction_made_at_a_kept_state_serves_the_next_step_of_the_inversion(scale, gaussian):
    x0, conds, grid = randn(3, 2, 4, 4), conditions(), (0, 250, 500, 750)
    counted, known = Counting(gaussian), {}
    want = dict(ddim_invert(GuidedDenoiser(gaussian, *conds, scale), x0, grid, {250, 750}))
    for t, x_t in ddim_invert(GuidedDenoiser(counted, *conds, scale), x0, grid, {250, 750}, known):
        torch.testing.assert_close(x_t, want[t])
        known[t] = gaussian.eps(x_t, t, conds[0])
    spared = {1: [(3, 0), (3, 500)], 7.5: [(6, 0), (3, 250), (6, 500)]}
    assert [(n, t) for n, t, _ in counted.calls] == spared[scale]
