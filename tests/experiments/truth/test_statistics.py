"""Correlations with retraining: a ranker that knows the truth reaches it, one that counts labels
has nothing left, and a swapped group is noticed.
"""

import numpy as np
import pytest
import torch
from dattri.metric import mislabel_detection_auc

from concept_trak.errors import UserError
from experiments.truth.lds import FIGURES, GroundTruth, interval_of, lds_metrics, summary
from experiments.truth.statistics import auc_below, lds, partial, partial_lds
from experiments.truth.train_many import failed_trainings

SUBSETS, PICTURES, CONCEPTS = 40, 60, 6


@pytest.fixture
def world():
    """A linear model, where influence is exact: J = sum of the kept pictures' true influences."""
    rng = np.random.default_rng(0)
    relevant = np.arange(PICTURES) % CONCEPTS == np.arange(CONCEPTS)[:, None]
    influence = rng.normal(size=(CONCEPTS, PICTURES)) + 3 * relevant
    kept = rng.random((SUBSETS, PICTURES)) < 0.5
    return influence, kept, kept @ influence.T, relevant


def test_exact_influence_of_a_linear_model_reaches_the_ceiling():
    """Ridge regression: the influence of every sample on a prediction is known in closed form, and
    the models without samples are really fitted again.
    """
    rng = np.random.default_rng(1)
    n, k, targets = 400, 5, 8
    x, test = rng.normal(size=(n, k)), rng.normal(size=(targets, k))
    y = x @ rng.normal(size=k) + rng.normal(size=n)
    hessian = np.linalg.inv(x.T @ x)
    residual = y - x @ (hessian @ x.T @ y)
    scores = test @ hessian @ (x * residual[:, None]).T
    kept = rng.random((50, n)) < 0.9
    refitted = [test @ np.linalg.solve(x[m].T @ x[m], x[m].T @ y[m]) for m in kept]
    assert lds(scores, np.stack(refitted), kept).min() > 0.99


def test_a_ranker_that_knows_the_truth_has_one_and_its_opposite_minus_one(world):
    influence, kept, presences, relevant = world
    assert lds(influence, presences, kept) == pytest.approx(1)
    assert lds(-influence, presences, kept) == pytest.approx(-1)
    assert partial_lds(influence, presences, kept, relevant) == pytest.approx(1)


def test_counting_labels_predicts_but_its_partial_correlation_is_exactly_zero(world):
    _, kept, presences, relevant = world
    counting = relevant.astype(float) * 0.37
    assert lds(counting, presences, kept).min() > 0.3
    assert (partial_lds(counting, presences, kept, relevant) == 0).all()


def test_the_sizes_of_subsets_predict_but_have_no_partial_correlation():
    """Presence that grows with all that is learned: any positive scores seem to know it."""
    rng = np.random.default_rng(4)
    kept = rng.random((60, 200)) < rng.uniform(0.2, 0.8, (60, 1))
    presences = kept.sum(1)[:, None] + rng.normal(size=(60, CONCEPTS))
    scores, relevant = rng.random((CONCEPTS, 200)), np.zeros((CONCEPTS, 200), dtype=bool)
    relevant[:, :7] = True
    assert lds(scores, presences, kept).min() > 0.9
    assert abs(partial_lds(scores, presences, kept, relevant).mean()) < 0.15
    assert (partial_lds(np.full_like(scores, 2.5), presences, kept, relevant) == 0).all()


def test_squared_scores_hear_less_of_the_long_middle(world):
    """A top that is right in a middle of noise: the same ranking says more when it is squared."""
    influence, kept, _, relevant = world
    truth = np.where(relevant, influence, 0)
    rng = np.random.default_rng(9)
    scores = truth + 0.8 * rng.normal(size=truth.shape)
    names = [str(c) for c in range(CONCEPTS)]
    found = lds_metrics(scores, GroundTruth(names, kept, kept @ truth.T, relevant))
    assert found["squared"].mean() > found["partial"].mean() + 0.02
    flipped = lds_metrics(-scores, GroundTruth(names, kept, kept @ truth.T, relevant))
    np.testing.assert_allclose(flipped["squared"], -found["squared"])  # signs are kept


def test_what_is_known_of_the_labelled_pictures_and_of_the_others_is_told_apart(world):
    influence, kept, _, relevant = world
    own, others = influence * relevant, influence * ~relevant
    names = [str(c) for c in range(CONCEPTS)]
    for presences, known, unknown in (
        (kept @ own.T, "own", "others"),
        (kept @ others.T, "others", "own"),
    ):
        found = lds_metrics(influence, GroundTruth(names, kept, presences, relevant))
        assert found[known] == pytest.approx(1) and abs(found[unknown].mean()) < 0.2
        assert 0.2 < found["partial"].mean() < 1
        assert set(summary(found)) == {*FIGURES, *map(interval_of, FIGURES)}


def test_scores_of_swapped_concepts_are_noticed(world):
    influence, kept, presences, relevant = world
    assert abs(lds(np.roll(influence, 1, 0), presences, kept).mean()) < 0.2
    assert abs(partial_lds(np.roll(influence, 1, 0), presences, kept, relevant).mean()) < 0.2


def test_subsets_of_different_sizes_are_summed_over_their_own_pictures(world):
    influence, kept, *_ = world
    kept = kept.copy()
    kept[0], kept[1] = False, True
    assert lds(influence, kept @ influence.T, kept) == pytest.approx(1)


def test_equal_predictions_have_no_correlation(world):
    _, kept, presences, relevant = world
    nothing = np.zeros((CONCEPTS, PICTURES))
    assert (lds(nothing, presences, kept) == 0).all()
    assert (partial_lds(nothing, presences, kept, relevant) == 0).all()


def test_two_subsets_are_refused(world):
    influence, kept, presences, _ = world
    with pytest.raises(UserError, match="2 subsets give no correlation"):
        lds(influence, presences[:2], kept[:2])


def test_partial_correlation_is_that_of_the_textbook():
    """r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)) on ranks."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(2)
    z = rng.normal(size=30)
    x, y = z + rng.normal(size=30), z + rng.normal(size=30)
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    wanted = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial(x, y, z) == pytest.approx(wanted)


def test_auc_counts_pairs():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 9.0])
    low, high = np.array([1, 0, 1, 0, 0], bool), np.array([0, 1, 0, 1, 0], bool)
    assert auc_below(scores, low, high) == pytest.approx(3 / 4)
    assert auc_below(scores, high, low) == pytest.approx(1 / 4)


def test_auc_is_dattris_ties_included():
    rng = np.random.default_rng(5)
    for levels in (3, 50, 10**6):
        scores, low = rng.integers(0, levels, 80) / 7, rng.random(80) < 0.3
        high = ~low & (rng.random(80) < 0.8)
        both = low | high
        wanted, _ = mislabel_detection_auc(*map(torch.from_numpy, (-scores[both], low[both])))
        assert auc_below(scores, low, high) == float(wanted)


def test_a_training_that_failed_is_told_of():
    rng = np.random.default_rng(0)
    judged = {
        f"lds-{i}": {k: rng.uniform(0.4, 0.6, 50) for k in ("object", "style")} for i in "abc"
    }
    assert not failed_trainings(judged)
    judged["lds-d"] = {"object": np.full(50, 0.02), "style": np.full(50, 0.3)}
    ((name, rate, usual),) = failed_trainings(judged)
    assert name == "lds-d" and rate == pytest.approx(0.16) and 0.4 < usual < 0.6
    assert not failed_trainings({k: judged[k] for k in ("lds-a", "lds-d")})
