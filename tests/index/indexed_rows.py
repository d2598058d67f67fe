"""A store whose rows have a falling spectrum in blocks, and what is asked of it."""

import numpy as np

from concept_trak.scoring.fisher import fisher_for
from concept_trak.scoring.preconditioner import Budget
from concept_trak.store.store import Layout, Store

N, WIDTHS = 3000, (96, 96, 128)  # k = 320, enough for coordinates to be left out
DAMPINGS = (0.1, 1.0)


def rows_of(count, seed):
    """[count, k]: rotated, l_j ~ 1 / j in every block, and a mean."""
    basis, drawn, parts = np.random.default_rng(0), np.random.default_rng(seed), []
    for width in WIDTHS:
        rotation = np.linalg.qr(basis.standard_normal((width, width)))[0]
        spectrum = np.arange(1, width + 1) ** -0.5
        mean = basis.standard_normal(width) * 0.2
        parts.append((drawn.standard_normal((count, width)) * spectrum) @ rotation + mean)
    return np.concatenate(parts, 1).astype(np.float32)


def make_store(folder, num_rows=N, splits=3, shards=None, seed=1, identity=None):
    layout = Layout(num_rows, sum(WIDTHS), splits, "float16")
    store = Store.create(folder, layout, identity or {"seed": seed}, provenance={})
    rows = rows_of(num_rows, seed)
    for shard in store.pending(shards):
        start, stop = store.shard_range(shard)
        store.append(shard, rows[start:stop], start)
        store.finish(shard)
    return store


def preconditioner():
    return fisher_for(WIDTHS, Budget(cache=False))


def solved_queries(store, count=6, dampings=DAMPINGS):
    """[D, count, k]."""
    return preconditioner().solve(store, rows_of(count, 99), dampings)
