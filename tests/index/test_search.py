"""Row weights, recall that is kept with an index, and what it takes on paper."""

import json

import numpy as np
import pytest
from indexed_rows import DAMPINGS, WIDTHS, N, make_store, preconditioner, solved_queries

from concept_trak.index.rabitq import Index
from concept_trak.index.recall import exact_extremes, keep_recall, kept_recall, measure
from concept_trak.index.search import Search
from concept_trak.scoring.ranking import ranking
from concept_trak.scoring.scores import scores
from concept_trak.settings import short_hash
from experiments.scale.capacity import Constants, Node, code_bytes, need, table


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'concept-trak[index]'")
    store = make_store(tmp_path_factory.mktemp("store"))
    made = Index.create(store, WIDTHS, 1.0)
    made.update()
    return made


def test_a_scan_finds_the_ends_of_the_scores(index):
    store, solved = index.store, solved_queries(index.store)[0]
    weight = np.random.default_rng(3).uniform(-1, 1, store.num_rows).astype(np.float32)
    for of_rows in (None, weight):
        ends = exact_extremes(store, solved, 20, of_rows)
        exact = scores(store, solved[None], of_rows)[0]
        assert np.array_equal(ends.top, ranking(exact, True, 20))
        assert np.array_equal(ends.least, ranking(exact, False, 20))


@pytest.mark.parametrize("spread", ["signs", "few are heavy"])
def test_row_weights_let_more_rows_be_looked_at_until_none_can_be_missing(index, spread):
    store, solved = index.store, solved_queries(index.store)
    draw = np.random.default_rng(4)
    weight = draw.choice([-1.0, 1.0], store.num_rows).astype(np.float32)
    if spread == "few are heavy":
        weight = draw.lognormal(0, 1, store.num_rows).astype(np.float32)
    exact = scores(store, solved, weight)
    shares = []
    for q in range(3):
        found = Search(300).find(index, solved[:, q], weight)
        np.testing.assert_allclose(found.scores, exact[:, q, found.rows], rtol=1e-5, atol=1e-7)
        for largest in (True, False):
            for d in range(len(DAMPINGS)):
                shares.append(np.isin(ranking(exact[d, q], largest, 10), found.rows).mean())
    assert np.mean(shares) > 0.95


def test_rows_are_looked_at_as_far_as_weights_reach(index, monkeypatch):
    looked, search = [], Index.search

    def counted(self, solved, count):
        looked.append(count)
        return search(self, solved, count)

    monkeypatch.setattr(Index, "search", counted)
    store, solved = index.store, solved_queries(index.store)[:, 0]
    weight = np.random.default_rng(4).lognormal(0, 1, store.num_rows).astype(np.float32)
    Search(100).find(index, solved, np.ones_like(weight))
    assert max(looked) < store.num_rows
    Search(100).find(index, solved, weight)
    assert max(looked) == store.num_rows  # a weight of twenty may lift any row


def test_measured_recall_is_that_of_the_candidates_and_is_kept(index):
    few, many = Search(12), Search(N)
    measured = measure(index, preconditioner(), DAMPINGS, many)
    assert [entry["damping"] for entry in measured["dampings"]] == list(DAMPINGS)
    assert all(entry["recall_at_10"] == 1 for entry in measured["dampings"])
    worse = measure(index, preconditioner(), DAMPINGS, few)["dampings"][0]
    assert 0.1 < worse["recall_at_10"] < 1 and worse["recall_at_100"] < worse["recall_at_10"]
    low, high = worse["ci95"]
    assert low < worse["recall_at_10"] < high
    keep_recall(index, many, measured)
    assert kept_recall(index, many) == measured
    assert kept_recall(index, few) is None  # of as many candidates nothing is known


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 12])
def test_few_rows_are_indexed_found_and_measured(tmp_path, count):
    pytest.importorskip("faiss")
    store = make_store(tmp_path, num_rows=count, splits=min(count, 2))
    made = Index.create(store, WIDTHS, 1.0)
    made.update()
    measured = measure(made, preconditioner(), DAMPINGS, Search(10))
    assert all(("recall_at_10" in entry) == (count > 10) for entry in measured["dampings"])
    keep_recall(made, Search(10), measured)
    assert kept_recall(made, Search(10)) == measured
    found = Search(10).find(Index.open(store), solved_queries(store)[:, 0])
    assert found.rows.tolist() == [*range(count)]


def spoilt_recall(record):
    """Records that do not say what was measured."""
    other = json.loads(json.dumps(record))
    other["measured"]["dampings"][0]["recall_at_10"] = 0.5
    none = {"queries": 1, "dampings": [{"damping": 1.0, "recall_at_10": 7, "ci95": [0, 1]}]}
    unknown = [{}, [], None, {"dampings": 3}, none, {"queries": 1, "dampings": [{"ci95": []}]}]
    yield from (other, {k: v for k, v in record.items() if k != "checksum"})
    yield from (record | {"measured": m, "checksum": short_hash(m)} for m in unknown)


def test_a_damaged_recall_is_not_told(index):
    search, path = Search(N), index.folder / "recall.json"
    keep_recall(index, search, measure(index, preconditioner(), DAMPINGS, search))
    for spoilt in spoilt_recall(json.loads(path.read_text())):
        path.write_text(json.dumps(spoilt))
        assert kept_recall(index, search) is None


def test_paper_adds_up():
    measured = Constants(4e9, 1e9, 1e8, 1e-5, 4096)
    assert code_bytes(4096) == 4032 / 8 + 8 == 512
    small = need(1e8, 4096, measured, Node(200e9, 8e12, 32))
    assert (small.rows, small.codes, small.nodes) == (8192e8, 512e8, 1)
    assert small.search_seconds == pytest.approx(512e8 / (32 * 4e9) + 2000 * 1e-5 / 32 + 0.01)
    assert small.scan_seconds == pytest.approx(8192e8 / 32e9 + 0.01)
    assert small.build_hours == pytest.approx(4096e8 / 32e8 / 3600)
    large = need(2e9, 32_768, measured, Node(200e9, 8e12, 32))
    assert large.nodes == 41  # 8.2 TB of codes on 41 nodes, 131 TB of rows on 17
    assert need(2e9, 32_768, measured, Node(1e12, 8e12, 32)).nodes == 17
    assert len(table(measured).splitlines()) == 8
    with pytest.raises(ValueError, match="are none"):
        need(0, 4096, measured)
