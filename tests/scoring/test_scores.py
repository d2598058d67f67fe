"""Properties of scoring."""

import numpy as np
import pytest

from concept_trak.errors import UserError
from concept_trak.scoring import scores as scores_module
from concept_trak.scoring.fisher import fisher_for
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.ranking import ranking
from concept_trak.scoring.scores import precondition_and_score, scores
from concept_trak.store.store import Layout, Store

N, K = 53, 12


def rows_and_queries():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, K)).astype(np.float32), rng.standard_normal((3, 2, K))


def make(folder, rows, dtype="float32", num_split=4):
    store = Store.create(folder, Layout(*rows.shape, num_split, dtype), {}, provenance={})
    for shard in range(num_split):
        start, stop = store.shard_range(shard)
        store.append(shard, rows[start:stop], start)
        store.finish(shard)
    return store


def test_scores_are_inner_products_in_every_stored_type(tmp_path):
    rows, queries = rows_and_queries()
    for dtype in ("float32", "float16", "bfloat16"):
        store = make(tmp_path / dtype, rows, dtype)
        stored = store.rows(range(N)).astype(np.float64)
        found = scores(store, queries)
        assert found.shape == (3, 2, N) and found.dtype == np.float32
        np.testing.assert_allclose(found, queries @ stored.T, rtol=1e-6, atol=1e-6)


def test_block_size_and_shards_do_not_matter(tmp_path, monkeypatch):
    rows, queries = rows_and_queries()
    whole = scores(make(tmp_path / "1", rows, num_split=1), queries)
    many = make(tmp_path / "9", rows, num_split=9)
    for rows_at_a_time in (1, 2, 50):
        monkeypatch.setattr(scores_module, "BLOCK_VALUES", K * rows_at_a_time)
        np.testing.assert_allclose(scores(many, queries), whole, rtol=1e-6, atol=1e-6)


def test_store_is_read_once(tmp_path, monkeypatch):
    rows, queries = rows_and_queries()
    store, seen = make(tmp_path, rows), []
    blocks = Store.stored_blocks

    def counted(self, max_rows):
        for start, block in blocks(self, max_rows):
            seen.extend(range(start, start + len(block)))
            yield start, block

    monkeypatch.setattr(Store, "stored_blocks", counted)
    scores(store, queries)
    assert seen == list(range(N))


def test_row_weights_multiply_the_scores_of_their_rows(tmp_path):
    rows, queries = rows_and_queries()
    store, weight = make(tmp_path, rows), np.linspace(0, 2, N)
    np.testing.assert_allclose(
        scores(store, queries, weight),
        scores(store, queries) * weight.astype(np.float32),
        rtol=1e-6,
    )


def test_small_differences_survive_a_large_common_part(tmp_path):
    """At tiny damping a preconditioned query is mostly orthogonal to the rows: float32 sums would
    lose the rest.
    """
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((20, 64)).astype(np.float32)
    normal = np.linalg.qr(rows.T.astype(np.float64), mode="complete")[0][:, 40]
    small = rng.standard_normal(64)
    found = scores(make(tmp_path, rows), (small + 1e8 * normal)[None, None])[0, 0]
    np.testing.assert_allclose(found, rows.astype(np.float64) @ small, rtol=1e-5, atol=1e-5)


def test_identical_rows_tie_and_rank_by_index(tmp_path):
    rows, queries = rows_and_queries()
    rows[[40, 7, 23]] = 5 * queries[0, 0].astype(np.float32)
    ranked = ranking(scores(make(tmp_path, rows), queries), k=3)
    assert ranked[0, 0].tolist() == [7, 23, 40]


@pytest.mark.parametrize("widths", [[K], [5, 7]])
def test_solving_and_scoring_in_one_is_both_in_turn(tmp_path, widths):
    rows, queries = rows_and_queries()
    store, asked, dampings = make(tmp_path, rows), queries[:, 0], (0.01, 1.0)
    fisher, weight = fisher_for(widths, Budget()), np.linspace(0, 2, N)
    found = precondition_and_score(store, asked, dampings, fisher, weight)
    assert found.shape == (2, 3, N) and found.dtype == np.float32
    want = scores(store, fisher.solve(store, asked, dampings), weight)
    np.testing.assert_array_equal(found, want)
    with pytest.raises(UserError, match="score fewer queries"):
        many = np.repeat(asked, 60, 0)
        precondition_and_score(store, many, dampings, fisher_for([5, 7], Budget(30_000)))


def test_bad_input_is_named(tmp_path):
    rows, queries = rows_and_queries()
    store = make(tmp_path, rows)
    with pytest.raises(UserError, match="queries of 11 values do not fit .* of 12"):
        scores(store, queries[:, :, :11])
    with pytest.raises(UserError, match=r"shape \[52\]; give row_weight .* 53 rows"):
        scores(store, queries, np.ones(52))
    with pytest.raises(UserError, match="weight of sample 5 is NaN"):
        scores(store, queries, np.where(np.arange(N) == 5, np.nan, 1.0))
    with pytest.raises(UserError, match="score fewer queries"):
        scores(store, queries, max_memory=100)
