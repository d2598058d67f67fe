"""The space of the codes keeps the scores, and spreads them evenly."""

import numpy as np
import pytest
import torch
from indexed_rows import WIDTHS, make_store, solved_queries

from concept_trak.errors import UserError
from concept_trak.index.whitening import BIT_PADDING, Whitening, factors, kept_dim, whitening
from concept_trak.scoring.scores import scores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def test_inner_products_are_the_scores_but_for_what_is_left_out(store):
    space, solved = whitening(store, WIDTHS, 1.0), solved_queries(store)[1]
    exact = scores(store, solved[None])[0]
    rows, asked = store.tensor_rows(range(store.num_rows)), torch.from_numpy(solved)
    found = (space.queries(asked) @ space.rows(rows).T).numpy()
    assert space.dim == 256 < store.dim
    for one, other in zip(found, exact, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.98  # a fifth is left out: that with the least say
    kept_all = np.abs(found - exact).max()
    assert kept_all > 0  # else nothing was left out, and the test says little


def test_all_coordinates_give_the_scores_themselves(store):
    rotations = [torch.linalg.qr(torch.randn(side, side))[0] for side in (16, 20)]
    vectors = tuple(torch.linalg.qr(torch.randn(width, width))[0] for width in WIDTHS)
    scale, mean = torch.linspace(1, 3, 320), torch.randn(320)
    space = Whitening(vectors, WIDTHS, torch.randperm(320), scale, *rotations, mean)
    solved, rows = torch.randn(2, 320), store.tensor_rows(range(50))
    asked = space.queries(solved)
    found = asked @ space.rows(rows).T + (asked @ mean)[:, None]
    torch.testing.assert_close(found, solved @ rows.T, rtol=1e-3, atol=1e-3)


def test_a_whitened_row_has_no_direction_that_rules(store):
    space = whitening(store, WIDTHS, 0.1)
    spread = space.rows(store.tensor_rows(range(store.num_rows))).std(0)
    before = store.tensor_rows(range(store.num_rows)).std(0)
    assert spread.max() / spread.min() < 1.6
    assert before.max() / before.min() > 1.8


def test_the_same_store_gives_the_same_space_and_a_file_keeps_it(store, tmp_path):
    one, other = (whitening(store, WIDTHS, 1.0) for _ in range(2))
    one.save(tmp_path / "space.safetensors")
    kept = Whitening.load(tmp_path / "space.safetensors", WIDTHS, mend="make it")
    rows = store.tensor_rows(range(20))
    assert torch.equal(one.rows(rows), other.rows(rows))
    assert torch.equal(one.rows(rows), kept.rows(rows))
    (tmp_path / "space.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="space.safetensors is not a safetensors file.*; make it"):
        Whitening.load(tmp_path / "space.safetensors", WIDTHS, mend="make it")


def test_a_block_without_any_gradient_and_a_wide_one_do(tmp_path, monkeypatch):
    monkeypatch.setattr("concept_trak.index.whitening.EIGEN_MAX", 100)
    store = make_store(tmp_path)  # the last block is too wide for eigenvectors
    space = whitening(store, WIDTHS, 1.0)
    assert [len(v) for v in space.vectors] == [96, 96, 0]
    solved = solved_queries(store)[1]
    exact = scores(store, solved[None])[0, 0]
    asked = space.queries(torch.from_numpy(solved[:1]))
    found = (asked @ space.rows(store.tensor_rows(range(store.num_rows))).T)[0].numpy()
    assert np.corrcoef(found, exact)[0, 1] > 0.9
    with pytest.raises(UserError, match="blocks of 10 features do not fit"):
        whitening(store, (10,), 1.0)


def test_one_bit_a_kept_coordinate_is_a_sixteenth_of_float16():
    for dim in (4032, 4096, 32_768):
        kept = kept_dim(dim)
        assert kept % BIT_PADDING == 0 and 2 * dim / (kept / 8 + 8) >= 16
        a, b = factors(kept)
        assert a * b == kept and a > kept**0.5 / 8  # else it costs as much as a whole one
    assert kept_dim(4032, 0.5) == 1984 and kept_dim(100) == 100
