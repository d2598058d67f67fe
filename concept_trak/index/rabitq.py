"""One-bit codes of a store's rows, kept beside it shard by shard, and the search over them.

index/manifest.json          which store, blocks and damping; digests of the two files below
index/whitening.safetensors  the space of the codes (`whitening`)
index/empty.faiss            FAISS's RaBitQ (Gao & Long 2024), trained, without a row
index/shard-{i}.faiss        the codes of the store's shard i; mapped, not read
index/shard-{i}.npy          CRC-32 of each of its rows: of the store, only candidates are read
index/shard-{i}.json         sha256 of the shard in the store and of the two files above

A shard's codes appear when they are whole. Building again makes those that are missing or belong
to another content of the shard. An index of another store is refused, and a file that is not the
one that was made, which is read for that once in a process. FAISS trusts what it reads, so it is
given no file but one that it could itself have written.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..atomic_io import atomic, locked, make_folder, sha256_once, write_bytes, write_json
from ..errors import UserError, script_hint
from ..store.array_cache import write_npy
from ..store.manifest import COMPUTE_HINT, shorten
from ..store.store import Store, widened
from ..store.verify import check_shard
from ..validated_io import read_json, read_npy
from .faiss_import import FOLDER, faiss
from .whitening import Whitening, whitening

FORMAT = 1
FILES = ("whitening.safetensors", "empty.faiss")
BUILD = "build_index.sh"
MEND = f"make it: {script_hint(BUILD)}"
COUNT_AT, CODES_AT = slice(8, 16), 57  # in the file of an index: rows, and bytes of their codes
QUERY_BITS = 4  # of a query's values: more find no more (experiments/scale)
BLOCK_VALUES = 2**23  # values of rows whitened at a time: 32 MB


class Index:
    """The codes beside a store. `Index.create` makes or reopens it, `Index.open` wants it whole."""

    def __init__(self, folder: Path, store: Store, manifest: dict) -> None:
        self.folder, self.store, self.manifest, self.mend = folder, store, manifest, MEND
        core = {key: value for key, value in manifest.items() if key != "provenance"}
        self.index_id = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()

    # ---- making and opening

    @classmethod
    def create(
        cls,
        store: Store,
        widths: Sequence[int],
        damping: float,
        share: float = 1.0,
        place: str = FOLDER,
    ) -> Index:
        """The index of a store with at least one finished shard, its space taken from what is
        there. share: of the coordinates kept (`whitening`). place: the folder's name. UserError for
        one that was made of another store, of other blocks, at another damping or share.
        """
        folder, wanted = store.folder / place, _wanted(store, widths, damping, share)
        finished = [shard for shard in range(store.num_split) if store.finished(shard)]
        if not finished:
            raise UserError(
                f"{store.folder} has no finished shard; make the train gradients first, e.g. "
                f"(about a minute) {COMPUTE_HINT}"
            )
        make_folder(folder)
        with locked(folder):
            if not (folder / "manifest.json").exists():
                for shard in finished:
                    check_shard(store, shard, True, store.series[:1])
                space = whitening(store, widths, damping, share)
                space.save(folder / "whitening.safetensors")
                write_bytes(folder / "empty.faiss", _content(_trained(space.dim)))
                files = {name: sha256_once(folder / name) for name in FILES}
                made = {"provenance": {"faiss": faiss().__version__}}
                write_json(folder / "manifest.json", wanted | {"files": files} | made)
        index = cls.read_manifest(store, place=place)
        for key, value in wanted.items():
            if index.manifest.get(key) != value:
                raise index._refused(f"was made with another {key.replace('_', ' ')}")
        return index

    @classmethod
    def read_manifest(cls, store: Store, *, mend: str = MEND, place: str = FOLDER) -> Index:
        """The index of a store, whole or not. mend: what makes it. UserError if there is none, or
        one of another store, and for a file that was changed.
        """
        folder = store.folder / place
        if not (folder / "manifest.json").exists():
            raise UserError(f"{store.folder} has no index; {mend}")
        manifest = read_json(folder / "manifest.json", rebuild_hint(folder, mend))
        index = cls(folder, store, manifest)
        index.mend = mend
        if manifest.get("format") != FORMAT or manifest.get("store") != store.store_id:
            raise index._refused("belongs to another store")
        files, widths = manifest.get("files"), manifest.get("widths")
        whole = isinstance(files, dict) and set(files) == set(FILES) and isinstance(widths, list)
        if (
            not whole
            or any(type(w) is not int or w < 1 for w in widths)
            or sum(widths) != store.dim
        ):
            raise index._refused("has a damaged manifest.json")
        for name, digest in files.items():
            if not (folder / name).is_file() or sha256_once(folder / name) != digest:
                raise index._refused(f"has lost or changed {name}")
        return index

    @classmethod
    def open(cls, store: Store, *, mend: str = MEND, place: str = FOLDER) -> Index:
        """A whole index, for searching. UserError, beside those of `read_manifest`, for shards that
        are missing, changed, of an earlier version, or of rows that were made again since.
        """
        index = cls.read_manifest(store, mend=mend, place=place)
        if missing := index.missing():
            told = f"lacks the codes of shard {shorten(missing)}, or they were changed"
            raise UserError(f"{index.folder} {told}; {mend}")
        return index

    def _refused(self, what: str) -> UserError:
        return UserError(f"{self.folder} {what}; {rebuild_hint(self.folder, self.mend)}")

    # ---- building

    def missing(self) -> list[int]:
        """Finished shards of the store whose codes are not there, or are not of these rows."""
        shards = range(self.store.num_split)
        return [i for i in shards if self.store.finished(i) and not self._whole(i)]

    def _whole(self, shard: int) -> bool:
        try:
            known = read_json(self._path(shard, ".json"), MEND)
        except UserError:
            return False
        files = [self._path(shard), self._path(shard, ".npy")]
        return all(file.is_file() for file in files) and known == self._record(shard)

    def update(self) -> list[int]:
        """Make the codes of the shards that lack them; returns these. Memory: the codes of one
        shard, k / 8 bytes a row, and some 100 MB.
        """
        todo = self.missing()
        rows = sum(self.store.count(i) for i in todo)
        with tqdm(total=rows, desc="codes", unit="row") as bar:
            for shard in todo:
                check_shard(self.store, shard, True, self.store.series[:1])
                codes, sums = _trained(self.space.dim), []
                for block in self._blocks(shard):
                    codes.add(self.space.rows(widened(block, self.store.dtype)).numpy())
                    sums += map(zlib.crc32, block)
                    bar.update(len(block))
                with atomic(self._path(shard)) as file:
                    _write(codes, file)
                write_npy(self._path(shard, ".npy"), np.array(sums, "<u4"))
                write_json(self._path(shard, ".json"), self._record(shard))
        for name in ("_shards", "_sums"):
            self.__dict__.pop(name, None)
        return todo

    def _record(self, shard: int) -> dict[str, Any]:
        path, rows = self._path(shard), self.store.record(shard)["sha256"]
        about = {"index": self.index_id, "rows_sha256": rows, "bytes": path.stat().st_size}
        sums = sha256_once(self._path(shard, ".npy"))
        return about | {"sha256": sha256_once(path), "row_sums_sha256": sums}

    def _blocks(self, shard: int) -> Iterator[np.ndarray]:
        """The rows of a shard [b, k] as they are stored."""
        size, (start, stop) = max(1, BLOCK_VALUES // self.store.dim), self.store.shard_range(shard)
        for first in range(start, stop, size):
            yield self.store.stored_rows(range(first, min(first + size, stop)))

    def _path(self, shard: int, ending: str = ".faiss") -> Path:
        return self.folder / f"shard-{shard}{ending}"

    # ---- searching

    @cached_property
    def space(self) -> Whitening:
        """Where the codes live."""
        path, mend = self.folder / "whitening.safetensors", rebuild_hint(self.folder, self.mend)
        return Whitening.load(path, self.manifest["widths"], mend=mend)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's code."""
        return int(_trained(self.space.dim).code_size)

    @cached_property
    def _shards(self) -> list[tuple[int, Any]]:
        """(first row, codes mapped from the file) of each finished shard."""
        library, empty, found = faiss(), _content(_trained(self.space.dim)), []
        if (self.folder / "empty.faiss").read_bytes() != empty:
            raise self._refused("was written by another version of FAISS")
        for shard in range(self.store.num_split):
            path, count = self._path(shard), self.store.count(shard)
            if not _is_written(path, empty, count, self.row_bytes):
                raise self._refused(f"has a damaged shard {shard}")
            codes = library.read_index(str(path), library.IO_FLAG_MMAP_IFC)
            found.append((self.store.bounds[shard], codes))
        return found

    @cached_property
    def _sums(self) -> list[np.ndarray]:
        """CRC-32 of the rows of each shard, mapped."""
        found, mend = [], rebuild_hint(self.folder, self.mend)
        for shard in range(self.store.num_split):
            path = self._path(shard, ".npy")
            sums = read_npy(path, mend, 1, mmap=True)
            if len(sums) != self.store.count(shard):
                raise self._refused(f"has a damaged shard {shard}")
            found.append(sums)
        return found

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """float32 [n, k] of some rows of the store. UserError for one that is not what it was when
        its code was made.
        """
        stored = self.store.stored_rows(rows)
        shards = np.searchsorted(self.store.bounds, rows, side="right") - 1
        for row, shard, values in zip(rows.tolist(), shards.tolist(), stored, strict=True):
            if zlib.crc32(values) != self._sums[shard][row - self.store.bounds[shard]]:
                path = self.store.path(shard, ".npy")
                raise UserError(f"{path}: row {row} was changed: {self.store.remedy(shard)}")
        return widened(stored, self.store.dtype)

    def search(self, solved: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(estimated scores, rows) [P, min(count, N)] of the highest estimates, the highest first.

        solved: [P, k], solved queries. The lowest: search for their negative.
        """
        asked = self.space.queries(torch.as_tensor(np.asarray(solved, np.float64)))
        of_mean = (asked @ self.space.mean)[:, None].numpy()
        # FAISS takes a query for zero below an absolute bound, and a solved one is small
        length = asked.norm(dim=1, keepdim=True).clamp_min(torch.finfo(asked.dtype).tiny)
        asked, length = (asked / length).numpy(), length.numpy()
        values, rows = [], []
        for first, codes in self._shards:
            near, places = codes.search(asked, min(count, codes.ntotal))
            values.append(near * length + of_mean)
            rows.append(places + first)
        near, places = np.concatenate(values, 1), np.concatenate(rows, 1)
        if near.shape[1] > count:
            best = np.argpartition(-near, count - 1, axis=1)[:, :count]
            near, places = (np.take_along_axis(x, best, 1) for x in (near, places))
        order = np.argsort(-near, axis=1, kind="stable")
        return np.take_along_axis(near, order, 1), np.take_along_axis(places, order, 1)


def rebuild_hint(folder: Path, mend: str) -> str:
    """What mends an index that cannot be used, to end a refusal with. mend: what makes one."""
    return f"remove it, rm -r {shlex.quote(str(folder))}, and {mend}"


def _wanted(store: Store, widths: Sequence[int], damping: float, share: float) -> dict:
    return {
        "format": FORMAT,
        "store": store.store_id,
        "widths": list(widths),
        "damping": float(damping),
        "share": float(share),
        "query_bits": QUERY_BITS,
    }


def _trained(dim: int) -> Any:
    """An index without rows. FAISS would take the rows' mean from the queries, too, and so make
    these longer: the space has done so with the rows alone.
    """
    library = faiss()
    codes = library.IndexRaBitQ(dim, library.METRIC_INNER_PRODUCT)
    codes.qb = QUERY_BITS
    codes.train(np.zeros((1, dim), np.float32))
    return codes


def _write(codes: Any, file: Any) -> None:
    library = faiss()
    library.write_index(codes, library.PyCallbackIOWriter(file.write))


def _content(codes: Any) -> bytes:
    """What `_write` writes."""
    file = io.BytesIO()
    _write(codes, file)
    return file.getvalue()


def _is_written(path: Path, empty: bytes, count: int, row_bytes: int) -> bool:
    """Whether a file is that of so many codes, whatever these are. empty: that of none."""
    head, tail = bytearray(empty[: CODES_AT + 8]), empty[CODES_AT + 8 :]
    head[COUNT_AT] = count.to_bytes(8, "little")
    head[CODES_AT:] = (count * row_bytes).to_bytes(8, "little")
    if path.stat().st_size != len(empty) + count * row_bytes:
        return False
    with open(path, "rb") as file:
        begins = file.read(len(head)) == head
        file.seek(-len(tail), 2)
        return begins and file.read() == tail
