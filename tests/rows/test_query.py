"""Query states: latent and timestep paired, one noise a draw whatever the batch; query gradients as
averages over them.
"""

import dataclasses

import pytest
import torch

from concept_trak.attribution.attribute import query_states
from concept_trak.attribution.train_grad import train_states
from concept_trak.models import ddim as diffusion
from concept_trak.rows import featurize, query
from concept_trak.rows.projection import make_projection
from concept_trak.rows.query import QueryStates
from concept_trak.rows.vjp import PerSampleVjp
from concept_trak.settings import resolve
from concept_trak.workshop.embedded.pipeline import build_scheduler

SEED_SCOPE = QueryStates(
    "seed", 5, query.trajectory_timesteps(5, 10), num_steps=10, guidance_scale=2.0, eta=0.5
)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, 2, 4, 4, generator=g),
        torch.randn(1, 5, 6, generator=g),
        torch.randn(1, 5, 6, generator=g),
    )


def read(denoiser, states, batch_size=8, **start):
    """{t: x_t of all draws} and {t: eps}."""
    _, cond, null = inputs()
    latents, noises = {}, {}
    for t, x_t, eps in query.read_states(
        denoiser, states, cond, null, batch_size=batch_size, **start
    ):
        latents.setdefault(t, []).append(x_t)
        noises.setdefault(t, []).append(eps)
    return {t: torch.cat(x) for t, x in latents.items()}, noises


def test_trajectory_levels_are_881_to_81_for_the_reference_sampler():
    assert query.trajectory_timesteps(10, 50) == tuple(range(881, 80, -100))


def test_noisings_of_the_query_are_read_at_the_levels_of_the_train_rows():
    settings = resolve("emoji", {})
    assert settings.scope == "local" and query_states(settings).timesteps == train_states(
        settings
    ).timesteps == (100, 900)


@pytest.mark.parametrize("draw", [0, 3])
def test_query_states_are_paired_with_their_timesteps(draw, tiny_denoiser):
    """diffusers' own sampler, stopped at t, is at the state that we read at t."""
    x_T, cond, null = inputs()
    states, _ = read(tiny_denoiser, SEED_SCOPE, x_T=x_T)
    scheduler, x_t = build_scheduler(), x_T
    scheduler.set_timesteps(10)
    seen = 0
    for t in scheduler.timesteps.tolist():
        if t in states:
            torch.testing.assert_close(states[t][draw : draw + 1], x_t, rtol=1e-3, atol=1e-4)
            seen += 1
        with torch.no_grad():
            eps_hat = tiny_denoiser.eps(x_t, t, null) + 2.0 * (
                tiny_denoiser.eps(x_t, t, cond) - tiny_denoiser.eps(x_t, t, null)
            )
        noise = query.draw_noise(SEED_SCOPE.seed, range(draw, draw + 1), t, x_T.shape[1:])
        x_t = scheduler.step(eps_hat, t, x_t, eta=0.5, variance_noise=noise).prev_sample
    assert seen == len(SEED_SCOPE.timesteps) == 4


@pytest.mark.parametrize("scope", ["seed", "global", "local"])
def test_noise_of_a_draw_does_not_depend_on_the_batch_size_or_the_number_of_draws(
    scope, tiny_denoiser
):
    start = {"x0" if scope == "local" else "x_T": inputs()[0]} if scope != "global" else {}
    states = dataclasses.replace(SEED_SCOPE, scope=scope)
    whole, _ = read(tiny_denoiser, states, 8, **start)
    for batch_size in (1, 2):
        split, _ = read(tiny_denoiser, states, batch_size, **start)
        for t in whole:
            torch.testing.assert_close(split[t], whole[t], rtol=1e-3, atol=1e-4)
    fewer, _ = read(tiny_denoiser, dataclasses.replace(states, num_draws=2), 8, **start)
    for t in whole:
        torch.testing.assert_close(fewer[t], whole[t][:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["seed", "global", "local"])
def test_draws_differ_from_each_other(scope, tiny_denoiser):
    start = {"x0" if scope == "local" else "x_T": inputs()[0]} if scope != "global" else {}
    for x_t in read(tiny_denoiser, dataclasses.replace(SEED_SCOPE, scope=scope), **start)[
        0
    ].values():
        assert torch.pdist(x_t.flatten(1)).min() > 1e-3


def test_scope_seed_starts_every_draw_at_the_given_noise_and_scope_global_does_not(tiny_denoiser):
    x_T = inputs()[0]
    first = QueryStates("seed", 3, (901, 801), num_steps=10, eta=0.1)
    assert torch.equal(read(tiny_denoiser, first, x_T=x_T)[0][901], x_T.expand(3, -1, -1, -1))
    assert (
        torch.pdist(
            read(tiny_denoiser, dataclasses.replace(first, scope="global"))[0][901].flatten(1)
        ).min()
        > 1
    )


def test_local_states_are_noisings_of_the_picture_with_their_own_noise(tiny_denoiser):
    x0 = inputs()[0]
    latents, noises = read(
        tiny_denoiser, dataclasses.replace(SEED_SCOPE, scope="local", timesteps=(100, 700)), x0=x0
    )
    for t, x_t in latents.items():
        want = diffusion.q_sample(x0, torch.cat(noises[t]), float(tiny_denoiser.alpha_bar[t]))
        torch.testing.assert_close(x_t, want)


def test_local_scope_by_inversion_reads_the_states_of_a_train_picture(tiny_denoiser):
    x0, cond, null = inputs()
    inversion = featurize.inverted_states(4, 1.0)
    latents, _ = read(
        tiny_denoiser, dataclasses.replace(SEED_SCOPE, scope="local", inversion=inversion), x0=x0
    )
    for t, x_t, _ in featurize.states_of(tiny_denoiser, x0, cond, null, inversion):
        torch.testing.assert_close(latents[t], x_t)


def gradient(denoiser, batch_size, states=SEED_SCOPE):
    x_T, cond, null = inputs()
    projection = make_projection("sjlt", PerSampleVjp(denoiser.network, "attn2").input_dim, 64, 0)
    seen = query.read_states(denoiser, states, cond, null, x_T=x_T, batch_size=batch_size)
    return query.concept_gradient(
        denoiser, projection, seen, cond, inputs(seed=1)[1], layer="attn2", normalize=True
    )


def test_a_concept_gradient_does_not_depend_on_the_batch_size(tiny_denoiser):
    torch.testing.assert_close(
        gradient(tiny_denoiser, 8), gradient(tiny_denoiser, 2), rtol=1e-3, atol=1e-5
    )


def test_a_concept_gradient_is_the_average_of_those_of_its_states(tiny_denoiser):
    x_T, cond, null = inputs()
    negative = inputs(seed=1)[1]
    projection = make_projection(
        "sjlt", PerSampleVjp(tiny_denoiser.network, "attn2").input_dim, 64, 0
    )
    seen = list(query.read_states(tiny_denoiser, SEED_SCOPE, cond, null, x_T=x_T))
    parts = [
        query.concept_gradient(
            tiny_denoiser,
            projection,
            [(t, x_t[d : d + 1], None)],
            cond,
            negative,
            layer="attn2",
            normalize=True,
        )
        for t, x_t, _ in seen
        for d in range(SEED_SCOPE.num_draws)
    ]
    torch.testing.assert_close(
        gradient(tiny_denoiser, 8), torch.stack(parts).mean(0), rtol=1e-3, atol=1e-5
    )


def test_swapping_the_prompts_of_a_slider_turns_its_cotangent_around(tiny_denoiser):
    """At one state J differs between the two prompts, so only the direction is compared."""
    x_T, cond, negative = inputs()
    projection = make_projection(
        "identity", PerSampleVjp(tiny_denoiser.network, "attn2").input_dim, 0, 0
    )
    one, two = (
        query.concept_gradient(
            tiny_denoiser, projection, [(500, x_T, None)], a, b, layer="attn2", normalize=True
        )
        for a, b in ((cond, negative), (negative, cond))
    )
    assert (one * two).sum() < 0


@pytest.mark.parametrize("objective", ["dsm", "dtrak", "das"])
def test_image_gradient_at_a_train_pictures_states_is_its_train_row(objective, tiny_denoiser):
    x0, cond, null = inputs()
    states = featurize.noised_states(4)
    projection = make_projection(
        "sjlt", PerSampleVjp(tiny_denoiser.network, "attn2").input_dim, 64, 0
    )
    seen = featurize.states_of(tiny_denoiser, x0, cond, null, states)
    asked = query.image_gradient(
        tiny_denoiser, projection, seen, cond, objective, layer="attn2", normalize=True
    )
    row, _ = featurize.featurize(
        tiny_denoiser,
        projection,
        x0,
        cond,
        null,
        layer="attn2",
        objective=objective,
        states=states,
        normalize=True,
    )
    torch.testing.assert_close(asked * 3, row, rtol=1e-4, atol=1e-5)
