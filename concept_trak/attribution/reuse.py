"""Rows that need not be computed again: a store of the same settings and model, but of other
pictures, has those of the pictures that both hold.

A row depends on its picture, its caption, the settings and the model, not on its place or its
neighbours, so a picture added to a folder costs one row.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from ..errors import UserError, remove_hint
from ..settings import Settings, short_hash
from ..store.store import Store
from ..store.verify import check_shard
from ..validated_io import read_json
from .find_store import list_stores
from .naming import store_base, store_name

PICTURES = "pictures.json"  # digests of a store's pictures, row by row
DISPLAY_HASH_FILE = "shown.json"  # hash of the pictures that released rows are shown with


@dataclass(frozen=True)
class GradientLocation:
    """Where a known row is: the store and its row there, with its loss if the store keeps them."""

    store: Store
    row: int
    loss: float | None


class ReusableGradients:
    """Which rows of a store others have, and their values."""

    def __init__(self, sources: Mapping[int, GradientLocation]) -> None:
        self.sources = sources

    def count(self, rows: Iterable[int]) -> int:
        """How many of these rows are known."""
        return sum(row in self.sources for row in rows)

    def runs(self, rows: range) -> Iterator[tuple[bool, range]]:
        """(whether they are known, rows): `rows` in consecutive pieces."""
        for known, piece in groupby(rows, key=lambda row: row in self.sources):
            run = list(piece)
            yield known, range(run[0], run[-1] + 1)

    def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """(values [b, k], losses [b]) float32 of known rows; losses are NaN where none are kept."""
        found = [self.sources[row] for row in rows]
        values = np.concatenate([source.store.rows([source.row]) for source in found])
        return values, np.array([source.loss for source in found], np.float32)


def write_image_digests(store: Store, digests: Sequence[str]) -> None:
    """Write down which pictures the rows are of, beside them."""
    if _digests(store) != list(digests):
        named = {"digests": list(digests), "checksum": short_hash(list(digests))}
        store.keep_beside(PICTURES, named)


def check_displayed_images(store: Store, shown: str) -> None:
    """UserError when released rows would be shown with other pictures or captions, or in another
    order, than at the first time, which is written down beside the rows.

    Nothing in a release says which picture a row is of; that nothing changed since is all that can
    be known. shown: `EncodedData.shown_hash`, empty if there is nothing to check.
    """
    if not shown:
        return
    path = store.beside(DISPLAY_HASH_FILE)
    if not os.path.lexists(path):
        with contextlib.suppress(UserError):  # a folder that cannot be written
            store.keep_beside(DISPLAY_HASH_FILE, {"pictures": shown})
    elif (
        read_json(path, remove_hint(path, "run again if the pictures are as released")).get(
            "pictures"
        )
        != shown
    ):
        reason = "the pictures or captions beside the latents are not those of the first time"
        mend = "bring back laion_subset as it was, or, if it is as released now"
        raise UserError(f"{store.folder}: {reason}; {mend}: rm {shlex.quote(str(path))}")


def _digests(store: Store) -> list[str]:
    """Of the pictures of a store; [] if it does not say, or not of all."""
    try:
        record = read_json(store.beside(PICTURES), remove_hint(store.folder / PICTURES))
    except UserError:
        return []
    digests = record.get("digests")
    if not isinstance(digests, list) or not all(isinstance(name, str) for name in digests):
        return []
    whole = record.get("checksum") == short_hash(digests) and len(digests) == store.num_rows
    return digests if whole else []


def find_reusable(store: Store, settings: Settings, digests: Sequence[str]) -> ReusableGradients:
    """What the other stores of the settings' name have of these pictures: rows of finished, whole
    shards, made from the same but the pictures and kept in the same form.
    """
    places: dict[str, list[int]] = {}
    for row, name in enumerate(digests):
        places.setdefault(name, []).append(row)
    sources: dict[int, GradientLocation] = {}
    for folder in list_stores(store_base(settings) / store_name(settings)):
        if folder != store.folder and (other := _sibling(folder, store)):
            theirs = _digests(other)
            for shard in range(other.num_split if theirs else 0):
                rows = range(*other.shard_range(shard))
                wanted = {r: places[theirs[r]] for r in rows if theirs[r] in places}
                if wanted and _usable(other, shard):
                    losses = other.shard_losses(shard) if other.has_losses else None
                    for row, ours in wanted.items():
                        loss = None if losses is None else float(losses[row - rows.start])
                        sources |= dict.fromkeys(ours, GradientLocation(other, row, loss))
    return ReusableGradients(sources)


def _sibling(folder: Path, store: Store) -> Store | None:
    """The store of a folder if it differs from `store` in nothing but its pictures."""
    try:
        other = Store.read_manifest(folder)
    except UserError:
        return None
    form = [(s.dim, s.dtype, s.layout, s.has_losses) for s in (store, other)]
    mine, theirs = ({k: v for k, v in s.identity.items() if k != "data"} for s in (store, other))
    return other if form[0] == form[1] and mine == theirs else None


def _usable(store: Store, shard: int) -> bool:
    """Whether a shard is finished and whole; one that is not is left to its own store."""
    try:
        if not store.finished(shard):
            return False
        check_shard(store, shard, verify=True)
    except (UserError, OSError):
        return False
    return True
