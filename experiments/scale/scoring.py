"""Benchmark of scoring: nine explicit inverses, as the public reference does it, against
`FullFisher` and `scores`.

Rows are synthetic: a power-law part of rank RANK plus noise, so that the spectrum has a head and a
floor as gradients have. Queries are copies of rows, noise added; at the smallest damping each must
rank its own row first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from concept_trak.scoring.block_lanczos import gram_solutions, krylov_solutions, relative_residuals
from concept_trak.scoring.fisher import FullFisher, choose_method
from concept_trak.scoring.gram import (
    compute_gram,
    damping_to_lambda,
    gram,
    gram_path,
    row_product,
    trace,
)
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.ranking import ranking
from concept_trak.scoring.scores import scores
from concept_trak.settings import DAMPINGS
from concept_trak.store.store import Layout, Store

from .timing import peak_rss_gib, ratio, timed

RANK = 64
BLOCK_ROWS = 500
NUM_SPLIT = 16
# Above this k the explicit inverses are not run: nine at k = 8192 take ten minutes and more.
INVERSES_MAX = 4096
# Where k is larger, the streamed answer for so many columns is checked against Cholesky.
COLUMNS = 2048
WHOLE_RUN_SECONDS = 180  # no further round after so many seconds of explicit inverses


@dataclass(frozen=True)
class Case:
    """num_queries queries against n rows of k values, at all dampings, within max_memory bytes."""

    n: int
    k: int
    num_queries: int
    max_memory: int
    dampings: Sequence[float] = DAMPINGS
    dtype: str = "float16"
    method: str = "auto"


def bench_scoring(case: Case, workdir: Path) -> dict:
    """Time scoring over rows written to workdir; JSON-ready facts.

    Always: seconds of the first call (nothing cached: K or the streamed products included) and,
    unless products are streamed, of a second call; peak RSS in GiB; `relative_residual`, the
    largest ||(K + lambda I) z - q|| / ||q|| recomputed in float64 from the stored rows;
    `own_row_first`, the share of queries whose own row ranks first at the smallest damping.
    If k <= INVERSES_MAX also what `compare_with_inverses` finds, else `columns_max_rel_error`, see
    `columns_error`.
    """
    store, memory = synthetic_store(workdir, case.n, case.k, case.dtype), case.max_memory
    own = np.arange(case.num_queries) * (case.n // case.num_queries)
    noise = np.random.default_rng(1).standard_normal((case.num_queries, case.k))
    queries = store.rows(own) + 0.1 * noise
    method = choose_method(store, case.num_queries, memory, case.method)
    gram_path(store).unlink(missing_ok=True)
    fisher = FullFisher(Budget(memory), method)
    facts = {name: getattr(case, name) for name in ("n", "k", "num_queries", "dtype")}
    facts |= {"method": method, "threads": torch.get_num_threads()}

    def score() -> tuple[np.ndarray, np.ndarray]:
        solutions = fisher.solve(store, queries, case.dampings)
        return solutions, scores(store, solutions, max_memory=memory)

    # Streamed products leave nothing behind that a second call could use.
    for name in ("first_call_seconds", "next_call_seconds")[: 1 if method == "krylov_rows" else 2]:
        facts[name], (solutions, values) = timed(score)
    smallest = int(np.argmin(case.dampings))
    facts["own_row_first"] = float((ranking(values[smallest], k=1)[:, 0] == own).mean())
    facts["peak_rss_gib"] = peak_rss_gib()  # before the reference, which holds more
    facts["relative_residual"] = residual(store, queries, solutions, case.dampings)
    if case.k <= INVERSES_MAX:
        return facts | compare_with_inverses(store, queries[:1], case)
    error = columns_error(store, queries[:1], case)
    return facts | {"columns_checked": COLUMNS, "columns_max_rel_error": error}


def residual(
    store: Store, queries: np.ndarray, solutions: np.ndarray, dampings: Sequence[float]
) -> float:
    """max ||(K + lambda I) z - q|| / ||q|| of queries q [Q, k] and solutions z [D, Q, k]."""
    lambdas = damping_to_lambda(dampings, trace(store), store.dim)
    q, z = torch.from_numpy(queries), torch.from_numpy(solutions)
    return relative_residuals(row_product(store), q, lambdas, z).max().item()


def synthetic_store(folder: Path, n: int, k: int, dtype: str) -> Store:
    """Write the synthetic rows, or reuse (and resume) what an earlier run wrote of the same."""
    identity = {"synthetic": "power law plus noise", "rank": RANK, "block": BLOCK_ROWS, "seed": 0}
    store = Store.create(folder, Layout(n, k, NUM_SPLIT, dtype), identity, provenance={})
    spectrum = 4 * torch.arange(1, RANK + 1)[:, None] ** -0.75
    head = torch.randn(RANK, k, generator=torch.Generator().manual_seed(0)) * spectrum
    for shard in store.pending():
        stop = store.shard_range(shard)[1]
        for start in range(store.resume_row(shard), stop, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, stop - start)
            generator = torch.Generator().manual_seed(1 + start)
            block = torch.randn(rows, RANK, generator=generator) @ head
            block += torch.randn(rows, k, generator=generator)
            store.append(shard, (block / k**0.5).numpy(), start)
        store.finish(shard)
    return store


class FirstColumns:
    """The first `dim` columns of a store, held in memory as float32 and read by the same call."""

    def __init__(self, store: Store, dim: int) -> None:
        self.folder, self.num_rows, self.dim = store.folder, store.num_rows, dim
        blocks = store.tensor_blocks(BLOCK_ROWS)
        self.values = torch.cat([block[:, :dim].clone() for _, block in blocks])

    def tensor_blocks(
        self, max_rows: int, device: str = "cpu"
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """As `Store.tensor_blocks`."""
        for start in range(0, self.num_rows, max_rows):
            yield start, self.values[start : start + max_rows].to(device)


def columns_error(store: Store, query: np.ndarray, case: Case) -> float:
    """`relative_error` of the streamed scores when the store ends after COLUMNS columns.

    Exact is one Cholesky a damping.
    """
    part, memory = FirstColumns(store, COLUMNS), case.max_memory
    query = query[:, :COLUMNS]
    kernel = compute_gram(part, memory)
    lambdas = damping_to_lambda(case.dampings, kernel.trace(), COLUMNS)
    solutions = krylov_solutions(row_product(part), torch.from_numpy(query), lambdas, memory)
    found = scores(part, solutions.numpy(), max_memory=memory)[:, 0]
    return relative_error(found, exact_scores(kernel, part.values, query, lambdas))


def compare_with_inverses(store: Store, query: np.ndarray, case: Case) -> dict:
    """The reference, in float32 with X and K in memory, against ours for one query [1, k].

    For each damping the reference is M = solve(K + lambda I, I), then scores. Both sides are given
    the same K (not timed) and serve the query with all dampings; ours is Lanczos, its residual
    check and the scores with rows read from disk. A round is one inverse of the reference, times
    the dampings, and one run of ours; seconds and ratios are medians over rounds, one a damping:

    - `scoring_speedup`: the reference literally, (X M)^T first and then q times it, / ours;
      with its range over rounds
    - `scoring_speedup_cheaper_order`: the reference with q M first, which leaves little but the
      inverses, / ours
    - `max_rel_error`: `relative_error` of ours, exact from float64;
      `reference_max_rel_error` alike
    """
    kernel = gram(store, Budget(case.max_memory, cache=False))
    lambdas = damping_to_lambda(case.dampings, kernel.diagonal().double().sum(), store.dim)
    rows = torch.cat([block for _, block in store.tensor_blocks(BLOCK_ROWS)])
    exact = exact_scores(kernel.double(), rows, query, lambdas)
    single, asked = kernel.float(), torch.from_numpy(query)

    def score() -> np.ndarray:
        solutions = gram_solutions(kernel, asked, lambdas, case.max_memory)
        return scores(store, solutions.numpy(), max_memory=case.max_memory)[:, 0]

    rounds = []
    for damping in tqdm(lambdas.float(), desc="rounds of an inverse and our scores"):
        inverse = explicit_inverse(single, rows, asked.float(), damping)
        rounds.append((*inverse, *timed(score)))
        found, literal, cheaper, ours, values = zip(*rounds, strict=True)
        if sum(literal) > WHOLE_RUN_SECONDS:
            break
    count = len(lambdas)
    speedup, spread = ratio(literal, ours, count)
    return {
        "ours_seconds": statistics.median(ours),
        "reference_seconds": statistics.median(literal) * count,
        "reference_cheaper_order_seconds": statistics.median(cheaper) * count,
        "rounds": len(rounds),
        "scoring_speedup": speedup,
        "scoring_speedup_spread": spread,
        "scoring_speedup_cheaper_order": ratio(cheaper, ours, count)[0],
        "max_rel_error": relative_error(values[-1], exact),
        "reference_max_rel_error": relative_error(torch.stack(found).numpy(), exact[: len(rounds)]),
    }


def explicit_inverse(
    kernel: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, damping: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """The reference at one damping in float32: (scores [N], seconds, seconds with q M first)."""
    identity = torch.eye(len(kernel))
    solving, inverse = timed(lambda: torch.linalg.solve(kernel + damping * identity, identity))
    literal, found = timed(lambda: (query @ (rows @ inverse).T)[0])
    cheaper, _ = timed(lambda: query @ inverse @ rows.T)
    return found, solving + literal, solving + cheaper


def exact_scores(
    kernel: torch.Tensor, rows: torch.Tensor, query: np.ndarray, lambdas: torch.Tensor
) -> np.ndarray:
    """float64 scores [D, N] by one Cholesky solve a damping."""
    identity, right = torch.eye(len(kernel), dtype=torch.float64), torch.from_numpy(query).T
    factors = (torch.linalg.cholesky(kernel + damping * identity) for damping in lambdas)
    solved = [torch.cholesky_solve(right, factor) for factor in factors]
    return (rows.double() @ torch.cat(solved, dim=1)).T.numpy()


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """max over dampings of max_i |found - exact| / max_i |exact|, both [D, N]."""
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())
