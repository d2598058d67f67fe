"""Query states: latent and timestep paired, one noise a draw whatever the batch; and the rows
that are averages over them.
"""

import dataclasses

import pytest
import torch

from concept_trak.attribution.naming import query_timesteps, train_timesteps
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import presence
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.state import State, rebatch
from concept_trak.gradients.states import (
    QueryStart,
    QueryTimesteps,
    draw_noise,
    inversion_schedule,
    noising_schedule,
    query_states_of,
    train_states_of,
    trajectory_timesteps,
)
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import q_sample
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import resolve
from experiments.emoji.model.pipeline import build_scheduler

SEED_SCOPE = QueryTimesteps(
    "seed", 5, trajectory_timesteps(5, 10), num_steps=10, guidance_scale=2.0, eta=0.5
)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, *conds = (torch.randn(1, *shape, generator=g) for shape in ((2, 4, 4), (5, 6), (5, 6)))
    return x, *(Condition(c) for c in conds)


def read(denoiser, states, start, batch_size=8):
    """{t: x_t of all draws} and {t: eps}."""
    _, *conds = inputs()
    latents, noises = {}, {}
    for state in query_states_of(denoiser, states, start, *conds, batch_size):
        latents.setdefault(state.t, []).append(state.x_t)
        noises.setdefault(state.t, []).append(state.eps)
    return {t: torch.cat(x) for t, x in latents.items()}, noises


def start_of(scope):
    x = inputs()[0]
    return {"seed": QueryStart(x_T=x), "global": QueryStart(), "local": QueryStart(x0=x)}[scope]


def test_trajectory_levels_are_881_to_81_for_the_reference_sampler():
    assert trajectory_timesteps(10, 50) == tuple(range(881, 80, -100))


def test_noisings_of_the_query_are_read_at_the_levels_of_the_train_rows():
    settings = resolve("emoji", {})
    levels = query_timesteps(settings).timesteps
    assert settings.scope == "local" and levels == train_timesteps(settings).timesteps == (100, 900)


@pytest.mark.parametrize("draw", [0, 3])
def test_query_states_are_paired_with_their_timesteps(draw, tiny_denoiser):
    """diffusers' own sampler, stopped at t, is at the state that we read at t."""
    x_T, cond, null = inputs()
    states, _ = read(tiny_denoiser, SEED_SCOPE, QueryStart(x_T=x_T))
    scheduler, x_t = build_scheduler(), x_T
    scheduler.set_timesteps(10)
    seen = 0
    for t in scheduler.timesteps.tolist():
        if t in states:
            torch.testing.assert_close(states[t][draw : draw + 1], x_t, rtol=1e-3, atol=1e-4)
            seen += 1
        with torch.no_grad():
            without, with_cond = (tiny_denoiser.eps(x_t, t, c) for c in (null, cond))
        eps_hat = without + 2.0 * (with_cond - without)
        noise = draw_noise(SEED_SCOPE.seed, range(draw, draw + 1), t, x_T.shape[1:])
        x_t = scheduler.step(eps_hat, t, x_t, eta=0.5, variance_noise=noise).prev_sample
    assert seen == len(SEED_SCOPE.timesteps) == 4


@pytest.mark.parametrize("scope", ["seed", "global", "local"])
def test_noise_of_a_draw_depends_on_neither_batch_size_nor_number_of_draws(scope, tiny_denoiser):
    start, states = start_of(scope), dataclasses.replace(SEED_SCOPE, scope=scope)
    whole, _ = read(tiny_denoiser, states, start)
    for batch_size in (1, 2):
        split, _ = read(tiny_denoiser, states, start, batch_size)
        for t in whole:
            torch.testing.assert_close(split[t], whole[t], rtol=1e-3, atol=1e-4)
    fewer, _ = read(tiny_denoiser, dataclasses.replace(states, num_draws=2), start)
    for t in whole:
        torch.testing.assert_close(fewer[t], whole[t][:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["seed", "global", "local"])
def test_draws_differ_from_each_other(scope, tiny_denoiser):
    states = dataclasses.replace(SEED_SCOPE, scope=scope)
    for x_t in read(tiny_denoiser, states, start_of(scope))[0].values():
        assert torch.pdist(x_t.flatten(1)).min() > 1e-3


def test_scope_seed_starts_every_draw_at_the_given_noise_and_scope_global_does_not(tiny_denoiser):
    x_T = inputs()[0]
    first = QueryTimesteps("seed", 3, (901, 801), num_steps=10, eta=0.1)
    begun = read(tiny_denoiser, first, QueryStart(x_T=x_T))[0][901]
    assert torch.equal(begun, x_T.expand(3, -1, -1, -1))
    fresh = read(tiny_denoiser, dataclasses.replace(first, scope="global"), QueryStart())[0][901]
    assert torch.pdist(fresh.flatten(1)).min() > 1


def test_local_states_are_noisings_of_the_picture_with_their_own_noise(tiny_denoiser):
    x0 = inputs()[0]
    states = dataclasses.replace(SEED_SCOPE, scope="local", timesteps=(100, 700))
    latents, noises = read(tiny_denoiser, states, QueryStart(x0=x0))
    for t, x_t in latents.items():
        want = q_sample(x0, torch.cat(noises[t]), tiny_denoiser.schedule.level(t))
        torch.testing.assert_close(x_t, want)


def test_local_scope_by_inversion_reads_the_states_of_a_train_picture(tiny_denoiser):
    x0, cond, null = inputs()
    inversion = inversion_schedule(4, 1.0)
    states = dataclasses.replace(SEED_SCOPE, scope="local", inversion=inversion)
    latents, _ = read(tiny_denoiser, states, QueryStart(x0=x0))
    for state in train_states_of(tiny_denoiser, x0, cond, null, inversion):
        torch.testing.assert_close(latents[state.t], state.x_t)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_regrouping_keeps_every_sample_with_its_level_noise_and_conditions(
    batch_size, tiny_denoiser
):
    x0, cond, null = inputs()
    states = dataclasses.replace(SEED_SCOPE, scope="local", timesteps=(100, 700))
    whole = list(query_states_of(tiny_denoiser, states, QueryStart(x0=x0), cond, null, 2))
    parts = list(rebatch(whole, batch_size))
    assert all(len(p) == batch_size for p in parts[:-1]) and len(parts[-1]) <= batch_size
    assert torch.cat([p.t for p in parts]).tolist() == [s.t for s in whole for _ in range(len(s))]
    for name in ("x_t", "eps", "x0"):
        together = (torch.cat([getattr(s, name) for s in group]) for group in (parts, whole))
        assert torch.equal(*together)
    assert all(torch.equal(p.cond.embeddings, cond.expand(len(p)).embeddings) for p in parts)


def maker_of(denoiser, kind="sjlt", dim=64):
    count = PerSampleVjp(denoiser.network, "attn2").input_dim
    return GradientComputer(denoiser, make_projection(kind, count, dim, 0), "attn2", True)


def gradient(denoiser, batch_size):
    x_T, cond, null = inputs()
    minus = inputs(seed=1)[1]
    seen = query_states_of(denoiser, SEED_SCOPE, QueryStart(x_T=x_T), cond, null, batch_size)
    asked = (s.contrasting(cond, minus) for s in rebatch(seen, batch_size))
    return maker_of(denoiser).mean_row(asked, presence)


def test_a_concept_gradient_does_not_depend_on_the_batch_size(tiny_denoiser):
    eight, two = (gradient(tiny_denoiser, n) for n in (8, 2))
    torch.testing.assert_close(eight, two, rtol=1e-3, atol=1e-5)


def test_a_concept_gradient_is_the_average_of_those_of_its_states(tiny_denoiser):
    x_T, cond, null = inputs()
    minus, maker = inputs(seed=1)[1], maker_of(tiny_denoiser)
    parts = [
        maker.mean_row([State(s.t, s.x_t[d : d + 1], cond, minus)], presence)
        for s in query_states_of(tiny_denoiser, SEED_SCOPE, QueryStart(x_T=x_T), cond, null)
        for d in range(SEED_SCOPE.num_draws)
    ]
    want = torch.stack(parts).mean(0)
    torch.testing.assert_close(gradient(tiny_denoiser, 8), want, rtol=1e-3, atol=1e-5)


def test_swapping_the_prompts_of_a_slider_turns_its_cotangent_around(tiny_denoiser):
    """At one state J differs between the two prompts, so only the direction is compared."""
    x_T, cond, minus = inputs()
    maker = maker_of(tiny_denoiser, "identity", 0)
    one, two = (
        maker.mean_row([State(500, x_T, *pair)], presence)
        for pair in ((cond, minus), (minus, cond))
    )
    assert (one * two).sum() < 0


@pytest.mark.parametrize("objective", ["dsm", "dtrak", "das", "dps"])
def test_a_whole_picture_query_at_a_train_pictures_states_is_its_train_row(
    objective, tiny_denoiser
):
    maker, cotangent = maker_of(tiny_denoiser), OBJECTIVES.get(objective).cotangent
    seen = list(train_states_of(tiny_denoiser, *inputs(), noising_schedule(4)))
    asked = maker.mean_row(rebatch(seen, 2), cotangent)
    row = maker.rows(seen, cotangent, 1).values
    torch.testing.assert_close(asked * 3, row, rtol=1e-4, atol=1e-5)
