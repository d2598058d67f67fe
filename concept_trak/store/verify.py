"""Whether the files of a finished shard are those that were finished."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence

from ..atomic_io import READ_BYTES, disk_errors, make_folder, sha256_once
from ..errors import UserError
from ..process import log
from .dtypes import finite, refuse_bad_rows
from .layout import ArrayFile, StoreLayout


def check_shard(
    store: StoreLayout, shard: int, verify: bool, parts: Sequence[ArrayFile] = ()
) -> None:
    """UserError for a missing, truncated or foreign file and, with verify, for a changed one, which
    is read for that once in a process. What lies on object storage is fetched, and fetched again if
    the copy here is not that file. parts: of the shard's files; default: all.
    """
    parts = parts or store.series
    if store.remote is None:
        return _check_files(store, shard, verify, parts)
    if not fetch(store, shard):
        with contextlib.suppress(UserError):
            return _check_files(store, shard, verify, parts)
        for series in store.series:
            store.path(shard, ".npy", series.name).unlink(missing_ok=True)
        fetch(store, shard)
    _check_files(store, shard, False, parts)  # `fetch` has compared the checksum


def fetch(store: StoreLayout, shard: int) -> bool:
    """Have the copies of a shard's files here; whether one had to be fetched. UserError for one
    that is not the file that was finished.
    """
    fetched = False
    for series in store.series:
        path = store.path(shard, ".npy", series.name)
        if path.exists() and path.stat().st_size == store.remote.names().get(path.name):
            continue
        try:
            store.remote.download(path.name, path, store.record(shard).get(series.digest, ""))
        except UserError as error:
            if "checksum" not in str(error):
                raise
            raise UserError(f"{error}: {store.remedy(shard)}") from None
        fetched = True
    return fetched


def fetch_all(store: StoreLayout) -> None:
    """Have a finished store's copy here, whole; nothing happens unless it is on object storage.
    UserError for a disk that is too small for it.
    """
    if store.remote is None:
        return
    sizes = {
        store.path(shard, ".npy", series.name): store.count(shard) * series.item_bytes
        for shard in range(store.num_split)
        for series in store.series
    }
    missing = {path: size for path, size in sizes.items() if not path.exists()}
    if not missing:
        return
    needed, free = sum(missing.values()), shutil.disk_usage(make_folder(store.folder)).free
    told = f"{needed / 1e6:,.0f} MB ({len(missing)} of {len(sizes)} files) into {store.folder}"
    if needed > free:
        mend = "free some or set STORE_CACHE to another folder"
        raise UserError(f"{store.where}: {told}, which has {free / 1e6:,.0f} MB free; {mend}")
    log(f"{store.where}: fetching {told}")
    for shard in range(store.num_split):
        fetch(store, shard)


def _check_files(store: StoreLayout, shard: int, verify: bool, parts: Sequence[ArrayFile]) -> None:
    for series in parts:
        _check_file(store, shard, series, verify)


def _check_file(store: StoreLayout, shard: int, series: ArrayFile, verify: bool) -> None:
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
    if verify and sha256_once(path) != store.record(shard).get(series.digest):
        refuse_non_finite(store, shard, series)
        raise UserError(f"{path} is not the file this store finished (checksum differs): {mend}")


def refuse_non_finite(store: StoreLayout, shard: int, series: ArrayFile) -> None:
    """UserError that names the first sample of a shard with a NaN or an infinite value."""
    path, step = store.path(shard, ".npy", series.name), max(1, READ_BYTES // series.item_bytes)
    what = "row" if series.shape else "loss"
    message = f"{path}: the {what} of sample {{}} is NaN or infinite: {store.remedy(shard)}"
    for first, block in store.shard_blocks(shard, series, step):
        refuse_bad_rows(finite(block, series.dtype), first, message)


def pending_shards(store: StoreLayout, wanted: Iterable[int], repair: bool) -> list[int]:
    """The shards of `wanted` that are not finished, in order; finished ones are read and compared,
    of those on object storage the sizes.

    repair: a damaged one is to be made again, its files are set aside as *.damaged. Otherwise
    UserError for the first of them.
    """
    left = []
    for shard in wanted:
        try:
            if store.finished(shard):
                _check_kept(store, shard)
                continue
            if store.remote is None and (rows := store.path(shard, ".npy")).exists():
                raise UserError(f"{rows} is there without a record of it; {store.remedy(shard)}")
        except UserError as error:
            if not repair:
                raise
            print(f"{error}; its files are set aside as *.damaged", flush=True)
            quarantine(store, shard)
        left.append(shard)
    return left


def _check_kept(store: StoreLayout, shard: int) -> None:
    """As `check_shard`, without fetching what lies elsewhere."""
    if store.remote is None:
        return check_shard(store, shard, verify=True)
    for series in store.series:
        name, count = f"{series.name}-{shard}.npy", store.count(shard)
        wanted = len(series.header(count)) + count * series.item_bytes
        if (found := store.remote.names().get(name)) != wanted:
            what = f"{store.where}/{name} has {found} bytes, not {wanted}"
            raise UserError(f"{what}: {store.remedy(shard)}")


def quarantine(store: StoreLayout, shard: int) -> None:
    """Rename the files of a shard to *.damaged. UserError for a disk that does not take it."""
    ends = [(s.name, ending) for s in store.series for ending in (".npy", ".npy.part")]
    for name, ending in [*ends, ("train_grad", ".json")]:
        path = store.path(shard, ending, name)
        if store.remote is not None:
            store.remote.rename(path.name, f"{path.name}.damaged")
        with disk_errors(path), contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_name(f"{path.name}.damaged"))
