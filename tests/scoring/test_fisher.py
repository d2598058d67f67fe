"""Properties of the damped inverse Fisher: every method against a float64 solve."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.scoring import block_lanczos, fisher, gram, gram_float32
from concept_trak.scoring.block_lanczos import shifted_solve
from concept_trak.scoring.fisher import BlockFisher, FullFisher, choose_method, fisher_for
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.scores import scores
from concept_trak.store import array_cache as cached
from concept_trak.store.store import Layout, Store

DAMPINGS = tuple(0.1 * 10.0**p for p in range(-4, 5))
MEMORY = 2**30
METHODS = ["primal", "dual", "krylov_gram", "krylov_compact", "krylov_rows"]


def synthetic(num_rows, dim, seed=0, decay=1.0):
    """Rows with a power-law spectrum, as gradients have."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, dim + 1) ** -decay
    return (
        rng.standard_normal((num_rows, dim))
        * scale
        @ np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    ).astype(np.float32)


def make(folder, rows, dtype="float32", num_split=3):
    store = Store.create(folder, Layout(*rows.shape, num_split, dtype), {}, provenance={})
    for shard in range(num_split):
        start, stop = store.shard_range(shard)
        store.append(shard, rows[start:stop], start)
        store.finish(shard)
    return store


def precondition(store, queries, dampings, memory, method="auto"):
    return FullFisher(Budget(memory), method).solve(store, queries, dampings)


def by_blocks(store, queries, widths, memory=MEMORY):
    return fisher_for(widths, Budget(memory)).solve(store, queries, DAMPINGS)


def direct(rows, queries, dampings=DAMPINGS):
    """[D, Q, k] by float64 solves against each K + lambda I."""
    rows = rows.astype(np.float64)
    kernel = rows.T @ rows
    mean = np.trace(kernel) / len(kernel)
    return np.stack(
        [
            np.linalg.solve(kernel + damping * mean * np.eye(len(kernel)), queries.T).T
            for damping in dampings
        ]
    )


def assert_close(found, expected, tolerance):
    """Relative to the norm of each solution."""
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < tolerance, error.max()


def queries_for(rows, count=3):
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((count, len(rows))) @ rows + 0.01 * rng.standard_normal(
        (count, rows.shape[1])
    )
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_rows, dim", [(300, 60), (40, 150), (90, 90)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_all_lambdas_equal_direct_solve(tmp_path, method, num_rows, dim, decay):
    rows = synthetic(num_rows, dim, decay=decay)
    queries = queries_for(rows)
    found = precondition(make(tmp_path, rows), queries, DAMPINGS, MEMORY, method)
    assert found.shape == (9, 3, dim)
    assert_close(found, direct(rows, queries), 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_rows_are_used_as_they_are_stored(tmp_path, dtype):
    rows = synthetic(200, 50)
    store = make(tmp_path, rows, dtype)
    stored = store.rows(range(len(rows)))
    for method in METHODS:
        assert_close(
            precondition(store, queries_for(rows), DAMPINGS, MEMORY, method),
            direct(stored, queries_for(rows)),
            1e-6,
        )


def test_dual_equals_primal_down_to_tiny_damping(tmp_path):
    rows = synthetic(30, 200)
    store, queries = make(tmp_path, rows), queries_for(rows)
    tiny = (1e-8, 1e-6)
    assert_close(
        precondition(store, queries, tiny, MEMORY, "dual"),
        precondition(store, queries, tiny, MEMORY, "primal"),
        1e-5,
    )


def test_query_in_the_span_of_the_rows_keeps_its_accuracy(tmp_path):
    """The solution is then far smaller than q / lambda: the hard case for the dual form and for
    Krylov.
    """
    rows = synthetic(20, 100, decay=0.5)
    store, queries = (
        make(tmp_path, rows),
        np.random.default_rng(2).standard_normal((2, 20)) @ rows.astype(np.float64),
    )
    for method in METHODS:
        assert_close(
            precondition(store, queries, DAMPINGS, MEMORY, method), direct(rows, queries), 1e-5
        )


@pytest.mark.parametrize("method", METHODS)
def test_query_precondition_equals_row_precondition(tmp_path, method):
    rows = synthetic(80, 40)
    store, queries = make(tmp_path, rows), queries_for(rows)
    on_queries = scores(store, precondition(store, queries, DAMPINGS, MEMORY, method))
    on_rows = direct(rows, rows.astype(np.float64)) @ queries.T  # [D, N, Q]
    expected = on_rows.transpose(0, 2, 1)
    assert np.abs(on_queries - expected).max(axis=2).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_large_damping_ranks_as_dot_product(tmp_path, method):
    rows = synthetic(120, 30)
    store, queries = make(tmp_path, rows), queries_for(rows)
    found = scores(store, precondition(store, queries, (1e7,), MEMORY, method))[0]
    np.testing.assert_array_equal(
        np.argsort(found), np.argsort(queries @ rows.T.astype(np.float64))
    )


@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_rows_changes_no_ranking(tmp_path, method):
    """Dampings are relative to the mean eigenvalue: scores scale by 1/c, for every damping."""
    rows = synthetic(60, 30)
    one = make(tmp_path / "one", rows)
    two = make(tmp_path / "two", 4 * rows)
    small, large = (
        scores(s, precondition(s, queries_for(rows), DAMPINGS, MEMORY, method)) for s in (one, two)
    )
    np.testing.assert_allclose(large * 4, small, rtol=1e-4, atol=1e-6 * np.abs(small).max())


def test_gram_does_not_depend_on_tiles_blocks_or_shards(tmp_path, monkeypatch):
    rows = synthetic(101, 37)
    expected = rows.T.astype(np.float64) @ rows
    monkeypatch.setattr(gram, "GRAM_TILE", 5)
    monkeypatch.setattr(gram, "GRAM_ROWS", 7)
    for num_split in (1, 4):
        store = make(tmp_path / f"{num_split}", rows, num_split=num_split)
        kernel = gram.compute_gram(store, MEMORY).numpy()
        np.testing.assert_array_equal(kernel, kernel.T)
        assert np.abs(kernel - expected).max() <= 1e-12 * np.abs(expected).max()


def test_products_do_not_depend_on_the_block_size(tmp_path, monkeypatch):
    rows = synthetic(50, 20)
    store, vectors = make(tmp_path, rows), torch.randn(gram.SYMV_MAX + 1, 20, dtype=torch.float64)
    whole = gram.row_product(store)(vectors)
    monkeypatch.setattr(gram, "STREAM_VALUES", 60)
    torch.testing.assert_close(gram.row_product(store)(vectors), whole, rtol=1e-12, atol=1e-14)
    kernel = torch.from_numpy(rows.T @ rows).double()
    for some in (vectors, vectors[1:], vectors[:1]):
        torch.testing.assert_close(
            gram.gram_product(kernel)(some), some @ kernel, rtol=1e-12, atol=1e-14
        )


def test_gram_is_cached_under_the_stores_checksum(tmp_path, monkeypatch):
    rows = synthetic(50, 20)
    store = make(tmp_path, rows)
    first = precondition(store, queries_for(rows), DAMPINGS, MEMORY, "krylov_gram")
    cached = list(tmp_path.glob("gram-*.npy"))
    assert [path.name for path in cached] == [f"gram-float64-{store.checksum[:16]}.npy"]
    monkeypatch.setattr(gram, "compute_gram", None)  # a second computation would raise
    np.testing.assert_array_equal(
        precondition(store, queries_for(rows), DAMPINGS, MEMORY, "krylov_gram"), first
    )


@pytest.mark.parametrize("spoilt", ["noise", "truncated", "record", "no record", "of another"])
def test_a_gram_cache_that_is_not_the_one_that_was_made_is_made_again(tmp_path, spoilt):
    rows = synthetic(50, 20)
    store = make(tmp_path, rows)
    kernel = gram.gram(store, Budget()).numpy().copy()
    (path,) = tmp_path.glob("gram-*.npy")
    if spoilt == "noise":
        np.save(path, np.random.default_rng(0).normal(size=kernel.shape))
    elif spoilt == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif spoilt == "record":
        path.with_suffix(".json").write_text("[1]")
    elif spoilt == "no record":
        path.with_suffix(".json").unlink()
    else:
        cached.write_cached(path, {"store": "another", "dtype": "torch.float64"}, 2 * kernel)
    np.testing.assert_array_equal(gram.gram(store, Budget()).numpy(), kernel)
    np.testing.assert_array_equal(np.load(path), kernel)


@pytest.mark.parametrize("method", ["krylov_gram", "krylov_compact"])
def test_a_cache_that_cannot_be_written_costs_only_a_warning(tmp_path, request, method):
    rows = synthetic(50, 20)
    store = make(tmp_path, rows)
    request.getfixturevalue("full_disk")
    with pytest.warns(UserWarning, match="could not be cached") as told:
        found = precondition(store, queries_for(rows), DAMPINGS, MEMORY, method)
    assert len(told) == 1
    assert_close(found, direct(rows, queries_for(rows)), 1e-6)
    assert not list(tmp_path.rglob("*gram-*/*.npy")) and not list(tmp_path.glob("gram-*"))


@pytest.fixture
def small_bands(monkeypatch):
    """Several bands of a K of a few dozen rows, and a head that leaves most of its spectrum."""
    monkeypatch.setattr(gram_float32, "BAND", 16)
    monkeypatch.setattr(gram_float32, "HEAD", 5)


def test_compact_gram_is_k_up_to_the_rounding_of_its_remainder(tmp_path, small_bands):
    rows = synthetic(300, 50) * np.float32(1e3)
    store, eye = make(tmp_path, rows), torch.eye(50, dtype=torch.float64)
    found = gram_float32.compact_gram(store, Budget(MEMORY))
    assert len(found.bands) == 4 and {band.dtype for band in found.bands} == {torch.float32}
    whole = rows.T.astype(np.float64) @ rows
    values = np.linalg.eigvalsh(whole)
    error = np.linalg.norm(found.product(eye).numpy() - whole, 2)
    # a float32 matrix errs by 1e-7 of the largest eigenvalue, this one of the sixth largest
    assert error < 3e-7 * values[-6] < 0.1 * 3e-7 * values[-1]


def test_rounding_of_a_compact_gram_is_taken_out(tmp_path, monkeypatch, small_bands):
    """Where the spectrum falls over four orders below the head and the query is of all directions;
    without refinement the answer is refused.
    """
    rows = synthetic(300, 50, decay=2.0)
    store, queries = make(tmp_path, rows), np.random.default_rng(3).standard_normal((3, 50))
    found = precondition(store, queries, (1e-7, 1e-2), MEMORY, "krylov_compact")
    lambdas = gram.damping_to_lambda((1e-7, 1e-2), gram.trace(store), 50)
    asked = (torch.from_numpy(queries), lambdas, torch.from_numpy(found))
    assert block_lanczos.relative_residuals(gram.row_product(store), *asked).max() < 1e-6
    monkeypatch.setattr(block_lanczos, "REFINEMENTS", 0)
    with pytest.raises(UserError, match="reached a relative residual"):
        precondition(store, queries, (1e-7, 1e-2), MEMORY, "krylov_compact")


def test_the_largest_of_many_residuals_is_found_by_few_products(tmp_path, small_bands):
    """One spoilt solution among twenty: exactly at the smallest shift, nearly at another."""
    rows = synthetic(200, 40)
    queries = torch.from_numpy(queries_for(rows, 20))
    lambdas = torch.tensor([0.1, 1.0], dtype=torch.float64)
    product = gram.row_product(make(tmp_path, rows))
    exact = block_lanczos.krylov_solutions(product, queries, lambdas, MEMORY)
    assert block_lanczos._sampled_residuals(product, queries, lambdas, exact).max() < 1e-7
    for shift in (0, 1):
        spoilt = exact.clone()
        spoilt[shift, 7] *= 1 + 1e-3
        largest = block_lanczos.relative_residuals(product, queries, lambdas, spoilt).amax(1)
        found = block_lanczos._sampled_residuals(product, queries, lambdas, spoilt)
        assert found[1 - shift] < 1e-7
        within = (0.999, 1.001) if shift == 0 else (0.1, 5)
        assert within[0] < found[shift] / largest[shift] < within[1]


WIDE = """
import torch
from concept_trak.scoring.gram import gram_product
from concept_trak.scoring.block_lanczos import gram_solutions, relative_residuals

torch.set_num_threads(2)
torch.set_num_threads(1)
torch.set_num_threads(2)
rows = torch.randn(1000, 1000, dtype=torch.float64)
kernel, lambdas = rows @ rows.T, torch.tensor([1.0, 10.0], dtype=torch.float64)
found = gram_solutions(kernel, rows, lambdas, 2**30)
assert relative_residuals(gram_product(kernel), rows, lambdas, found).max() < 1e-6
"""


def test_a_wide_block_ends_in_two_threads():
    """MKL's LU of one does not, once the number of threads was changed."""
    done = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_matrix_that_is_not_positive_definite_is_refused_with_the_shift():
    queries = torch.eye(3, 8, dtype=torch.float64)
    lambdas = torch.tensor([0.5, 2.0], dtype=torch.float64)  # -I + 2 I is
    with pytest.raises(UserError, match=r"K \+ 5\.0e-01 is not positive definite"):
        shifted_solve(lambda rows: -rows, queries, lambdas, 1e-8, 10)


def test_finished_bands_of_a_killed_run_are_not_made_again(tmp_path, monkeypatch, small_bands):
    rows = synthetic(200, 50)
    store, made, bands = make(tmp_path, rows), [], gram_float32._bands

    def killed(store, head, edges, device):
        made.append(edges)
        if len(made) == 3:
            raise KeyboardInterrupt
        return bands(store, head, edges, device)

    monkeypatch.setattr(
        gram_float32, "_groups", lambda edges, dim, size: [[edge] for edge in edges]
    )
    monkeypatch.setattr(gram_float32, "_bands", killed)
    with pytest.raises(KeyboardInterrupt):
        gram_float32.compact_gram(store, Budget(MEMORY))
    found = gram_float32.compact_gram(store, Budget(MEMORY))
    assert [edge for edges in made for edge in edges] == [
        (0, 16), (16, 32), (32, 48), (32, 48), (48, 50)
    ]  # fmt: skip
    again = gram_float32.compact_gram(store, Budget(MEMORY))
    assert len(made) == 5
    fresh = gram_float32.compact_gram(make(tmp_path / "other", rows), Budget(MEMORY, cache=False))
    for one, two, three in zip(found.bands, again.bands, fresh.bands, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_compact_gram_of_another_store_is_removed_and_a_spoilt_file_made_again(
    tmp_path, small_bands
):
    rows = synthetic(100, 50)
    store = make(tmp_path, rows)
    old = tmp_path / "compact-gram-0123456789abcdef"
    old.mkdir()
    first = gram_float32.compact_gram(store, Budget(MEMORY))
    assert not old.exists()
    band = gram_float32.compact_folder(store) / "band-16.npy"
    band.write_bytes(band.read_bytes()[:-4])
    assert torch.equal(gram_float32.compact_gram(store, Budget(MEMORY)).bands[1], first.bands[1])


def test_auto_chooses_by_shape_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "DIRECT_MAX", 32)
    wide = make(tmp_path / "wide", synthetic(20, 64))
    tall = make(tmp_path / "tall", synthetic(90, 32))
    large = make(tmp_path / "large", synthetic(90, 64))
    assert choose_method(wide, 1, MEMORY) == "dual"
    assert choose_method(wide, 1, 2**14) == "krylov_rows"
    assert choose_method(tall, 1, MEMORY) == "primal"
    assert choose_method(large, 1, MEMORY) == "krylov_gram"
    assert choose_method(large, 1, 2**14) == "krylov_rows"
    assert choose_method(large, 1, 5 * 8 * 64**2) == "krylov_gram"
    monkeypatch.setattr(fisher, "compact_bytes", lambda dim: 2 * dim * dim)
    assert choose_method(large, 1, 4 * 2 * 64**2) == "krylov_compact"
    assert fisher._gram_pays(4096, 1, 5e-11) and not fisher._gram_pays(32768, 1, 5e-11)
    assert fisher._gram_pays(32768, 1, 1.2e-11)


@pytest.mark.parametrize("bases", [1, 3, 100])
def test_krylov_serves_many_queries_in_groups_and_zero_queries(tmp_path, monkeypatch, bases):
    """However many queries fit in the memory at a time, and although it starts again and again."""
    monkeypatch.setattr(block_lanczos, "MAX_BLOCK", 4)
    rows = synthetic(200, 50, decay=0.3)
    store, queries = make(tmp_path, rows), queries_for(rows, count=7)
    queries[3] = 0
    found = precondition(store, queries, DAMPINGS, 2 * 8 * 50 * 4 * bases, "krylov_rows")
    assert (found[:, 3] == 0).all()
    kept = [i for i in range(7) if i != 3]
    assert_close(found[:, kept], direct(rows, queries[kept]), 1e-6)


def test_queries_share_what_they_find_of_the_spectrum():
    """Eight together take fewer products than one alone: the head is found by all."""
    rows = synthetic(400, 200, decay=1.0).astype(np.float64)
    kernel = torch.from_numpy(rows.T @ rows)
    queries = torch.randn(8, 200, dtype=torch.float64)
    shift = kernel.diagonal().mean()[None] * 1e-3

    def products(asked):
        calls = []
        block_lanczos.shifted_solve(
            lambda v: calls.append(len(v)) or v @ kernel, asked, shift, 1e-8, 500
        )
        return len(calls)

    assert products(queries) < 0.5 * products(queries[:1])


def test_dependent_queries_are_solved(tmp_path):
    rows = synthetic(200, 50)
    one = queries_for(rows, 2)
    queries = np.concatenate([one, one, one[:1] + one[1:]])
    for method in ("krylov_gram", "krylov_rows", "krylov_compact"):
        found = precondition(make(tmp_path / method, rows), queries, DAMPINGS, MEMORY, method)
        assert_close(found, direct(rows, queries), 1e-6)


def test_krylov_estimates_its_true_residual():
    matrix = torch.from_numpy(synthetic(100, 60)).double()
    matrix = matrix.T @ matrix
    queries, lambdas = (
        torch.randn(2, 60, dtype=torch.float64),
        torch.tensor([1e-3, 1e-1], dtype=torch.float64),
    )
    for iterations in (3, 10, 25):
        solution, estimate = shifted_solve(lambda v: v @ matrix, queries, lambdas, 0.0, iterations)
        true = block_lanczos.relative_residuals(lambda v: v @ matrix, queries, lambdas, solution)
        torch.testing.assert_close(estimate, true, rtol=1e-6, atol=1e-10)


def test_krylov_that_does_not_converge_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(block_lanczos, "MAX_ITERATIONS", 4)
    rows = synthetic(200, 50)
    with pytest.raises(UserError, match="reached a relative residual of .* after 4 iterations"):
        precondition(make(tmp_path, rows), queries_for(rows), DAMPINGS, MEMORY, "krylov_rows")


@pytest.mark.parametrize("iterations", [1000, 4])
def test_solving_leaves_the_number_of_threads_alone(tmp_path, monkeypatch, iterations):
    monkeypatch.setattr(block_lanczos, "MAX_ITERATIONS", iterations)
    rows, threads = synthetic(200, 50), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(UserError):  # of the four iterations that do not suffice
            precondition(
                make(tmp_path, rows), queries_for(rows, 1), DAMPINGS, MEMORY, "krylov_gram"
            )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_bad_input_is_named(tmp_path):
    store = make(tmp_path / "a", synthetic(50, 20))
    good = np.ones((1, 20))
    with pytest.raises(UserError, match=r"shape \[1, 19\]; give queries of 20"):
        precondition(store, np.ones((1, 19)), DAMPINGS, MEMORY)
    with pytest.raises(UserError, match="NaN or infinite"):
        precondition(store, good * np.nan, DAMPINGS, MEMORY)
    with pytest.raises(UserError, match="a damping of 0 .* above 0"):
        precondition(store, good, (1.0, 0), MEMORY)
    with pytest.raises(UserError, match="unknown method 'qr'"):
        precondition(store, good, DAMPINGS, MEMORY, "qr")
    with pytest.raises(UserError, match="raise MAX_MEMORY or use krylov"):
        precondition(store, good, DAMPINGS, 100, "primal")
    with pytest.raises(UserError, match="every row of the store is zero"):
        precondition(make(tmp_path / "b", np.zeros((5, 20), np.float32)), good, DAMPINGS, MEMORY)


@pytest.mark.parametrize("widths", [[10, 25, 5], [40]])
def test_blocks_are_solved_each_by_itself(tmp_path, widths, monkeypatch):
    monkeypatch.setattr(gram, "GRAM_ROWS", 7)
    rows = synthetic(60, 40)
    queries, edges = queries_for(rows), np.cumsum(widths)[:-1]
    pairs = zip(np.split(rows, edges, 1), np.split(queries, edges, 1), strict=True)
    want = np.concatenate([direct(r, q) for r, q in pairs], 2)
    solver = fisher_for(widths, Budget(MEMORY))
    assert type(solver) is (BlockFisher if len(widths) > 1 else FullFisher)
    assert_close(solver.solve(make(tmp_path, rows), queries, DAMPINGS), want, 1e-8)


def test_a_block_without_gradients_has_no_say(tmp_path):
    rows = synthetic(60, 40)
    rows[:, 10:] = 0
    queries = queries_for(rows) + 1e-3
    found = by_blocks(make(tmp_path, rows), queries, [10, 30])
    assert_close(found[:, :, :10], direct(rows[:, :10], queries[:, :10]), 1e-8)
    assert not found[:, :, 10:].any()


def test_blocks_that_cannot_be_solved_are_named(tmp_path):
    store = make(tmp_path / "a", synthetic(60, 40))
    with pytest.raises(UserError, match="blocks of 41 features do not fit"):
        by_blocks(store, np.ones((1, 40)), [20, 21])
    with pytest.raises(UserError, match="raise MAX_MEMORY"):
        by_blocks(store, np.ones((1, 40)), [20, 20], memory=1000)
    with pytest.raises(UserError, match=r"shape \[1, 39\]; give queries of 40"):
        by_blocks(store, np.ones((1, 39)), [20, 20])
    zeros = make(tmp_path / "b", np.zeros((60, 40), np.float32))
    with pytest.raises(UserError, match="every row of the store is zero"):
        by_blocks(zeros, np.ones((1, 40)), [20, 20])


def test_blocks_of_a_large_store_are_kept_and_the_next_query_reads_no_row(tmp_path, monkeypatch):
    store = make(tmp_path, synthetic(50, 12))
    solver, query = BlockFisher(Budget(), (4, 8)), synthetic(1, 12, seed=3)
    once = solver.solve(store, query, DAMPINGS)
    assert not list(tmp_path.glob("gram-*"))  # a pass over few rows costs nothing
    monkeypatch.setattr(fisher, "KEPT_FROM", 1)
    first = solver.solve(store, query, DAMPINGS)
    monkeypatch.setattr(Store, "tensor_blocks", None)
    again = solver.solve(store, query, DAMPINGS)
    assert np.array_equal(once, first) and np.array_equal(first, again)
    with pytest.raises(TypeError):  # other blocks are not those
        BlockFisher(Budget(), (6, 6)).solve(store, query, DAMPINGS)
