"""Train gradients: the rows of the train split, shard by shard, into a store of their own."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import UserError
from ..models.condition import Condition
from ..parsing import parse_shards
from ..registry import OBJECTIVES
from ..rows.row import Rows
from ..rows.states import train_states_of
from ..store.checks import check_shard
from ..store.encoding import STORED_TYPES
from ..store.manifest import Layout
from ..store.shards import Store
from .corpus import Corpus
from .executor import Executor, InProcess
from .plan import folder_name, train_states
from .stores import find_store, new_folder


def make_rows(corpus: Corpus, x0: torch.Tensor, cond: Condition) -> Rows:
    """Train rows [B, k] of pictures x0 [B, C, h, w] under their captions, as the settings ask."""
    s, model = corpus.settings, corpus.model
    states = train_states_of(model, x0, cond, corpus.cond_null, train_states(s))
    return corpus.row_maker.rows(states, OBJECTIVES.get(s.f).cotangent, len(x0))


def train_grad(corpus: Corpus, executor: Executor | None = None) -> Store:
    """Fill the store of the settings (its pending shards among SHARDS), resuming at the first row
    that is not on disk.
    """
    store = create_store(corpus)
    wanted = parse_shards(corpus.settings.shards, store.num_split)
    pending = store.pending(wanted)
    for shard in set(wanted) - set(pending):
        check_shard(store, shard, verify=True)
    todo = sum(store.shard_range(i)[1] - store.resume_row(i) for i in pending)
    size = store.num_rows * store.dim * STORED_TYPES[store.dtype].itemsize / 1e6
    progress = f"{todo} of {store.num_rows} rows to compute, {size:.0f} MB on disk when complete"
    print(f"{store.folder}: {progress}")
    with tqdm(total=todo, desc="train gradients", unit="image") as bar:
        (executor or InProcess()).run(lambda shard: fill(corpus, store, shard, bar), pending)
    return store


def create_store(corpus: Corpus) -> Store:
    """The store of the settings, made or opened again. UserError when it is of something else."""
    s, weighted = corpus.settings, OBJECTIVES.get(corpus.settings.f).row_weight is not None
    dim = corpus.projection.proj_dim
    layout = Layout(len(corpus.data), dim, s.num_split, s.store_dtype, losses=weighted)
    return Store.create(new_folder(s), layout, train_identity(corpus))


def open_store(corpus: Corpus) -> Store:
    """The finished store for this model, data and settings.

    UserError naming what differs when a store of the same name was made from something else.
    """
    s, found = corpus.settings, find_store(corpus.settings)
    if found is None:
        where = os.path.relpath(Path(s.grad_dir) / folder_name(s))
        raise UserError(
            f"no train gradients in {where}; compute them with run_train_grad.sh (same variables)"
        )
    made_with = {"projection": corpus.projection.describe()}  # adopts shards of the release
    if "adopted" not in Store.read_manifest(found).identity:
        return Store.open(found, expect=train_identity(corpus))
    # Of released rows nothing is recorded but the mask; the number of pictures is all that can be
    # checked beside it.
    store = Store.open(found, expect=made_with)
    if store.num_rows > len(corpus.data):
        raise UserError(
            f"{found} has {store.num_rows} rows but {s.data_dir} has {len(corpus.data)} pictures; "
            "both must be of one release"
        )
    return store


def train_identity(corpus: Corpus) -> dict:
    """What a store of this corpus must have been made from."""
    return corpus.identity(data=corpus.data.content_hash())


def fill(corpus: Corpus, store: Store, shard: int, bar: tqdm) -> None:
    """Compute what a shard lacks and finish it. Batches start where they would in an uninterrupted
    run, so its bytes are the same.
    """
    (start, stop), size = store.shard_range(shard), corpus.settings.batch_size
    first = store.resume_row(shard)
    for low in range(start + (first - start) // size * size, stop, size):
        missing = max(first - low, 0)
        made = make_rows(corpus, *corpus.data.batch(range(low, min(low + size, stop))))
        rows, losses = (x[missing:].cpu().numpy() for x in (made.values, made.losses))
        store.append(shard, rows, low + missing, losses if store.has_losses else None)
        bar.update(len(rows))
    store.finish(shard)
