"""Small stores that the tests of this room make and fill."""

from pathlib import Path

import numpy as np

from concept_trak.store.dtypes import decode
from concept_trak.store.store import Layout, Store

N, K, SPLITS = 23, 8, 4
IDENTITY = {
    "settings": {"states": 9, "layer": "attn2"},
    "model_hash": "abc",
    "projection": {"kind": "sjlt", "seed": 0},
}
REPOSITORY = Path(__file__).parents[2]


def make(folder, dtype="float32", identity=IDENTITY, **changed):
    shape = {"num_rows": N, "dim": K, "num_split": SPLITS}
    return Store.create(folder, Layout(dtype=dtype, **shape | changed), identity, provenance={})


def some_rows(num_rows=N, dim=K):
    return np.random.default_rng(0).standard_normal((num_rows, dim)).astype(np.float32)


def some_losses(num_rows=N):
    return np.random.default_rng(1).random(num_rows).astype(np.float32)


def fill(store, rows, batch=2, shards=None, losses=None):
    """Finish the pending shards; a store with losses gets `losses`, else `some_losses`."""
    if store.has_losses and losses is None:
        losses = some_losses(store.num_rows)
    for shard in store.pending(shards):
        stop = store.shard_range(shard)[1]
        for first in range(store.resume_row(shard), stop, batch):
            here = slice(first, min(first + batch, stop))
            store.append(shard, rows[here], first, None if losses is None else losses[here])
        store.finish(shard)
    return store


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read(store, max_rows=3):
    blocks = store.stored_blocks(max_rows)
    return np.concatenate([decode(stored, store.dtype) for _, stored in blocks])
