"""Benchmark of scoring: nine explicit inverses, as the public reference does it, against
`fisher.precondition` and `scores`.

Rows are synthetic: a power-law part of rank RANK plus noise, so that the spectrum has a head and a
floor as gradients have. Queries are copies of rows, noise added; at the smallest damping each must
rank its own row first.
"""

import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ...scoring.fisher import (
    choose_method,
    compute_gram,
    gram,
    gram_path,
    gram_solutions,
    krylov_solutions,
    precondition,
    relative_residuals,
    row_product,
    shifts,
    trace,
)
from ...scoring.scores import scores, top_k
from ...store.shards import Store

RANK = 64
BLOCK_ROWS = 500
NUM_SPLIT = 16
# above this k the explicit inverses are not run: nine at k = 8192 take ten minutes and more
INVERSES_MAX = 4096
# of them the streamed answer is checked against float64 Cholesky where k is too large for that
COLUMNS = 2048
WHOLE_RUN_SECONDS = 180  # no further round after so many seconds of explicit inverses


def bench_scoring(n, k, dampings, num_queries, workdir, max_memory, dtype="float16", method="auto"):
    """Time scoring of `num_queries` queries at all dampings over n rows of k values written to
    workdir; returns JSON-ready facts.

    Always: seconds of the first call (nothing cached: K or the streamed products included) and,
    unless products are streamed, of a second call; peak RSS in GiB; `relative_residual`, the
    largest ||(K + lambda I) z - q|| / ||q|| recomputed in float64 from the stored rows;
    `own_row_first`, the share of queries whose own row ranks first at the smallest damping. Above
    INVERSES_MAX also `columns_max_rel_error`, see `columns_error`.

    If k <= INVERSES_MAX also the reference, in float32 with X and K in memory: for each damping M =
    solve(K + lambda I, I), then scores. Both sides are given the same K (not timed) and serve one
    query with all dampings; ours is Lanczos, its residual check and the scores with rows read from
    disk. A round is one inverse of the reference, times the dampings, and one run of ours; seconds
    and ratios are medians over rounds, one a damping:

    - `scoring_speedup`: the reference literally, (X M)^T first and then q times it, / ours; with
    its range over rounds; - `scoring_speedup_cheaper_order`: the reference with q M first, which
    leaves little but the inverses, / ours; - `max_rel_error`: largest |score - exact| / max |exact|
    over dampings, exact from float64; `reference_max_rel_error` alike.
    """
    store = synthetic_store(Path(workdir), n, k, dtype)
    own = np.arange(num_queries) * (n // num_queries)
    noise = np.random.default_rng(1).standard_normal((num_queries, k))
    queries = store.rows(own) + 0.1 * noise
    method = choose_method(store, num_queries, max_memory, method)
    gram_path(store, torch.float64).unlink(missing_ok=True)
    result = {
        "n": n,
        "k": k,
        "num_queries": num_queries,
        "dtype": dtype,
        "method": method,
        "threads": torch.get_num_threads(),
    }
    # Streamed products leave nothing behind that a second call could use.
    for name in ("first_call_seconds", "next_call_seconds")[: 1 if method == "krylov_rows" else 2]:
        started = time.perf_counter()
        solutions = precondition(store, queries, dampings, max_memory, method)
        values = scores(store, solutions, max_memory=max_memory)
        result[name] = time.perf_counter() - started
    smallest = int(np.argmin(dampings))
    result["own_row_first"] = float((top_k(values[smallest], 1)[:, 0] == own).mean())
    result["peak_rss_gib"] = peak_rss_gib()  # before the reference, which holds more
    lambdas = shifts(dampings, trace(store), k)
    residual = relative_residuals(
        row_product(store), torch.from_numpy(queries), lambdas, torch.from_numpy(solutions)
    )
    result["relative_residual"] = residual.max().item()
    if k <= INVERSES_MAX:
        return result | compare_with_inverses(store, queries[:1], dampings, max_memory)
    return result | {
        "columns_checked": COLUMNS,
        "columns_max_rel_error": columns_error(store, queries[:1], dampings, max_memory),
    }


def synthetic_store(folder, n, k, dtype):
    """Write the synthetic rows, or reuse (and resume) what an earlier run wrote with the same
    settings.
    """
    identity = {"synthetic": "power law plus noise", "rank": RANK, "block": BLOCK_ROWS, "seed": 0}
    store = Store.create(folder, n, k, NUM_SPLIT, dtype, identity, provenance={})
    head = torch.randn(RANK, k, generator=torch.Generator().manual_seed(0)) * (
        4 * torch.arange(1, RANK + 1)[:, None] ** -0.75
    )
    for shard in store.pending():
        stop = store.shard_range(shard)[1]
        for start in range(store.resume_row(shard), stop, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, stop - start)
            generator = torch.Generator().manual_seed(1 + start)
            block = torch.randn(rows, RANK, generator=generator) @ head + torch.randn(
                rows, k, generator=generator
            )
            store.append(shard, (block / k**0.5).numpy(), start)
        store.finish(shard)
    return store


class FirstColumns:
    """The first `dim` columns of a store, held in memory as float32 and read by the same call."""

    def __init__(self, store, dim):
        self.folder, self.num_rows, self.dim = store.folder, store.num_rows, dim
        self.values = torch.cat(
            [block[:, :dim].clone() for _, block in store.tensor_blocks(BLOCK_ROWS)]
        )

    def tensor_blocks(self, max_rows, device="cpu"):
        """As `Store.tensor_blocks`."""
        for start in range(0, self.num_rows, max_rows):
            yield start, self.values[start : start + max_rows].to(device)


def columns_error(store, query, dampings, max_memory):
    """`max_rel_error` of the streamed scores when the store ends after COLUMNS columns: exact is
    one Cholesky a damping.
    """
    part = FirstColumns(store, COLUMNS)
    query = query[:, :COLUMNS]
    kernel = compute_gram(part, torch.float64, max_memory)
    lambdas = shifts(dampings, kernel.trace(), COLUMNS)
    solutions = krylov_solutions(row_product(part), torch.from_numpy(query), lambdas, max_memory)
    found = scores(part, solutions.numpy(), max_memory=max_memory)[:, 0]
    return relative_error(found, exact_scores(kernel, part.values, query, lambdas))


def compare_with_inverses(store, query, dampings, max_memory):
    """Reference against ours for one query given K; see `bench_scoring`."""
    kernel = gram(store, max_memory, cache=False)
    lambdas = shifts(dampings, kernel.diagonal().double().sum(), store.dim)
    rows = torch.cat([block for _, block in store.tensor_blocks(BLOCK_ROWS)])
    exact = exact_scores(kernel.double(), rows, query, lambdas)
    single, ours, inverses, found = kernel.float(), [], [], []
    for damping in tqdm(lambdas.float(), desc="rounds of an inverse and our scores"):
        values, *seconds = explicit_inverse(single, rows, query, damping)
        found.append(values)
        inverses.append(seconds)
        started = time.perf_counter()
        solutions = gram_solutions(kernel, torch.from_numpy(query), lambdas, max_memory)
        values = scores(store, solutions.numpy(), max_memory=max_memory)[:, 0]
        ours.append(time.perf_counter() - started)
        if sum(seconds for seconds, _ in inverses) > WHOLE_RUN_SECONDS:
            break
    literal, cheaper = zip(*inverses)
    speedup, spread = ratio(literal, ours, len(lambdas))
    return {
        "ours_seconds": statistics.median(ours),
        "reference_seconds": statistics.median(literal) * len(lambdas),
        "reference_cheaper_order_seconds": statistics.median(cheaper) * len(lambdas),
        "rounds": len(ours),
        "scoring_speedup": speedup,
        "scoring_speedup_spread": spread,
        "scoring_speedup_cheaper_order": ratio(cheaper, ours, len(lambdas))[0],
        "max_rel_error": relative_error(values, exact),
        "reference_max_rel_error": relative_error(torch.stack(found).numpy(), exact[: len(found)]),
    }


def explicit_inverse(kernel, rows, query, damping):
    """The reference at one damping in float32: (scores [N], seconds, seconds with q M first)."""
    query, identity = torch.from_numpy(query).float(), torch.eye(len(kernel))
    started = time.perf_counter()
    inverse = torch.linalg.solve(kernel + damping * identity, identity)
    solved = time.perf_counter()
    found = (query @ (rows @ inverse).T)[0]
    literal = time.perf_counter()
    query @ inverse @ rows.T
    return found, literal - started, solved - started + time.perf_counter() - literal


def exact_scores(kernel, rows, query, lambdas):
    """float64 scores [D, N] by one Cholesky solve a damping."""
    identity, right = torch.eye(len(kernel), dtype=torch.float64), torch.from_numpy(query).T
    solved = [
        torch.cholesky_solve(right, torch.linalg.cholesky(kernel + damping * identity))
        for damping in lambdas
    ]
    return (rows.double() @ torch.cat(solved, dim=1)).T.numpy()


def relative_error(found, exact):
    """max over dampings of max_i |found - exact| / max_i |exact|."""
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())


def ratio(slow, fast, factor=1.0):
    """(median, [least, greatest]) over rounds of slow / fast seconds, times `factor`."""
    values = [factor * a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(values), [min(values), max(values)]


def restart_peak_rss():
    """Let `peak_rss_gib` count from here on, and return what is resident now, GiB; off Linux it
    counts from the process's start.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_gib()


def peak_rss_gib():
    """Peak resident memory of this process so far, or since `restart_peak_rss`, GiB.

    Not ru_maxrss where there is another way: on Linux a new process begins with that of its parent.
    """
    with contextlib.suppress(OSError, StopIteration):
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
