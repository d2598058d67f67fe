"""Properties of the one ranking."""

import numpy as np
import pytest

from concept_trak.errors import UserError
from concept_trak.scoring.ranking import ranking


def test_ties_are_ranked_by_index_at_both_ends():
    scores = np.array([0.0, 1.0, 1.0, 0.0, -0.0])
    assert ranking(scores).tolist() == [1, 2, 0, 3, 4]
    assert ranking(scores, largest=False).tolist() == [0, 3, 4, 1, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16])
@pytest.mark.parametrize("largest", [True, False])
def test_first_k_of_every_row_are_exact_with_ties_by_index(largest, dtype):
    values = np.random.default_rng(0).integers(0, 8, (3, 2, 100)).astype(dtype)
    found = ranking(values, largest, 17)
    sign = -1 if largest else 1
    for row, indices in zip(values.reshape(-1, 100), found.reshape(-1, 17), strict=True):
        assert indices.tolist() == sorted(range(100), key=lambda i: (sign * row[i], i))[:17]


def test_unsigned_and_low_precision_scores_rank_by_value():
    assert ranking(np.array([1, 200, 3], dtype=np.uint8)).tolist() == [1, 2, 0]
    assert ranking(np.array([1, 2, 3], dtype=np.float16)).tolist() == [2, 1, 0]


def test_more_than_all_gives_all():
    assert ranking([3.0, 1.0, 2.0], k=10).tolist() == [0, 2, 1]


def test_nan_has_no_rank_and_infinity_has():
    with pytest.raises(UserError, match=r"score \(1, 2\) is NaN, which cannot be ranked"):
        ranking(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]]), k=1)
    assert ranking([1.0, np.inf], k=1).tolist() == [1]
