"""Train rows: their states, norms, sums, projections, and whether a copy of the query is found."""

import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.models import ddim as diffusion
from concept_trak.rows import featurize, query
from concept_trak.rows.featurize import featurize as rows_of
from concept_trak.rows.objectives import TRAIN_OBJECTIVES
from concept_trak.rows.projection import make_projection
from concept_trak.rows.vjp import PerSampleVjp, dense, module_layout
from concept_trak.scoring import fisher
from concept_trak.scoring.scores import scores
from concept_trak.store.shards import Store

STATES = {"noised": featurize.noised_states(4), "inverted": featurize.inverted_states(4, 2.0)}


def batch(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 2, 4, 4, generator=g),
        torch.randn(n, 5, 6, generator=g),
        torch.randn(1, 5, 6, generator=g),
    )


def projection_for(denoiser, kind="identity", dim=0):
    return make_projection(kind, PerSampleVjp(denoiser.network, "attn2").input_dim, dim, 0)


def rows(
    denoiser,
    x0,
    cond,
    null,
    objective="presence",
    states=STATES["noised"],
    projection=None,
    normalize=True,
):
    return rows_of(
        denoiser,
        projection or projection_for(denoiser),
        x0,
        cond,
        null,
        layer="attn2",
        objective=objective,
        states=states,
        normalize=normalize,
    )


def test_reference_grid_is_99_to_899():
    states = featurize.reference_states(10, 7.5)
    assert (
        states.timesteps == tuple(range(99, 900, 100))
        and states.inversion
        and states.guidance_scale == 7.5
    )
    assert states.inversion_grid[:3] == (0, 19, 39) and states.inversion_grid[-2:] == (979, 999)


@pytest.mark.parametrize("nfe", [2, 3, 4, 7, 10, 11, 33])
def test_nfe_is_honoured(nfe, tiny_denoiser):
    levels = {
        "noised": featurize.noised_states(nfe).timesteps,
        "inverted": featurize.inverted_states(nfe, 1.0).timesteps,
        "reference": featurize.reference_states(nfe, 7.5).timesteps,
        "trajectory": query.trajectory_timesteps(nfe, 50),
    }
    for kind, timesteps in levels.items():
        assert len(set(timesteps)) == len(timesteps) == nfe - 1, kind
        assert all(0 < t < 1000 for t in timesteps), kind
        assert nfe == 2 or (min(timesteps) <= 100 and max(timesteps) >= 881), (
            kind
        )  # the ends of the range, however few the states


def test_noised_levels_are_the_references_for_ten():
    assert featurize.noised_states(10).timesteps == tuple(range(100, 901, 100))
    assert featurize.inverted_states(10, 1.0).timesteps == tuple(range(99, 900, 100))


def test_nfe_beyond_the_grid_is_refused():
    with pytest.raises(UserError, match="NFE=50"):
        featurize.reference_states(50, 7.5)
    with pytest.raises(UserError, match="GEN_NUM_INFERENCE_STEPS"):
        query.trajectory_timesteps(11, 10)


@pytest.mark.parametrize("kind", STATES)
def test_noise_belongs_to_its_own_state(kind, tiny_denoiser):
    x0, cond, null = batch()
    seen = list(featurize.states_of(tiny_denoiser, x0, cond, null.expand_as(cond), STATES[kind]))
    assert [t for t, _, _ in seen] == list(STATES[kind].timesteps)
    for t, x_t, eps in seen:
        torch.testing.assert_close(
            diffusion.q_sample(x0, eps, float(tiny_denoiser.alpha_bar[t])),
            x_t,
            rtol=1e-4,
            atol=1e-5,
        )


def test_noise_of_a_level_is_the_same_for_every_sample_and_differs_between_levels():
    x0 = batch()[0]
    noise = {t: featurize.state_noise(STATES["noised"], t, x0) for t in (250, 500)}
    assert torch.equal(noise[250][0], noise[250][4]) and not torch.equal(noise[250], noise[500])


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("objective", TRAIN_OBJECTIVES)
def test_batch_size_invariance(objective, kind, tiny_denoiser):
    x0, cond, null = batch()
    whole, losses = rows(tiny_denoiser, x0, cond, null, objective, STATES[kind])
    singles = [
        rows(tiny_denoiser, x0[i : i + 1], cond[i : i + 1], null, objective, STATES[kind])
        for i in range(5)
    ]
    torch.testing.assert_close(whole, torch.cat([r for r, _ in singles]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        losses, torch.cat([loss for _, loss in singles]), rtol=1e-4, atol=1e-5
    )


def test_a_row_is_the_sum_of_the_unit_normed_gradients_of_its_states(tiny_denoiser):
    x0, cond, null = batch()
    want = 0
    with PerSampleVjp(tiny_denoiser.network, "attn2") as tape:
        for t, x_t, eps in featurize.states_of(tiny_denoiser, x0, cond, null, STATES["noised"]):
            eps_hat = tiny_denoiser.eps(x_t, t, cond)
            g = dense(tape.vjp(eps_hat, eps_hat.detach() - eps))
            want = want + g / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        rows(tiny_denoiser, x0, cond, null, "dsm")[0], want, rtol=1e-4, atol=1e-5
    )


def test_one_state_gives_a_row_of_norm_one_or_of_the_gradients_own_norm(tiny_denoiser):
    x0, cond, null = batch()
    one = featurize.noised_states(2)
    unit, plain = (
        rows(tiny_denoiser, x0, cond, null, "dsm", one, normalize=n)[0] for n in (True, False)
    )
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
    assert (plain.norm(dim=1) - 1).abs().min() > 1e-3


def test_a_caption_equal_to_the_empty_one_has_a_zero_row_and_no_nan(tiny_denoiser):
    x0, _, null = batch()
    assert torch.equal(
        rows(tiny_denoiser, x0[:1], null, null)[0],
        torch.zeros(1, projection_for(tiny_denoiser).proj_dim),
    )


def test_a_contrast_row_is_the_gradient_of_the_whole_squared_contrast(tiny_denoiser):
    """Of -1/2 ||eps(c) - eps(null)||^2 by autograd, which holds nothing fixed."""
    x0, cond, null = batch(3)
    got = rows(
        tiny_denoiser, x0, cond, null, "contrast", featurize.noised_states(2), normalize=False
    )[0]
    x_t = next(featurize.states_of(tiny_denoiser, x0, cond, null, featurize.noised_states(2)))[1]
    chosen = list(PerSampleVjp(tiny_denoiser.network, "attn2").parameters.values())
    for i, row in enumerate(got):
        loss = (
            -0.5
            * (
                tiny_denoiser.eps(x_t[i : i + 1], 500, cond[i : i + 1])
                - tiny_denoiser.eps(x_t[i : i + 1], 500, null)
            )
            .square()
            .sum()
        )
        want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-6)


def test_a_state_of_blocks_has_unit_norm_in_each(tiny_denoiser):
    x0, cond, null = batch()
    parameters = PerSampleVjp(tiny_denoiser.network, "attn2").parameters
    projection = make_projection(
        "identity",
        sum(p.numel() for p in parameters.values()),
        0,
        0,
        layout=module_layout(parameters),
        separate=True,
    )
    found = rows(tiny_denoiser, x0, cond, null, "contrast", featurize.noised_states(2), projection)[
        0
    ]
    norms = torch.stack([part.norm(dim=1) for part in found.split(projection.widths, 1)])
    assert len(norms) == len({name.rpartition(".")[0] for name in parameters})
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", ["random_mask", "sjlt", "rademacher"])
def test_projecting_state_by_state_equals_projecting_the_dense_row(kind, tiny_denoiser):
    x0, cond, null = batch()
    projection = projection_for(tiny_denoiser, kind, 64)
    want = projection.project(rows(tiny_denoiser, x0, cond, null)[0])
    torch.testing.assert_close(
        rows(tiny_denoiser, x0, cond, null, projection=projection)[0], want, rtol=1e-4, atol=1e-5
    )


def test_losses_are_the_noise_errors_summed_over_the_states(tiny_denoiser):
    x0, cond, null = batch()
    with torch.no_grad():
        want = sum(
            (tiny_denoiser.eps(x_t, t, cond) - eps).square().flatten(1).mean(1)
            for t, x_t, eps in featurize.states_of(tiny_denoiser, x0, cond, null, STATES["noised"])
        )
    torch.testing.assert_close(rows(tiny_denoiser, x0, cond, null)[1], want, rtol=1e-5, atol=1e-6)


def test_an_unknown_objective_is_refused(tiny_denoiser):
    with pytest.raises(UserError, match="presence"):
        rows(tiny_denoiser, *batch(), objective="nonsense")


def store_of(values, folder):
    """A finished store of rows [N, k]."""
    store = Store.create(folder, *values.shape, 2, "float32", {}, provenance={})
    for shard in store.pending():
        start, stop = store.shard_range(shard)
        store.append(shard, values[start:stop].numpy(), start)
        store.finish(shard)
    return store


def scores_of(store, asked):
    """[D, N] at three dampings."""
    return scores(
        store, fisher.precondition(store, asked.numpy(), [1e-2, 0.1, 10.0], 2**28), max_memory=2**28
    )[:, 0]


@pytest.mark.parametrize("objective", TRAIN_OBJECTIVES)
def test_copy_of_query_ranks_first_for_every_method(objective, tiny_denoiser, tmp_path):
    """The query's picture, given alone, against a train set that holds it among twenty others, at
    the fixed damping.
    """
    x0, cond, null = batch(21)
    projection = projection_for(tiny_denoiser, "sjlt", 256)
    store = store_of(
        rows(tiny_denoiser, x0, cond, null, objective, projection=projection)[0], tmp_path / "store"
    )
    for i in (0, 13):
        asked = rows(
            tiny_denoiser, x0[i : i + 1], cond[i : i + 1], null, objective, projection=projection
        )[0]
        values = scores_of(store, asked)
        assert (values.argmax(1) == i).all()
        assert (values[:, i] > 0).all()


@pytest.mark.parametrize("objective", ["presence", "contrast"])
def test_copy_of_a_concept_query_ranks_first_among_rows_of_the_same_reward(
    objective, tiny_denoiser, tmp_path
):
    """A slider query against the empty prompt, read at a picture's own noised states, finds that
    picture.
    """
    x0, cond, null = batch(21)
    projection = projection_for(tiny_denoiser, "sjlt", 256)
    train = rows(tiny_denoiser, x0, cond, null, objective, projection=projection)[0]
    read = featurize.states_of(tiny_denoiser, x0[7:8], cond[7:8], null, STATES["noised"])
    asked = query.concept_gradient(
        tiny_denoiser,
        projection,
        read,
        cond[7:8],
        null,
        layer="attn2",
        normalize=True,
        two_sided=objective == "contrast",
    )
    assert (scores_of(store_of(train, tmp_path / "store"), asked).argmax(1) == 7).all()
