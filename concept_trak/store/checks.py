"""Whether the files of a finished shard are those that were finished."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ..errors import UserError
from ..files import READ_BYTES, disk_errors, sha256_file
from .encoding import finite, refuse_bad_rows
from .folder import Series, ShardFolder


def check_shard(store: ShardFolder, shard: int, verify: bool) -> None:
    """UserError for a missing, truncated or foreign file and, with verify, for a changed one."""
    for series in store.series:
        _check_file(store, shard, series, verify)


def _check_file(store: ShardFolder, shard: int, series: Series, verify: bool) -> None:
    path, count = store.path(shard, ".npy", series.name), store.count(shard)
    mend, header, described = store.remedy(shard), series.header(count), series.described(count)
    if not path.exists():
        raise UserError(f"{path} is missing: {mend}")
    if not path.is_file():  # a pipe would keep the run waiting
        raise UserError(f"{path} is not a regular file: {mend}")
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            raise UserError(f"{path} does not hold {described} {series.dtype} values: {mend}")
    if path.stat().st_size != len(header) + count * series.item_bytes:
        raise UserError(f"{path} is truncated or of another size than {described}: {mend}")
    if verify and sha256_file(path) != store.record(shard).get(series.digest):
        refuse_non_finite(store, shard, series)
        raise UserError(f"{path} is not the file this store finished (checksum differs): {mend}")


def refuse_non_finite(store: ShardFolder, shard: int, series: Series) -> None:
    """UserError that names the first sample of a shard with a NaN or an infinite value."""
    path, step = store.path(shard, ".npy", series.name), max(1, READ_BYTES // series.item_bytes)
    what = "row" if series.shape else "loss"
    message = f"{path}: the {what} of sample {{}} is NaN or infinite: {store.remedy(shard)}"
    for first, block in store.shard_blocks(shard, series, step):
        refuse_bad_rows(finite(block, series.dtype), first, message)


def still_to_make(store: ShardFolder, wanted: Iterable[int], repair: bool) -> list[int]:
    """The shards of `wanted` that are not finished, in order; finished ones are read and compared.

    repair: a damaged one is to be made again, its files are set aside as *.damaged. Otherwise
    UserError for the first of them.
    """
    left = []
    for shard in wanted:
        try:
            if store.finished(shard):
                check_shard(store, shard, verify=True)
                continue
            if (rows := store.path(shard, ".npy")).exists():
                raise UserError(f"{rows} is there without a record of it; {store.remedy(shard)}")
        except UserError as error:
            if not repair:
                raise
            print(f"{error}; its files are set aside as *.damaged", flush=True)
            set_aside(store, shard)
        left.append(shard)
    return left


def set_aside(store: ShardFolder, shard: int) -> None:
    """Rename the files of a shard to *.damaged. UserError for a disk that does not take it."""
    ends = [(s.name, ending) for s in store.series for ending in (".npy", ".npy.part")]
    for name, ending in [*ends, ("train_grad", ".json")]:
        path = store.path(shard, ending, name)
        with disk_errors(path), contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_name(f"{path.name}.damaged"))
