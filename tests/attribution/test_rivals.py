"""Rivals, each against a computation that shares no code with it."""

import numpy as np
import pytest
import torch

from concept_trak.attribution import unlearning
from concept_trak.attribution.ekfac import EkfacAttributor
from concept_trak.attribution.methods import swept
from concept_trak.attribution.nda import NDA
from concept_trak.attribution.question import Query, generate
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.unlearning import MUCS, AbU, AbuPlus, losses
from concept_trak.errors import UserError
from concept_trak.gradients.das_residual import LEVELS, residual
from concept_trak.gradients.select import select_parameters
from concept_trak.models.condition import Condition
from concept_trak.models.schedule import NoiseLevel
from concept_trak.registry import RANKERS
from concept_trak.settings import DAMPINGS, resolve
from experiments.benchmark.forward_count import count_forwards


@pytest.fixture(scope="module")
def task(tiny_pipeline, tiny_data, tmp_path_factory):
    given = {
        "sd_model_path": str(tiny_pipeline),
        "data_dir": str(tiny_data),
        "grad_dir": str(tmp_path_factory.mktemp("rivals") / "grads"),
        "proj_type": "identity",
        "blocks": "all",
        "store_dtype": "float32",
        "nfe": 3,
        "epochs": 2,
        "num_split": 1,
        "gen_num_inference_steps": 5,
        "f": "dsm",
    }
    return AttributionTask(resolve("emoji", given), "cpu")


@pytest.fixture(scope="module")
def questions(task):
    prompts = ["a cat in the style of line", "a dog in the style of blob"]
    return [
        Query(picture, "line", "in the style of line", "")
        for picture in generate(task.model, task.settings, prompts, 0)
    ]


def copies(task, rows):
    """Questions whose pictures are train pictures."""
    from concept_trak.attribution.question import QueryImage

    pixels = task.train.images(rows, size=task.model.image_size)
    return [
        Query(
            QueryImage(task.train.captions[i], task.latents[i : i + 1], None, shown, {"real": i}),
            "",
            task.train.captions[i],
            "",
        )
        for i, shown in zip(rows, pixels, strict=True)
    ]


def literal_gradients(task, states, layer="attn2"):
    """[states, B, P] of 1/2 |eps_hat - eps|^2 by autograd, one sample at a time."""
    chosen, found = list(select_parameters(task.model.network, layer).values()), []
    for p in chosen:
        p.requires_grad_()
    for state in states:
        rows = []
        for i in range(len(state)):
            t = state.t if isinstance(state.t, int) else int(state.t[i])
            with torch.enable_grad():
                eps = task.model.eps(state.x_t[i : i + 1], t, state.cond[i : i + 1])
                loss = (eps - state.eps[i : i + 1]).square().sum() / 2
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]))
        found.append(torch.stack(rows))
    for p in chosen:
        p.requires_grad_(False)
    return found


def train_side(task, layer="attn2"):
    """[T, N, P]."""
    from concept_trak.gradients.states import noising_schedule, train_states_of

    x0, cond = task.data.batch(range(len(task.data)))
    seen = train_states_of(task.model, x0, cond, task.cond_null, noising_schedule(3))
    return torch.stack(literal_gradients(task, list(seen), layer))


def query_side(ranker, question, layer="attn2"):
    """[P]: the mean over the states of the picture."""
    found = literal_gradients(ranker.task, ranker._states(question.picture), layer)
    return torch.cat(found).mean(0)


@pytest.fixture(scope="module")
def rows(task):
    return train_side(task).sum(0).double().numpy()


def asked_rows(name, task, questions):
    ranker = RANKERS.get(name)(task)
    asked = [query_side(ranker, q) for q in questions]
    return ranker, torch.stack(asked).double().numpy()


def test_grad_dot_and_grad_cos_are_inner_product_and_cosine(task, questions, rows):
    ranker, q = asked_rows("grad_dot", task, questions)
    np.testing.assert_allclose(ranker.rank(questions)[0], q @ rows.T, rtol=1e-3, atol=1e-5)
    cosine = q @ rows.T / np.linalg.norm(rows, axis=1)
    got = RANKERS.get("grad_cos")(task).rank(questions)
    np.testing.assert_allclose(got[0], cosine, rtol=1e-3, atol=1e-5)


def kernels(rows):
    """(K + lambda I)^-1 at every damping."""
    kernel = rows.T @ rows
    mean = np.trace(kernel) / len(kernel)
    return [np.linalg.inv(kernel + d * mean * np.eye(len(kernel))) for d in DAMPINGS]


def test_trak_and_relative_influence_are_those_of_explicit_inverses(task, questions, rows):
    trak, q = asked_rows("trak", task, questions)
    relative = RANKERS.get("relative_influence")(task).rank(questions)
    plain = trak.rank(questions)
    for d, inverse in enumerate(kernels(rows)):
        want = q @ inverse @ rows.T
        np.testing.assert_allclose(plain[d], want, rtol=2e-3, atol=1e-4 * abs(want).max())
        want = want / np.linalg.norm(rows @ inverse, axis=1)
        np.testing.assert_allclose(relative[d], want, rtol=2e-3, atol=1e-4 * abs(want).max())


def test_trak_agrees_with_trak_and_dattri(task, questions, rows):
    """Our scores at a small damping against the features of trak and the solve of dattri, both of
    which have no damping of their own: up to one factor for all scores.
    """
    from dattri.func.projection import random_project
    from trak.score_computers import BasicScoreComputer

    ranker, q = asked_rows("trak", task, questions)
    width = 8  # fewer than pictures, or their kernel has no inverse
    project = random_project(
        torch.zeros(1, rows.shape[1]), 1, width, 32, 0, "rademacher", device="cpu"
    )
    x, y = (project(torch.tensor(a, dtype=torch.float32)) for a in (rows, q))
    theirs = BasicScoreComputer(dtype=torch.float32, device="cpu")
    features = theirs.get_x_xtx_inv(x, theirs.get_xtx(x))
    by_trak = (y @ features.T).numpy()
    kernel = (x.T @ x).numpy().astype(np.float64)
    by_dattri = y.numpy() @ np.linalg.solve(kernel, x.numpy().T)
    own = task.with_settings(
        task.settings.but(proj_type="rademacher", proj_dim=width, proj_backend="dattri")
    )
    got = RANKERS.get("trak")(own).rank(questions)[0]
    for want in (by_trak, by_dattri):
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9999


def test_das_is_the_squared_leave_one_out_change(task, questions):
    ranker = RANKERS.get("das_paper")(task)
    store = ranker._train
    x = store.rows(range(store.num_rows)).astype(np.float64)
    q = ranker.rows(questions).astype(np.float64)
    x0, cond = task.data.batch(range(len(task.data)))
    e = residual(task.model, x0, cond, task.cond_null).numpy()
    got = ranker.rank(questions)
    for d, inverse in enumerate(kernels(x)):
        leverage = np.einsum("nk,kl,nl->n", x, inverse, x)
        want = (q @ inverse @ x.T * e / (1 - leverage)) ** 2
        np.testing.assert_allclose(got[d], want, rtol=1e-2, atol=1e-4 * want.max())


@pytest.fixture(scope="module", params=("all", "module"))
def left_out(task, questions, request):
    """DAS with K whole and in blocks: (ranker, its rows [N, k], queries, columns of each block)."""
    changed = task.settings.but(proj_type="normal", proj_dim=64, blocks=request.param)
    ranker = RANKERS.get("das_paper")(task.with_settings(changed))
    widths = ranker.task.projection.widths
    assert (len(widths) > 1) == (request.param == "module")
    x = ranker._train.rows(range(ranker._train.num_rows)).astype(np.float64)
    q = ranker.rows(questions).astype(np.float64)
    return ranker, x, q, np.split(np.arange(x.shape[1]), np.cumsum(widths)[:-1])


def test_a_leverage_lies_between_0_and_1_in_every_block(left_out):
    ranker, x, _, blocks = left_out
    found = ranker.leverages(x)
    assert found.shape == (len(DAMPINGS), len(x), len(blocks))
    assert (found >= 0).all() and (found < 1).all()
    assert found.max() > 0.5  # at the least damping: they are not all next to nothing
    traces = [np.trace(x[:, b].T @ x[:, b]) / len(b) for b in blocks]
    for d, damping in enumerate(DAMPINGS):
        for n, (b, mean) in enumerate(zip(blocks, traces, strict=True)):
            values = np.linalg.eigvalsh(x[:, b].T @ x[:, b])  # the leverages add up to this
            total = (values / (values + damping * mean)).sum()
            np.testing.assert_allclose(found[d, :, n].sum(), total, rtol=1e-6)


def test_das_solves_with_each_block_of_the_curvature_without_the_picture(left_out, questions):
    ranker, x, q, blocks = left_out
    got, e = ranker.rank(questions), ranker._train.losses()
    for d in (0, 4, 8):
        want = np.zeros((len(q), len(x)))
        for b in blocks:
            kernel = x[:, b].T @ x[:, b]
            shift = DAMPINGS[d] * np.trace(kernel) / len(b) * np.eye(len(b))
            for i, row in enumerate(x[:, b]):
                without = kernel - np.outer(row, row) + shift
                want[:, i] += q[:, b] @ np.linalg.solve(without, row)
        want = (want * e) ** 2
        np.testing.assert_allclose(got[d], want, rtol=1e-3, atol=1e-5 * want.max())


def test_nothing_is_left_out_of_the_curvature_for_a_picture_beside_the_store(left_out):
    ranker, x, q, _ = left_out
    solved, ones = ranker.solve(q), np.ones(len(x))
    want = (solved @ x.T) ** 2
    np.testing.assert_allclose(ranker.score_rows(solved, x, ones), want, rtol=1e-6)


def test_a_residual_is_the_mean_share_of_the_levels(task):
    x0, cond = task.data.batch(range(3))
    found = residual(task.model, x0, cond, task.cond_null)
    alone = residual(task.model, x0[1:2], cond[1:2], task.cond_null)
    torch.testing.assert_close(found[1:2], alone)
    # shares of a unit vector of 10 levels: their mean is between 1/10 (one rules) and 1/sqrt(10)
    assert ((found >= 1 / len(LEVELS)) & (found <= len(LEVELS) ** -0.5 + 1e-6)).all()


def test_journey_reads_predictions_of_the_path_noised_again(task, questions):
    ranker = RANKERS.get("journey_trak")(task)
    states = ranker._states(questions[0].picture)
    assert sum(map(len, states)) == 2 * 2  # draws x levels
    for state in states:
        for i, t in enumerate(state.t.tolist()):
            alpha, sigma = task.model.schedule.level(t)
            torch.testing.assert_close(state.x_t[i], alpha * state.x0[i] + sigma * state.eps[i])
    plain = RANKERS.get("trak")(task)._states(questions[0].picture)
    assert not torch.allclose(states[0].x0, plain[0].x0)
    again = RANKERS.get("journey_trak")(task)._states(questions[0].picture)
    assert torch.equal(states[0].x_t, again[0].x_t)


def test_ekfac_scores_are_those_of_its_dense_matrix(task, questions):
    """The ranker against F built in full from the eigenvectors and eigenvalues."""
    ranker = EkfacAttributor(task)
    got, q = ranker.rank(questions), [query_side(ranker, x) for x in questions]
    total = sum(map(len, ranker._states(questions[0].picture)))
    rows, d, want = train_side(task).sum(0), 5, 0
    sizes = [len(basis.values) for basis in ranker.curvature.bases]
    for basis, x, y in zip(
        ranker.curvature.bases, rows.split(sizes, 1), torch.stack(q).split(sizes, 1), strict=True
    ):
        vectors = basis.right if basis.left is None else torch.kron(basis.left, basis.right)
        damping = DAMPINGS[d] * basis.values.mean()
        inverse = vectors @ torch.diag(1 / (basis.values + damping)) @ vectors.T
        want = want + y @ inverse @ x.T
    want = want.numpy() * total  # the ranker sums over the states of a query
    np.testing.assert_allclose(got[d], want, rtol=5e-3, atol=1e-3 * abs(want).max())


@pytest.mark.parametrize("made", [AbU, AbuPlus])
def test_a_small_step_of_unlearning_is_its_influence_function(made, task, questions):
    """(L(theta') - L(theta)) N / alpha -> mean_t g_i,t . F^-1 g_q as alpha -> 0."""
    ranker = made(task, 0.002)
    layer = "attn2.to_k|attn2.to_v"
    got = ranker.rank(questions[:1])[0, 0]
    train, q = train_side(task, layer), query_side(ranker, questions[0], layer)
    sizes = [p.numel() for p in ranker.parameters.values()]
    if made is AbU:
        fisher = train.flatten(0, 1).square().mean(0)
        parts = fisher.split(sizes)
        shift = torch.cat([(0.1 * f.mean()).expand(len(f)) for f in parts])
        solved = q / (fisher + shift)
    else:
        bases, solved = ranker.curvature.bases, []
        for basis, y in zip(bases, q.split(sizes), strict=True):
            vectors = torch.kron(basis.left, basis.right)
            inner = vectors.T @ y / (basis.values + 0.1 * basis.values.mean())
            solved.append(vectors @ inner)
        solved = torch.cat(solved)
    values = task.latents[0].numel()  # losses are means over them, gradients of half their sum
    want = (train.mean(0) @ solved).numpy() * 0.002 / len(train[0]) * 2 / values
    assert np.corrcoef(got, want)[0, 1] > 0.999
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02 * abs(want).max())


@pytest.mark.parametrize("made", [AbU, AbuPlus])
def test_unlearning_raises_the_loss_of_the_unlearned_picture(made, task):
    asked = copies(task, [3])
    assert made(task, 0.01).rank(asked)[0, 0, 3] > 0


def test_mucs_forgets_the_picture(task, monkeypatch):
    """Its loss is higher than after the same training without anything to forget. (The null loss is
    raised: this model has learned nothing, so it is there already.)
    """
    monkeypatch.setattr(MUCS, "null_loss", 10.0)
    asked, found = copies(task, [3]), []
    for weight in (0.0, 1.0):
        monkeypatch.setattr(MUCS, "weight", weight)
        found.append(MUCS(task, 1e-3).rank(asked)[0, 0])
    assert found[1][3] > found[0][3]


@pytest.mark.parametrize("made", [AbU, AbuPlus, MUCS])
def test_the_model_is_as_it_was_afterwards(made, task):
    before = losses(task)
    made(task).at(1).rank(copies(task, [3]))
    assert torch.equal(losses(task), before)
    assert not any(p.requires_grad for p in task.model.network.parameters())


def test_mucs_stops_at_the_loss_of_predicting_nothing(task, questions, monkeypatch):
    monkeypatch.setattr(MUCS, "null_loss", 1e-6)  # every picture's loss is beyond it
    assert (MUCS(task, 1e-3).rank(questions[:1]) == 0).all()


def test_every_step_is_ranked_at_and_the_curvature_is_fitted_once(task, questions, monkeypatch):
    fits, fit = [], unlearning.fit_ekfac
    monkeypatch.setattr(unlearning, "fit_ekfac", lambda *given: fits.append(1) or fit(*given))
    values = swept(RANKERS.get("abu_plus")(task), questions)
    assert len(values) == len(AbuPlus.candidates) and fits == [1]
    for candidate, value in zip(AbuPlus.candidates, values, strict=True):
        want = AbuPlus(task, candidate).rank(questions)[0]
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-7)
    assert len(swept(RANKERS.get("trak")(task), questions)) == len(DAMPINGS)


def test_the_ideal_denoiser_copies_the_picture_itself(task):
    asked = copies(task, [2, 9])
    values = NDA(task).rank(asked)[0]
    assert values.argmax(1).tolist() == [2, 9]
    np.testing.assert_allclose(values.sum(1), len({1, 2, 4}), rtol=1e-5)  # shares, a size each


def test_level_shares_decide_how_near_a_patch_must_be(task, monkeypatch):
    """At a level of noise alone all patches count alike."""
    noise = type("Noise", (), {"level": staticmethod(lambda t: NoiseLevel(1e-9, 1.0))})
    monkeypatch.setattr(task.model, "schedule", noise)
    values = NDA(task).rank(copies(task, [2]))[0]
    np.testing.assert_allclose(values, values.mean(), rtol=1e-3)


ROWED = ("trak", "das", "das_paper", "grad_dot", "grad_cos", "relative_influence", "journey_trak")


@pytest.mark.parametrize("name", ROWED)
def test_rows_beside_the_store_are_scored_as_those_in_it(name, task, questions):
    ranker = RANKERS.get(name)(task)
    want, got = ranker.rank(questions), ranker.score_train(ranker.solve(ranker.rows(questions)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_more_scores_than_max_memory_holds_are_refused(task):
    ranker = RANKERS.get("relative_influence")(task)
    solved = np.broadcast_to(np.zeros(1), (len(DAMPINGS), 10**9, ranker._train.dim))
    with pytest.raises(UserError, match="raise MAX_MEMORY"):
        ranker.score_train(solved)


@pytest.mark.parametrize("name", ["ekfac", "abu", "abu_plus", "mucs", "nda"])
def test_other_pictures_do_not_change_what_train_pictures_score(name, task, questions):
    """A gallery of the train pictures and, again, some of them: each has its score twice."""
    ranker = RANKERS.get(name)(task)
    want = ranker.rank(questions[:1])
    count = len(task.data)

    class Again:
        latents = torch.cat([task.latents, task.latents[:3]])

        def __len__(self):
            return count + 3

        def batch(self, rows):
            parts = [task.data.batch(range(i % count, i % count + 1)) for i in rows]
            return torch.cat([x0 for x0, _ in parts]), Condition.join([cond for _, cond in parts])

    got = ranker.over(Again()).rank(questions[:1])
    assert got.shape[2] == count + 3
    np.testing.assert_allclose(got[..., count:], got[..., :3], rtol=1e-3, atol=1e-7)
    if name != "nda":  # whose patches compete
        np.testing.assert_allclose(got[..., :count], want, rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(ranker.rank(questions[:1]), want)  # nothing is left of it


def test_cost_counts_forwards_and_backwards_of_samples(task, questions):
    samples = 2 * 2  # draws x levels, each forwards and backwards
    assert count_forwards(RANKERS.get("trak")(task), questions[0]) == 2 * samples
    assert count_forwards(RANKERS.get("caption_similarity")(task), questions[0]) == 0
    count = len(task.data) * 2  # the losses after, at each of two levels
    assert count_forwards(AbU(task), questions[0]) == 2 * samples + count
