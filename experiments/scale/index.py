"""Benchmark of the index: what it finds of what a scan finds, its bytes, build time and latency,
over the embedded rows and over synthetic ones with their spectrum.

A synthetic row is made of real rows X [n, k] (`mixed_rows`): PARENT of its energy is one of them,
drawn at random, MIXED a sum of MIX others with normal weights, the rest normal noise with the
second moment that X has within each block of features. So the second moment of a block, in mean, is
exactly that of the real rows, the rows fall in clusters around n parents, and no row lies in the
span of the real ones. Queries are those of the embedded rows: concepts of real pictures. Blocks of
rows come from seeds of their own, so that nothing but a block is ever in memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from concept_trak.atomic_io import write_json
from concept_trak.errors import remove_hint
from concept_trak.index.rabitq import Index
from concept_trak.index.recall import Extremes, exact_extremes, share_found
from concept_trak.index.search import exact
from concept_trak.scoring.fisher import fisher_for
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.scores import scores
from concept_trak.store.store import Layout, Store
from concept_trak.validated_io import read_json

from .timing import peak_rss_gib, restart_peak_rss, timed

PARENT, MIXED, MIX = 0.5, 0.2, 4  # shares of a row's energy; rows in the mixture
BLOCK_ROWS, SHARD_ROWS = 2048, 65_536
TIMED, SCANS = 8, 3  # queries whose latency is taken, and rounds of the scan
CANDIDATES = (100, 200, 500, 1000, 2000, 5000, 10_000)
TIMED_AT = 2000  # candidates; the default of CANDIDATES
DAMPINGS = (0.1, 1.0, 10.0)
PLACES = (10, 100)
LOOKED_AT = (1, 10, 50, 100, 400)  # eigenvalues of as many synthetic rows as there are real ones


class Synthetic:
    """Rows as the module's docstring says, from real rows [n, k] in blocks of these widths."""

    def __init__(self, real: np.ndarray, widths: Sequence[int]) -> None:
        self.real, self.widths = torch.from_numpy(real).float(), tuple(widths)
        noise = 1 - PARENT - MIXED
        self.roots = [_root(part, noise) for part in self.real.split(self.widths, 1)]

    def rows(self, count: int, seed: int) -> torch.Tensor:
        """float32 [count, k]."""
        generator, n = torch.Generator().manual_seed(seed), len(self.real)
        chosen = torch.randint(0, n, (count, 1 + MIX), generator=generator)
        weights = torch.randn(count, 1 + MIX, generator=generator) * (MIXED / MIX) ** 0.5
        weights[:, 0] = PARENT**0.5
        mixed = torch.nn.functional.embedding_bag(
            chosen, self.real, per_sample_weights=weights, mode="sum"
        )
        noise = torch.randn(count, self.real.shape[1], generator=generator)
        pairs = zip(noise.split(self.widths, 1), self.roots, strict=True)
        return mixed + torch.cat([part @ root for part, root in pairs], 1)


def _root(rows: torch.Tensor, share: float) -> torch.Tensor:
    """[w, w] R with R^T R = share of the second moment of rows [n, w]."""
    values, vectors = torch.linalg.eigh(rows.T.double() @ rows.double() / len(rows))
    return ((share * values.clamp_min(0)).sqrt()[:, None] * vectors.T).float()


def synthetic_store(folder: Path, source: Store, widths: Sequence[int], n: int) -> Store:
    """n synthetic rows in float16, made or gone on with. Memory: the real rows and some 100 MB."""
    made = {"parent": PARENT, "mixed": MIXED, "mix": MIX, "block": BLOCK_ROWS}
    identity = {"synthetic": made, "source": source.checksum, "widths": list(widths)}
    split = max(1, n // SHARD_ROWS)
    store = Store.create(folder, Layout(n, source.dim, split, "float16"), identity, {})
    maker = Synthetic(source.rows(range(source.num_rows)), widths)
    todo = store.pending()
    left = sum(store.shard_range(i)[1] - store.resume_row(i) for i in todo)
    with tqdm(total=left, desc="synthetic rows", unit="row") as bar:
        for shard in todo:
            start, stop = store.shard_range(shard)
            done = store.resume_row(shard)
            for first in range(start + (done - start) // BLOCK_ROWS * BLOCK_ROWS, stop, BLOCK_ROWS):
                rows = maker.rows(min(BLOCK_ROWS, stop - first), 1 + first)[max(done - first, 0) :]
                store.append(shard, rows.numpy(), max(first, done))
                bar.update(len(rows))
            store.finish(shard)
    return store


def spectra(store: Store, source: Store) -> str:
    """A line: eigenvalues of as many rows of the store as the source has, over the source's."""
    pair = [s.rows(range(source.num_rows)).astype(np.float64) for s in (store, source)]
    ours, real = (np.linalg.eigvalsh(x @ x.T)[::-1] for x in pair)
    at = [j for j in LOOKED_AT if j <= len(real)]
    told = ", ".join(f"{ours[j - 1] / real[j - 1]:.2f} at {j}" for j in at)
    return f"eigenvalues of {source.num_rows} synthetic rows over those of the real ones: {told}"


def solved_by_sample(
    store: Store, widths: Sequence[int], queries: np.ndarray, dampings: Sequence[float]
) -> np.ndarray:
    """[D, Q, k] queries solved with the curvature of the first shard, which has many times more
    rows than a block has features: the same directions to search along, without a pass over all.
    """

    class First:
        folder, dim = store.folder, store.dim

        @staticmethod
        def tensor_blocks(rows: int, device: str = "cpu") -> Any:
            for start, block in store.tensor_blocks(rows, device):
                if start >= store.bounds[1]:
                    return
                yield start, block

    return fisher_for(widths, Budget(cache=False)).solve(First(), queries, dampings)


@dataclass(frozen=True)
class IndexCase:
    """A store, its blocks, and queries [Q, k] to ask it."""

    name: str
    store: Store
    widths: tuple[int, ...]
    queries: np.ndarray
    share: float = 1.0
    damping: float = 1.0
    solve: Callable[..., np.ndarray] = solved_by_sample


def truth(case: IndexCase) -> tuple[np.ndarray, Extremes]:
    """(solved queries [D, Q, k] at DAMPINGS, their extreme rows by the exact scan)."""
    solved = case.solve(case.store, case.widths, case.queries, DAMPINGS)
    return solved, exact_extremes(case.store, solved.reshape(-1, case.store.dim), max(PLACES))


def bench_case(case: IndexCase, solved: np.ndarray, ends: Extremes) -> dict[str, Any]:
    """JSON-ready facts of a case: bytes a row, seconds to build, recall at both ends against the
    exact scan by damping and number of candidates, latency of index and scan, peak memory.

    solved, ends: of `truth`.
    """
    store = case.store
    restart_peak_rss()
    index, seconds = built(case)
    facts: dict[str, Any] = {"name": case.name, "rows": store.num_rows, "dim": store.dim}
    stored = store.grads.item_bytes
    facts |= {"row_bytes": stored, "code_bytes": index.row_bytes, "build_s": seconds}
    facts |= {"bytes_ratio": stored / index.row_bytes, "share": case.share}
    facts |= {"build_peak_gib": peak_rss_gib(), "queries": len(case.queries)}
    facts["recall"] = recall_table(index, solved, ends)
    restart_peak_rss()
    facts |= latencies(index, solved[DAMPINGS.index(case.damping)])
    return facts | {"search_peak_gib": peak_rss_gib()}


def built(case: IndexCase) -> tuple[Index, float]:
    """(the index of a case, made or gone on with, seconds it takes to make all of it).

    Shards that an earlier run made count with its time, which is kept beside them.
    """
    store, place = case.store, f"index-{case.share:g}"
    path = store.folder / f"{place}.json"
    known = read_json(path, remove_hint(path)) if path.exists() else {"rows": 0, "seconds": 0.0}
    begin = time.perf_counter()
    index = Index.create(store, case.widths, case.damping, case.share, place)
    made = sum(store.count(shard) for shard in index.update())
    if made:
        known["rows"] += made
        known["seconds"] += time.perf_counter() - begin
        write_json(path, known)
    return Index.open(store, place=place), known["seconds"] * store.num_rows / max(known["rows"], 1)


def recall_table(index: Index, solved: np.ndarray, ends: Extremes) -> list[dict[str, Any]]:
    """One entry a damping and number of candidates; solved [D, Q, k]."""
    store, (num, asked) = index.store, solved.shape[:2]
    flat = solved.reshape(-1, store.dim)
    places = [k for k in PLACES if 2 * k < store.num_rows]
    sizes = [c for c in CANDIDATES if c <= store.num_rows // 2]
    found = {}
    for end, sign in (("", 1), ("least_", -1)):
        found[end] = index.search(sign * flat, max(sizes))[1].reshape(num, asked, -1)
    table = []
    for d, damping in enumerate(DAMPINGS[:num]):
        for size in sizes:
            entry: dict[str, Any] = {"damping": damping, "candidates": size}
            for end, exact_rows in (("", ends.top), ("least_", ends.least)):
                wanted = exact_rows.reshape(num, asked, -1)[d]
                for k in (k for k in places if k <= size):
                    pairs = zip(wanted[:, :k], found[end][d, :, :size], strict=True)
                    shares = [share_found(w, f) for w, f in pairs]
                    entry[f"{end}recall_at_{k}"] = float(np.mean(shares))
                    if k == places[0]:
                        entry[f"{end}ci95"] = list(bootstrap_interval(shares))
            table.append(entry)
    return table


def latencies(index: Index, solved: np.ndarray) -> dict[str, Any]:
    """Seconds of one query [k] at one damping: the index with TIMED_AT candidates scored, for
    the top end, and the scan that scores all rows; medians, with the least and the greatest.
    """
    store = index.store
    size = min(TIMED_AT, store.num_rows // 2)

    def search(q: int) -> None:
        rows = index.search(solved[q : q + 1], size)[1][0]
        exact(index, np.sort(rows), solved[q : q + 1], None)

    search(0)
    fast = [timed(lambda q=q: search(q))[0] for q in range(min(TIMED, len(solved)))]
    only = [timed(lambda: index.search(solved[:1], size))[0] for _ in range(SCANS)]
    slow = [timed(lambda: scores(store, solved[:1, None]))[0] for _ in range(SCANS)]
    ranges = {"search_s": fast, "codes_s": only, "scan_s": slow}
    medians = {name: statistics.median(values) for name, values in ranges.items()}
    spread = {f"{name}_range": [min(v), max(v)] for name, v in ranges.items()}
    return medians | spread | {"speedup": medians["scan_s"] / medians["search_s"], "timed_at": size}


def recall_of(facts: dict[str, Any], damping: float = 1.0) -> dict[str, Any]:
    """The entry of the fixed damping at the number of candidates that was timed."""
    entries = [e for e in facts["recall"] if e["damping"] == damping]
    return max(
        (e for e in entries if e["candidates"] <= facts["timed_at"]), key=lambda e: e["candidates"]
    )


def lines(facts: dict[str, Any]) -> str:
    """The facts of a case as a Markdown table and a few sentences."""
    f = facts
    told = [
        f"**{f['name']}**: {f['rows']:,} rows of {f['dim']}, {f['row_bytes']} bytes each; codes of "
        f"{f['code_bytes']} bytes, 1/{f['bytes_ratio']:.1f}",
        f"build {f['build_s']:.1f} s (peak {f['build_peak_gib']:.2f} GiB); a query "
        f"{_span(f, 'search_s')} with {f['timed_at']} candidates scored exactly, of which the "
        f"codes take {_span(f, 'codes_s')} (peak {f['search_peak_gib']:.2f} GiB); the scan "
        f"{_span(f, 'scan_s')}: {f['speedup']:.1f} times",
        "",
        "| damping | candidates | recall@10 | recall@100 | least 10 | least 100 |",
        "|---|---|---|---|---|---|",
    ]
    for e in f["recall"]:
        cells = [_with_interval(e, ""), _cell(e, "recall_at_100")]
        cells += [_with_interval(e, "least_"), _cell(e, "least_recall_at_100")]
        told.append(f"| {e['damping']:g} | {e['candidates']} | {' | '.join(cells)} |")
    return "\n".join(told)


def _span(facts: dict[str, Any], name: str) -> str:
    low, high = (1e3 * value for value in facts[f"{name}_range"])
    return f"{1e3 * facts[name]:.0f} ms [{low:.0f}, {high:.0f}]"


def _with_interval(entry: dict[str, Any], end: str) -> str:
    if f"{end}recall_at_10" not in entry:
        return ""
    low, high = entry[f"{end}ci95"]
    return f"{entry[f'{end}recall_at_10']:.3f} [{low:.3f}, {high:.3f}]"


def _cell(entry: dict[str, Any], name: str) -> str:
    return f"{entry[name]:.3f}" if name in entry else ""
