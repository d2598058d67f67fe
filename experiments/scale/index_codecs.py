"""Which compression: FAISS's codes in the whitened space and out of it, of about as many bytes.

All see the first rows of the synthetic store and the same queries. A code that spends more bits on
a value keeps fewer values: those that matter most to the scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from concept_trak.index.faiss_import import faiss
from concept_trak.index.recall import exact_extremes, share_found
from concept_trak.index.whitening import Whitening, whitening
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.store.store import Store

ROWS, TRAINED = 16_384, 10_240  # of the store; of these, to train a code with
CANDIDATES = (50, 100, 200)
LISTS, PROBES = 64, 16  # of IVF
OPQ_ROUNDS = 3


@dataclass(frozen=True)
class Kind:
    """share: of the values that are kept (`whitening`). make: dim -> an index of FAISS.
    whitened: or else rotated alone, all values alike.
    """

    name: str
    share: float
    make: Callable[[int], Any]
    whitened: bool = True


def _factory(pattern: str) -> Callable[[int], Any]:
    """From FAISS's name, with {d}, {h}, {q} for all, half and a quarter of the dimensions."""

    def make(dim: int) -> Any:
        library = faiss()
        name = pattern.format(d=dim, h=dim // 2, q=dim // 4)
        index = library.index_factory(dim, name, library.METRIC_INNER_PRODUCT)
        if pattern.startswith("IVF"):
            index.nprobe = PROBES
        return index

    return make


def _rotated_pq(dim: int) -> Any:
    library = faiss()
    rotation = library.OPQMatrix(dim, dim // 2, dim)
    rotation.niter = rotation.niter_pq = OPQ_ROUNDS
    codes = library.IndexPQ(dim, dim // 2, 4, library.METRIC_INNER_PRODUCT)
    return library.IndexPreTransform(rotation, codes)


KINDS = (
    Kind("scalar, 8 bit", 1 / 8, _factory("SQ8")),
    Kind("scalar, 4 bit", 1 / 4, _factory("SQ4")),
    Kind("PQ, 4 bit, fast scan", 1 / 2, _factory("PQ{h}x4fs")),
    Kind("PQ, 8 bit", 1 / 8, _factory("PQ{h}x8")),
    Kind("OPQ, 4 bit", 1 / 8, _rotated_pq),
    Kind(f"IVF-PQ, 4 bit, {PROBES} of {LISTS} lists", 1 / 2, _factory(f"IVF{LISTS},PQ{{h}}x4fs")),
    Kind("RaBitQ, 2 bits", 1 / 2, _factory("RaBitQ2")),
    Kind("RaBitQ, not whitened", 1.0, _factory("RaBitQ"), whitened=False),
    Kind("RaBitQ", 1.0, _factory("RaBitQ")),
    Kind("RaBitQ, half of the values", 1 / 2, _factory("RaBitQ")),
)


def compare(
    store: Store, widths: Sequence[int], damping: float, solved: np.ndarray
) -> list[dict[str, Any]]:
    """An entry a kind: "name", "bytes" a row, "train_s", "add_s" and "search_s" of a query, and
    "recall_at_10" and "ci95" by candidates. solved: [Q, k].
    """
    count = min(ROWS, store.num_rows)
    rows, part = store.tensor_rows(range(count)), _First(store, count)
    wanted = exact_extremes(part, solved, 10).top
    return [_measured(kind, (store, widths, damping), rows, solved, wanted) for kind in KINDS]


class _First:
    """The first rows of a store."""

    def __init__(self, store: Store, count: int) -> None:
        self.store, self.num_rows = store, count

    def tensor_blocks(self, max_rows: int) -> Any:
        """As `Store.tensor_blocks`."""
        for start in range(0, self.num_rows, max_rows):
            yield start, self.store.tensor_rows(range(start, min(start + max_rows, self.num_rows)))


def _space(kind: Kind, made_of: tuple[Store, Sequence[int], float]) -> Whitening:
    space = whitening(*made_of, kind.share)
    if kind.whitened:
        return space
    alike = replace(space, scale=space.scale.sign(), mean=torch.zeros(space.dim))
    sample = made_of[0].tensor_rows(range(min(TRAINED, made_of[0].num_rows)))
    return replace(alike, mean=alike.rows(sample).mean(0))


def _measured(
    kind: Kind,
    made_of: tuple[Store, Sequence[int], float],
    rows: torch.Tensor,
    solved: np.ndarray,
    wanted: np.ndarray,
) -> dict[str, Any]:
    space = _space(kind, made_of)
    values, asked = space.rows(rows).numpy(), space.queries(torch.from_numpy(solved)).numpy()
    asked = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
    codes = kind.make(space.dim)
    entry: dict[str, Any] = {"name": kind.name, "values": space.dim}
    begin = time.process_time()
    # RaBitQ takes its centre from the queries, too; the space has taken the mean from the rows
    codes.train(np.zeros_like(values[:1]) if "RaBitQ" in kind.name else values[:TRAINED])
    trained = time.process_time()
    codes.add(values)
    added = time.process_time()
    found = codes.search(asked, max(CANDIDATES))[1]
    searched = (time.process_time() - added) / len(asked)
    entry |= {"train_s": trained - begin, "add_s": added - trained, "search_s": searched}
    entry["bytes"] = codes.sa_code_size() if hasattr(codes, "sa_code_size") else codes.code_size
    for size in CANDIDATES:
        pairs = zip(wanted, found[:, :size], strict=True)
        shares = [share_found(w, f) for w, f in pairs]
        entry[f"recall_at_10_of_{size}"] = float(np.mean(shares))
        entry[f"ci95_of_{size}"] = list(bootstrap_interval(shares))
    return entry


def lines(table: list[dict[str, Any]], count: int) -> str:
    """The table in Markdown."""
    heads = " | ".join(f"recall@10 in {size}" for size in CANDIDATES)
    told = [
        f"{count:,} rows; seconds of the processor",
        "",
        f"| code | values | bytes | {heads} | train | add | ms a query |",
        "|" + "---|" * (6 + len(CANDIDATES)),
    ]
    for e in table:
        cells = []
        for size in CANDIDATES:
            low, high = e[f"ci95_of_{size}"]
            cells.append(f"{e[f'recall_at_10_of_{size}']:.3f} [{low:.3f}, {high:.3f}]")
        told.append(
            f"| {e['name']} | {e['values']} | {e['bytes']} | {' | '.join(cells)} | "
            f"{e['train_s']:.1f} s | {e['add_s']:.1f} s | {1e3 * e['search_s']:.1f} |"
        )
    return "\n".join(told)
