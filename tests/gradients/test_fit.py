"""Whether a caption fits its picture: exact on Gaussian data, whose likelihoods are known."""

import numpy as np
import pytest
import torch

from concept_trak.gradients.caption_fit import (
    LEVELS,
    MIDDLE,
    caption_llr,
    fit_weight,
    low_fit_warning,
)
from concept_trak.models.condition import Condition


def told(*values):
    """Conditions that shift the Gaussian's mean by these values."""
    return Condition(torch.tensor(values).view(-1, 1, 1).expand(-1, 2, 3).contiguous())


def test_a_picture_of_what_its_caption_says_is_explained_by_it_and_another_is_not(gaussian):
    g = torch.Generator().manual_seed(0)
    shift = torch.tensor([1.0, 1.0, -1.0, -1.0])
    noise = 0.5 * torch.randn(4, *gaussian.latent_shape, generator=g)
    x0 = gaussian.mean + shift.view(-1, 1, 1, 1) + noise
    honest = caption_llr(gaussian, x0, told(1.0, 1.0, -1.0, -1.0), told(0.0))
    lying = caption_llr(gaussian, x0, told(-1.0, -1.0, 1.0, 1.0), told(0.0))
    assert (honest > 0).all() and (lying < 0).all()


def test_it_is_the_difference_of_denoising_losses(gaussian):
    """By hand, for one level and noise at a time."""
    from concept_trak.gradients.caption_fit import NOISES, SEED
    from concept_trak.gradients.states import draw_noise
    from concept_trak.models.ddim import q_sample

    x0, plus, null = torch.full((1, *gaussian.latent_shape), 0.7), told(0.5), told(0.0)
    wanted = 0.0
    for t in LEVELS:
        for eps in draw_noise(SEED, range(NOISES), t, gaussian.latent_shape):
            x_t = q_sample(x0, eps[None], gaussian.schedule.level(t))
            losses = [((gaussian.eps(x_t, t, c) - eps) ** 2).mean() for c in (null, plus)]
            level = gaussian.schedule.level(t)
            scale = level.sigma / level.alpha / (NOISES * len(LEVELS))
            wanted += float((losses[0] - losses[1]) * scale)
    assert float(caption_llr(gaussian, x0, plus, null)) == pytest.approx(wanted, rel=1e-4)


def test_it_does_not_depend_on_the_batch(tiny_denoiser):
    g = torch.Generator().manual_seed(0)
    x0, null = torch.randn(5, 2, 4, 4, generator=g), Condition(torch.randn(1, 5, 6, generator=g))
    cond = Condition(torch.randn(5, 5, 6, generator=g))
    whole = caption_llr(tiny_denoiser, x0, cond, null)
    single = [caption_llr(tiny_denoiser, x0[i : i + 1], cond[i : i + 1], null) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(single), rtol=1e-4, atol=1e-6)


def test_the_weight_is_one_for_most_zero_half_way_and_negative_below():
    among = np.array([0.9, 1.0, 1.0, 1.1, -0.2]) * 3e-3
    middle, typical = MIDDLE * 3e-3, 3e-3
    weights = fit_weight(np.array([typical, middle, 0.0, -typical]), among)
    assert weights[0] > 0.95 and weights[1] == pytest.approx(0) and (weights[2:] < -0.9).all()


def test_the_weight_knows_no_unit_and_not_how_many_lie():
    rng = np.random.default_rng(0)
    honest, lies = rng.normal(1, 0.1, 1000), rng.normal(0, 0.1, 300)
    few, many = np.concatenate([honest, lies[:10]]), np.concatenate([honest, lies])
    np.testing.assert_allclose(fit_weight(few, few), fit_weight(1e-4 * few, 1e-4 * few))
    for among in (few, many):
        assert (fit_weight(honest, among) > 0.3).all() and (fit_weight(lies, among) < -0.3).all()


def test_captions_that_change_nothing_leave_all_rows_as_they_are():
    assert (fit_weight(np.zeros(4), np.zeros(4)) == 1).all()


def test_a_model_that_doubts_too_many_captions_is_doubted_itself():
    fit = np.ones(12)
    fit[:2] = MIDDLE - 0.1  # a sixth: as many wrong captions as one may have
    assert low_fit_warning(fit) == []
    fit[2] = -1.0
    (said,) = low_fit_warning(fit)
    assert said.startswith("in the eyes of the model 25%") and "F=contrast" in said
