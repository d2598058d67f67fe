"""Schedule, DDIM steps and guidance against diffusers and against the Gaussian whose exact eps is
known.
"""

import pytest
import torch
from conftest import GaussianDenoiser

from concept_trak.models import ddim as diffusion
from concept_trak.workshop.embedded.pipeline import build_scheduler


class Counting:
    """Wraps a denoiser and records the batch size, timestep and condition of every forward."""

    def __init__(self, inner):
        self.inner, self.alpha_bar, self.calls = inner, inner.alpha_bar, []

    def eps(self, x_t, t, cond):
        self.calls.append((len(x_t), t, cond))
        return self.inner.eps(x_t, t, cond)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [7, 10, 20, 50, 100])
def test_schedule_matches_diffusers(steps):
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    assert diffusion.sampling_timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_ddim_step_matches_diffusers_at_every_level(eta):
    scheduler, denoiser = build_scheduler(), GaussianDenoiser()
    scheduler.set_timesteps(20)
    x_t, eps, z = randn(2, 2, 4, 4), randn(2, 2, 4, 4, seed=1), randn(2, 2, 4, 4, seed=2)
    for t in diffusion.sampling_timesteps(20):
        want = scheduler.step(eps, t, x_t, eta=eta, variance_noise=z).prev_sample
        a, a_next = diffusion.alpha_bar_at(denoiser, t), diffusion.alpha_bar_at(denoiser, t - 50)
        torch.testing.assert_close(
            diffusion.ddim_step(x_t, eps, a, a_next, eta, z), want, rtol=1e-5, atol=1e-5
        )


def test_reference_grid_of_the_inversion_is_0_19_39_to_979_999():
    assert diffusion.inversion_timesteps(50) == [0, *range(19, 980, 20), 999]


def exact_flow(denoiser, x0, t):
    """Where the probability flow takes x0 ~ N(mean, variance): the same quantile of N(sqrt(a) mean,
    a variance + 1 - a).
    """
    a = float(denoiser.alpha_bar[t])
    return (
        a**0.5 * denoiser.mean
        + (x0 - denoiser.mean) * ((a * denoiser.variance + 1 - a) / denoiser.variance) ** 0.5
    )


def test_inversion_follows_the_exact_probability_flow_of_a_gaussian(gaussian):
    x0 = gaussian.mean + gaussian.variance**0.5 * randn(3, 2, 4, 4)
    grid = list(range(1000))
    for t, x_t in diffusion.ddim_invert(
        gaussian, x0, None, None, scale=1, timesteps=grid, keep={99, 499, 899}
    ):
        torch.testing.assert_close(x_t, exact_flow(gaussian, x0, t), rtol=0, atol=0.02)


def test_ddim_invert_then_sample_is_identity_on_gaussian_denoiser(gaussian):
    x0 = gaussian.mean + gaussian.variance**0.5 * randn(3, 2, 4, 4)
    errors = []
    for steps in (50, 500):
        grid = diffusion.sampling_timesteps(steps)[::-1]
        ((_, x_T),) = diffusion.ddim_invert(
            gaussian, x0, None, None, scale=1, timesteps=grid, keep={grid[-1]}
        )
        back, _ = diffusion.ddim_sample(gaussian, x_T, None, None, scale=1, num_steps=steps)
        errors.append((back - x0).abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3


def test_stochastic_sampling_of_a_gaussian_has_its_mean_and_variance(gaussian):
    x_T = randn(1, 4, 64, 64)
    noises = torch.Generator().manual_seed(1)
    x0, _ = diffusion.ddim_sample(
        gaussian,
        x_T,
        None,
        None,
        scale=1,
        num_steps=500,
        eta=1.0,
        noise=lambda t: torch.randn(x_T.shape, generator=noises, dtype=x_T.dtype),
    )
    assert abs(x0.mean().item() - gaussian.mean) < 0.02
    assert abs(x0.var().item() / gaussian.variance - 1) < 0.05


def test_inversion_makes_no_step_beyond_the_last_kept_state(gaussian):
    counted = Counting(gaussian)
    grid = diffusion.inversion_timesteps(50)
    states = dict(
        diffusion.ddim_invert(
            counted,
            randn(1, 2, 4, 4),
            None,
            None,
            scale=1,
            timesteps=grid,
            keep=set(range(99, 900, 100)),
        )
    )
    assert sorted(states) == list(range(99, 900, 100))
    assert [t for _, t, _ in counted.calls] == grid[:45]


def test_sampling_that_stops_at_a_level_returns_the_state_that_a_whole_run_passes(gaussian):
    x_T, counted = randn(2, 2, 4, 4), Counting(gaussian)
    _, states = diffusion.ddim_sample(
        gaussian, x_T, None, None, scale=1, num_steps=50, keep={981, 501}
    )
    stopped, _ = diffusion.ddim_sample(counted, x_T, None, None, scale=1, num_steps=50, stop=501)
    torch.testing.assert_close(stopped, states[501])
    torch.testing.assert_close(states[981], x_T)
    assert counted.calls[-1][1] == 521


def test_guidance_costs_one_forward_of_its_branch_at_0_and_1_and_follows_its_formula_elsewhere(
    gaussian,
):
    x_t, cond, null = randn(3, 2, 4, 4), torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    counted = Counting(gaussian)
    with_cond, without = (
        diffusion.guided_eps(counted, x_t, 500, cond, null, scale) for scale in (1, 0)
    )
    assert [(n, c is cond) for n, _, c in counted.calls] == [(3, True), (3, False)]
    got = diffusion.guided_eps(counted, x_t, 500, cond, null, 7.5)
    torch.testing.assert_close(got, without + 7.5 * (with_cond - without))
    assert counted.calls[-1][0] == 6


@pytest.mark.parametrize("scale", [1, 7.5])
def test_a_prediction_made_at_a_kept_state_serves_the_next_step_of_the_inversion(scale, gaussian):
    x0, cond, null = randn(3, 2, 4, 4), torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    grid, counted, known = (0, 250, 500, 750), Counting(gaussian), {}
    want = dict(
        diffusion.ddim_invert(
            gaussian, x0, cond, null, scale=scale, timesteps=grid, keep={250, 750}
        )
    )
    for t, x_t in diffusion.ddim_invert(
        counted, x0, cond, null, scale=scale, timesteps=grid, keep={250, 750}, known=known
    ):
        torch.testing.assert_close(x_t, want[t])
        known[t] = gaussian.eps(x_t, t, cond)
    spared = {1: [(3, 0), (3, 500)], 7.5: [(6, 0), (3, 250), (6, 500)]}
    assert [(n, t) for n, t, _ in counted.calls] == spared[scale]
