"""What an index finds of what a scan finds, measured when it is made and kept with it.

Rows of the store, at even distances, are asked for as if they were queries, each without itself:
their exact scores over all rows come from one pass, and the wanted ones are looked up among what
the index found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..atomic_io import write_json
from ..errors import UserError
from ..scoring.metrics import bootstrap_interval
from ..scoring.preconditioner import Preconditioner
from ..settings import short_hash
from ..store.store import Store
from ..validated_io import read_json
from .rabitq import MEND, Index
from .search import Search

NUM_HELD_OUT = 16  # queries
PLACES = (10, 100)  # recall at
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Extremes:
    """The extreme rows of each of P queries: int64 [P, count], the most extreme first."""

    top: np.ndarray
    least: np.ndarray


def exact_extremes(
    store: Store, solved: np.ndarray, count: int, row_weight: np.ndarray | None = None
) -> Extremes:
    """The ends of an exact scan in float32, one pass; solved [P, k]."""
    asked, size = torch.as_tensor(solved).float(), min(count, store.num_rows)
    held = [(torch.zeros(len(asked), 0), torch.zeros(len(asked), 0, dtype=torch.int64))] * 2
    weight = None if row_weight is None else torch.from_numpy(row_weight).float()
    for start, block in store.tensor_blocks(BLOCK_ROWS):
        values = asked @ block.T
        if weight is not None:
            values *= weight[start : start + len(block)]
        rows = torch.arange(start, start + len(block)).expand_as(values)
        for end, sign in enumerate((1, -1)):
            best, known = held[end]
            both = torch.cat([best, sign * values], 1)
            best, places = both.topk(min(size, both.shape[1]), 1)
            held[end] = best, torch.cat([known, rows], 1).gather(1, places)
    return Extremes(held[0][1].numpy(), held[1][1].numpy())


def share_found(wanted: np.ndarray, found: np.ndarray, without: int | None = None) -> float:
    """Share of the wanted rows that are among those found, one row left out of account."""
    wanted = wanted[wanted != without] if without is not None else wanted
    return float(np.isin(wanted, found).mean())


def measure(
    index: Index,
    preconditioner: Preconditioner,
    dampings: Sequence[float],
    search: Search,
    row_weight: np.ndarray | None = None,
) -> dict:
    """{"queries", "candidates", "rows", "dampings": [{"damping", "recall_at_10", "ci95",
    "recall_at_100", "least_recall_at_10", "least_recall_at_100"}]}; the interval is over queries.
    Of a store that is too small to leave k rows to find, without the recall at k.
    """
    store = index.store
    held = np.linspace(0, store.num_rows - 1, min(NUM_HELD_OUT, store.num_rows)).astype(np.int64)
    solved = preconditioner.solve(store, store.rows(held), dampings)  # [D, Q, k]
    places = [k for k in PLACES if k < store.num_rows]
    ends = exact_extremes(
        store, solved.reshape(-1, store.dim), max(places, default=0) + 1, row_weight
    )
    top, least = (e.reshape(len(dampings), len(held), -1) for e in (ends.top, ends.least))
    found = [search.find(index, solved[:, q], row_weight).rows for q in range(len(held))]

    def recall(end: np.ndarray, k: int) -> list[float]:
        cut = [end[q][end[q] != held[q]][:k] for q in range(len(held))]
        return [share_found(wanted, rows) for wanted, rows in zip(cut, found, strict=True)]

    table = []
    for d, damping in enumerate(dampings):
        entry: dict = {"damping": float(damping)}
        for k in places:
            entry[f"recall_at_{k}"] = float(np.mean(recall(top[d], k)))
            entry[f"least_recall_at_{k}"] = float(np.mean(recall(least[d], k)))
        if places:
            entry["ci95"] = list(bootstrap_interval(recall(top[d], places[0])))
        table.append(entry)
    counts = {"queries": len(held), "candidates": search.candidates, "rows": store.num_rows}
    return counts | {"dampings": table}


def _identity(index: Index, candidates: int) -> dict:
    checksum = index.store.checksum
    return {"index": index.index_id, "store": checksum, "candidates": candidates}


def keep_recall(index: Index, search: Search, measured: dict) -> None:
    """Write what `measure` found beside the codes. UserError for a full disk."""
    record = {"identity": _identity(index, search.candidates), "measured": measured}
    write_json(index.folder / "recall.json", record | {"checksum": short_hash(measured)})


def kept_recall(index: Index, search: Search) -> dict | None:
    """What was measured of this index, these rows and as many candidates; None if nothing was, or
    not these very numbers.
    """
    try:
        record = read_json(index.folder / "recall.json", MEND)
    except (UserError, OSError):
        return None
    same = record.get("identity") == _identity(index, search.candidates)
    whole = record.get("checksum") == short_hash(record.get("measured"))
    return record["measured"] if same and whole and _sound(record["measured"]) else None


def _sound(measured: Any) -> bool:
    """Whether these are shares of rows at each damping, as `measure` has them."""
    try:
        shares = [
            share
            for entry in measured["dampings"]
            for share in (*(entry[k] for k in entry if "recall" in k), *entry.get("ci95", ()))
        ]
        entries = measured["dampings"]
        whole = all(e["damping"] > 0 and ("ci95" in e) == ("recall_at_10" in e) for e in entries)
        return whole and measured["queries"] > 0 and all(0 <= share <= 1 for share in shares)
    except (TypeError, KeyError, AttributeError):
        return False
