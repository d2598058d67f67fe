"""Metrics against brute force, exact chance by enumeration, ties, and the bootstrap's defining
properties.
"""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom

from concept_trak.errors import UserError
from concept_trak.scoring import metrics


def brute_recall(scores, relevant, k, denominator):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    hits = sum(bool(relevant[i]) for i in order[:k])
    return hits / (min(k, sum(relevant)) if denominator == "min" else sum(relevant))


def brute_average_precision(scores, relevant):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    hits, total = 0, 0.0
    for rank, i in enumerate(order, start=1):
        if relevant[i]:
            hits += 1
            total += hits / rank
    return total / hits


@pytest.mark.parametrize("denominator", metrics.DENOMINATORS)
@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_equals_brute_force_with_ties(k, denominator):
    rng = np.random.default_rng(k)
    scores = rng.integers(-4, 5, size=(6, 5, 30)).astype(
        np.float32
    )  # few distinct values: many ties
    relevant = rng.random(30) < 0.3
    got = metrics.recall_at_k(scores, relevant, k, denominator)
    least = metrics.least_k_recall(scores, relevant, k, denominator)
    precision = metrics.average_precision(scores, relevant)
    assert got.shape == least.shape == precision.shape == (6, 5)
    for index in np.ndindex(6, 5):
        row = scores[index].tolist()
        assert got[index] == brute_recall(row, relevant, k, denominator)
        assert least[index] == brute_recall([-s for s in row], relevant, k, denominator)
        assert precision[index] == pytest.approx(brute_average_precision(row, relevant), abs=1e-12)


def test_a_curve_is_recall_at_every_k():
    rng = np.random.default_rng(3)
    scores, relevant = rng.integers(0, 9, (6, 30)).astype(float), rng.random((6, 30)) < 0.2
    relevant[:, 0] = True
    curve = metrics.recall_curve(scores, relevant, 12)
    each = [metrics.recall_at_k(scores, relevant, k).mean() for k in range(1, 13)]
    np.testing.assert_allclose(curve, each)


def test_truth_may_differ_by_query():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    relevant = np.array([[True, False, False], [False, False, True]])
    assert metrics.recall_at_k(scores, relevant, k=1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("n, r, k", [(8, 3, 2), (8, 3, 5), (7, 7, 3), (6, 1, 4), (5, 2, 9)])
def test_chance_equals_enumeration_of_all_placements(n, r, k):
    scores = -np.arange(n, dtype=float)
    placements = np.array([[i in chosen for i in range(n)] for chosen in combinations(range(n), r)])
    assert len(placements) == comb(n, r)
    for denominator in metrics.DENOMINATORS:
        exact = metrics.recall_at_k(
            np.tile(scores, (len(placements), 1)), placements, k, denominator
        ).mean()
        assert metrics.chance_recall_at_k(n, r, k, denominator) == pytest.approx(exact)
    exact = metrics.average_precision(np.tile(scores, (len(placements), 1)), placements).mean()
    assert metrics.chance_average_precision(n, r) == pytest.approx(exact)


def test_chance_is_the_hypergeometric_mean():
    assert metrics.chance_recall_at_k(896, 7, 10) == pytest.approx(hypergeom(896, 7, 10).mean() / 7)
    assert metrics.chance_recall_at_k(896, 112, 10) == pytest.approx(
        hypergeom(896, 112, 10).mean() / 10
    )


def test_bootstrap_interval_matches_the_normal_interval_on_many_values():
    values = np.random.default_rng(3).normal(0.4, 0.2, size=400)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_is_seeded_nested_in_level_and_exact_on_constants():
    values = np.random.default_rng(1).random(20)
    assert metrics.bootstrap_interval(values, seed=5) == metrics.bootstrap_interval(values, seed=5)
    assert metrics.bootstrap_interval(values, seed=5) != metrics.bootstrap_interval(values, seed=6)
    narrow, wide = (
        metrics.bootstrap_interval(values, level=0.5),
        metrics.bootstrap_interval(values, level=0.99),
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert metrics.bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: metrics.recall_at_k(np.array([1.0, np.nan]), np.array([True, False])),
            r"score \(1,\) is NaN",
        ),
        (lambda: metrics.recall_at_k(np.ones(3), np.zeros(3, bool)), "no relevant image"),
        (
            lambda: metrics.average_precision(np.ones(3), np.ones(4, bool)),
            "3 images but truth is for 4",
        ),
        (
            lambda: metrics.recall_at_k(np.ones(3), np.ones(3, bool), denominator="all"),
            "denominator 'all'",
        ),
        (lambda: metrics.recall_at_k(np.ones(3), np.ones(3, bool), k=0), "k >= 1"),
        (lambda: metrics.chance_recall_at_k(5, 0), "have no chance"),
        (lambda: metrics.bootstrap_interval(np.array([])), "no bootstrap of shape"),
        (lambda: metrics.bootstrap_interval(np.array([0.1, np.inf])), "finite"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
