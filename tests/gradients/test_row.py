"""Rows: their states, norms, sums, projections, and whether a copy of the query is found."""

import math

import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.gradients import states as row_states
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import concept_cotangent
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.sample_grads import dense, module_layout
from concept_trak.gradients.state import rebatch
from concept_trak.gradients.states import train_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import q_sample
from concept_trak.registry import OBJECTIVES
from concept_trak.scoring.fisher import FullFisher
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.scores import precondition_and_score
from concept_trak.store.manifest import Layout
from concept_trak.store.store import Store

STATES = {
    "noised": row_states.noising_schedule(4),
    "inverted": row_states.inversion_schedule(4, 2.0),
}
NAMES = ("contrast", "presence", "dps", "dsm", "dtrak", "das", "das_mean")


def batch(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 2, 4, 4, generator=g)
    conds = torch.randn(n, 5, 6, generator=g), torch.randn(1, 5, 6, generator=g)
    return x0, *(Condition(c) for c in conds)


def one(x0, cond, i):
    """Picture i alone."""
    return x0[i : i + 1], cond[i : i + 1]


def projection_for(denoiser, kind="identity", dim=0):
    return make_projection(kind, PerSampleVjp(denoiser.network, "attn2").input_dim, dim, 0)


def rows(denoiser, inputs, objective="presence", states=STATES["noised"], **options):
    """Rows of (x0, cond, cond_null)."""
    x0, *_ = inputs
    projection = options.get("projection") or projection_for(denoiser)
    maker = GradientComputer(denoiser, projection, "attn2", options.get("normalize", True))
    seen = train_states_of(denoiser, *inputs, states)
    return maker.rows(seen, OBJECTIVES.get(objective).cotangent, len(x0))


def test_reference_grid_is_99_to_899():
    states = row_states.reference_states(10, 7.5)
    assert (
        states.timesteps == tuple(range(99, 900, 100))
        and states.inversion
        and states.guidance_scale == 7.5
    )
    assert states.inversion_grid[:3] == (0, 19, 39) and states.inversion_grid[-2:] == (979, 999)


@pytest.mark.parametrize("nfe", [2, 3, 4, 7, 10, 11, 33])
def test_nfe_is_honoured(nfe, tiny_denoiser):
    levels = {
        "noised": row_states.noising_schedule(nfe).timesteps,
        "inverted": row_states.inversion_schedule(nfe, 1.0).timesteps,
        "reference": row_states.reference_states(nfe, 7.5).timesteps,
        "trajectory": row_states.trajectory_timesteps(nfe, 50),
    }
    for kind, timesteps in levels.items():
        assert len(set(timesteps)) == len(timesteps) == nfe - 1, kind
        assert all(0 < t < 1000 for t in timesteps), kind
        assert nfe == 2 or (min(timesteps) <= 100 and max(timesteps) >= 881), (
            kind
        )  # the ends of the range, however few the states


def test_noised_levels_are_the_references_for_ten():
    assert row_states.noising_schedule(10).timesteps == tuple(range(100, 901, 100))
    assert row_states.inversion_schedule(10, 1.0).timesteps == tuple(range(99, 900, 100))


def test_nfe_beyond_the_grid_is_refused():
    with pytest.raises(UserError, match="NFE=50"):
        row_states.reference_states(50, 7.5)
    with pytest.raises(UserError, match="GEN_NUM_INFERENCE_STEPS"):
        row_states.trajectory_timesteps(11, 10)


@pytest.mark.parametrize("kind", STATES)
def test_noise_belongs_to_its_own_state(kind, tiny_denoiser):
    x0, *conds = batch()
    seen = list(train_states_of(tiny_denoiser, x0, *conds, STATES[kind]))
    assert [state.t for state in seen] == list(STATES[kind].timesteps)
    for state in seen:
        again = q_sample(x0, state.eps, tiny_denoiser.schedule.level(state.t))
        torch.testing.assert_close(again, state.x_t, rtol=1e-4, atol=1e-5)


def test_noise_of_a_level_is_the_same_for_every_sample_and_differs_between_levels():
    x0 = batch()[0]
    noise = {t: row_states.state_noise(STATES["noised"], t, x0) for t in (250, 500)}
    assert torch.equal(noise[250][0], noise[250][4]) and not torch.equal(noise[250], noise[500])


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("objective", NAMES)
def test_batch_size_invariance(objective, kind, tiny_denoiser):
    x0, cond, null = batch()
    whole = rows(tiny_denoiser, (x0, cond, null), objective, STATES[kind])
    singles = [
        rows(tiny_denoiser, (*one(x0, cond, i), null), objective, STATES[kind]) for i in range(5)
    ]
    values, losses = (torch.cat([getattr(r, n) for r in singles]) for n in ("values", "losses"))
    torch.testing.assert_close(whole.values, values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.losses, losses, rtol=1e-4, atol=1e-5)


def test_a_row_is_the_sum_of_the_unit_normed_gradients_of_its_states(tiny_denoiser):
    inputs, want = batch(), 0
    with PerSampleVjp(tiny_denoiser.network, "attn2") as tape:
        for state in train_states_of(tiny_denoiser, *inputs, STATES["noised"]):
            eps_hat = tiny_denoiser.eps(state.x_t, state.t, state.cond)
            g = dense(tape.vjp(eps_hat, eps_hat.detach() - state.eps))
            want = want + g / g.norm(dim=1, keepdim=True)
    got = rows(tiny_denoiser, inputs, "dsm").values
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_state_gives_a_row_of_norm_one_or_of_the_gradients_own_norm(tiny_denoiser):
    inputs, single = batch(), row_states.noising_schedule(2)
    unit, plain = (
        rows(tiny_denoiser, inputs, "dsm", single, normalize=n).values for n in (True, False)
    )
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
    assert (plain.norm(dim=1) - 1).abs().min() > 1e-3


def test_a_caption_equal_to_the_empty_one_has_a_zero_row_and_no_nan(tiny_denoiser):
    x0, _, null = batch()
    got = rows(tiny_denoiser, (x0[:1], null, null)).values
    assert torch.equal(got, torch.zeros_like(got))


def test_a_state_of_blocks_has_unit_norm_in_each(tiny_denoiser):
    parameters = PerSampleVjp(tiny_denoiser.network, "attn2").parameters
    count, layout = sum(p.numel() for p in parameters.values()), module_layout(parameters)
    projection = make_projection("identity", count, 0, 0, layout=layout, separate=True)
    single = row_states.noising_schedule(2)
    found = rows(tiny_denoiser, batch(), "contrast", single, projection=projection).values
    norms = torch.stack([part.norm(dim=1) for part in found.split(projection.widths, 1)])
    assert len(norms) == len({name.rpartition(".")[0] for name in parameters})
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", ["random_mask", "sjlt", "rademacher"])
def test_projecting_state_by_state_equals_projecting_the_dense_row(kind, tiny_denoiser):
    projection = projection_for(tiny_denoiser, kind, 64)
    want = projection.project(rows(tiny_denoiser, batch()).values)
    got = rows(tiny_denoiser, batch(), projection=projection).values
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", NAMES)
def test_losses_are_the_noise_errors_summed_over_the_states(objective, tiny_denoiser):
    inputs = batch()
    with torch.no_grad():
        want = sum(
            (tiny_denoiser.eps(s.x_t, s.t, s.cond) - s.eps).square().flatten(1).mean(1)
            for s in train_states_of(tiny_denoiser, *inputs, STATES["noised"])
        )
    got = rows(tiny_denoiser, inputs, objective).losses
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_unknown_objective_is_refused(tiny_denoiser):
    with pytest.raises(UserError, match="presence"):
        rows(tiny_denoiser, batch(), "nonsense")


def squared(x):
    return 0.5 * x.square().sum()


def dps_loss(denoiser, state):
    """1/2 ||sg[eps_hat - g] - eps_hat||^2, g by autograd of its definition."""
    x_t, a = state.x_t.clone().requires_grad_(), denoiser.schedule.alpha_bar[state.t].item()
    x0_hat = (x_t - math.sqrt(1 - a) * denoiser.eps(x_t, state.t, state.cond)) / math.sqrt(a)
    g = -torch.autograd.grad((x0_hat - state.x0).square().mean(), x_t)[0]
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return squared((eps_hat - g).detach() - eps_hat)


def slider_loss(denoiser, state):
    """1/2 ||sg[eps(c) + (eps(c) - eps(c-))] - eps(c)||^2."""
    pos, neg = (denoiser.eps(state.x_t, state.t, c) for c in (state.cond, state.cond_neg))
    return squared((pos + (pos - neg)).detach() - pos)


def of_prediction(loss):
    return lambda d, state: loss(d.eps(state.x_t, state.t, state.cond), state)


LOSSES = {  # the literal losses of `gradients.objectives`, of one sample
    "dsm": of_prediction(lambda e, state: squared(e - state.eps)),
    "dtrak": of_prediction(lambda e, state: squared(e)),
    "das": of_prediction(lambda e, state: e.abs().sum()),
    "das_mean": of_prediction(lambda e, state: e.sum()),
    "dps": dps_loss,
    "presence": slider_loss,
    "contrast": lambda d, s: -squared(d.eps(s.x_t, s.t, s.cond) - d.eps(s.x_t, s.t, s.cond_neg)),
}


def literal_row(denoiser, inputs, objective, normalize=True):
    """[1, P] by autograd of the literal loss of each state; nothing of the engine takes part."""
    chosen, total = list(PerSampleVjp(denoiser.network, "attn2").parameters.values()), 0
    for state in train_states_of(denoiser, *inputs, STATES["noised"]):
        with torch.enable_grad():
            loss = LOSSES[objective](denoiser, state)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])
        total = total + (flat / flat.norm() if normalize else flat)
    return total[None]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("objective", NAMES)
def test_a_row_is_the_gradient_of_its_literal_loss(objective, normalize, tiny_denoiser):
    x0, cond, null = batch(3)
    got = rows(tiny_denoiser, (x0, cond, null), objective, normalize=normalize).values
    for i, row in enumerate(got):
        want = literal_row(tiny_denoiser, (*one(x0, cond, i), null), objective, normalize)[0]
        torch.testing.assert_close(row, want, rtol=1e-3, atol=1e-5 * float(want.norm()))


def store_of(values, folder):
    """A finished store of rows [N, k]."""
    store = Store.create(folder, Layout(*values.shape, 2, "float32"), {}, provenance={})
    for shard in store.pending():
        start, stop = store.shard_range(shard)
        store.append(shard, values[start:stop].numpy(), start)
        store.finish(shard)
    return store


def scores_of(store, asked):
    """[D, N] at three dampings."""
    fisher = FullFisher(Budget(2**28))
    return precondition_and_score(store, asked.numpy(), [1e-2, 0.1, 10.0], fisher)[:, 0]


@pytest.mark.parametrize("objective", NAMES)
def test_copy_of_query_ranks_first_for_every_method(objective, tiny_denoiser, tmp_path):
    """The query is the gradient of the literal loss of a picture that stands among the train rows:
    a sign that is wrong on the train side makes it rank last.
    """
    x0, cond, null = batch(21)
    projection = projection_for(tiny_denoiser, "sjlt", 256)
    made = rows(tiny_denoiser, (x0, cond, null), objective, projection=projection)
    store = store_of(made.values, tmp_path / "store")
    for i in (0, 13):
        asked = literal_row(tiny_denoiser, (*one(x0, cond, i), null), objective)
        values = scores_of(store, projection.project(asked))
        assert (values.argmax(1) == i).all() and (values[:, i] > 0).all()


@pytest.mark.parametrize("objective", ["presence", "contrast"])
def test_copy_of_a_concept_query_ranks_first_among_rows_of_the_same_reward(
    objective, tiny_denoiser, tmp_path
):
    """A slider query against the empty prompt, read at a picture's own noised states, finds that
    picture.
    """
    x0, cond, null = batch(21)
    projection = projection_for(tiny_denoiser, "sjlt", 256)
    train = rows(tiny_denoiser, (x0, cond, null), objective, projection=projection).values
    read = rebatch(train_states_of(tiny_denoiser, *one(x0, cond, 7), null, STATES["noised"]), 2)
    maker = GradientComputer(tiny_denoiser, projection, "attn2", True)
    asked = maker.mean_row(
        (s.contrasting(cond[7:8], null) for s in read), concept_cotangent(objective)
    )
    assert (scores_of(store_of(train, tmp_path / "store"), asked).argmax(1) == 7).all()
