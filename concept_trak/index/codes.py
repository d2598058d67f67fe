"""One-bit codes of a store's rows, kept beside it shard by shard, and the search over them.

index/manifest.json          which store, blocks and damping; digests of the two files below
index/whitening.safetensors  the space of the codes (`whitening`)
index/empty.faiss            FAISS's RaBitQ (Gao & Long 2024), trained, without a row
index/shard-{i}.faiss        the codes of the store's shard i; mapped, not read
index/shard-{i}.json         the shard's sha256 in the store, the codes' own and their length

A shard's codes appear when they are whole. Building again makes those that are missing or belong
to another content of the shard. An index of another store is refused.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError, call
from ..files import atomic, locked, make_folder, sha256_file, write_json
from ..reading import read_json
from ..store.manifest import MAKE
from ..store.shards import Store
from .library import FOLDER, faiss
from .whitening import Whitening, whitening

FORMAT = 1
FILES = ("whitening.safetensors", "empty.faiss")
BUILD = "build_index.sh"
MEND = f"make it: {call(BUILD)}"
QUERY_BITS = 4  # of a query's values: more find no more (experiments/scale)
BLOCK_VALUES = 2**23  # values of rows whitened at a time: 32 MB


class Index:
    """The codes beside a store. `Index.create` makes or reopens it, `Index.open` wants it whole."""

    def __init__(self, folder: Path, store: Store, manifest: dict, *, mend: str = MEND) -> None:
        self.folder, self.store, self.manifest, self.mend = folder, store, manifest, mend
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
        if len(store.pending()) == store.num_split:
            raise UserError(
                f"{store.folder} has no finished shard; make the train gradients first, e.g. "
                f"(about a minute) {MAKE}"
            )
        make_folder(folder)
        with locked(folder):
            if not (folder / "manifest.json").exists():
                space = whitening(store, widths, damping, share)
                space.save(folder / "whitening.safetensors")
                with atomic(folder / "empty.faiss") as file:
                    _write(_trained(space), file)
                files = {name: sha256_file(folder / name) for name in FILES}
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
        manifest = read_json(folder / "manifest.json", remade(folder, mend))
        index = cls(folder, store, manifest, mend=mend)
        if manifest.get("format") != FORMAT or manifest.get("store") != store.store_id:
            raise index._refused("belongs to another store")
        files = manifest.get("files")
        if not isinstance(files, dict) or set(files) != set(FILES):
            raise index._refused("has a damaged manifest.json")
        for name, digest in files.items():
            if not (folder / name).is_file() or sha256_file(folder / name) != digest:
                raise index._refused(f"has lost or changed {name}")
        return index

    @classmethod
    def open(cls, store: Store, *, mend: str = MEND, place: str = FOLDER) -> Index:
        """A whole index, for searching. UserError, beside those of `read_manifest`, for shards that
        are missing, of another length, or of rows that were made again since. Their content is
        compared when the index is built again: to read all of it for each question takes too long.
        """
        index = cls.read_manifest(store, mend=mend, place=place)
        if missing := index.missing(verify=False):
            listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise UserError(f"{index.folder} lacks the codes of shard {listed}; {mend}")
        return index

    def _refused(self, what: str) -> UserError:
        return UserError(f"{self.folder} {what}; {remade(self.folder, self.mend)}")

    # ---- building

    def missing(self, verify: bool = True) -> list[int]:
        """Finished shards of the store whose codes are not there, or are not of these rows. verify:
        compare their sha256, else their length.
        """
        shards = range(self.store.num_split)
        return [i for i in shards if self.store.finished(i) and not self._whole(i, verify)]

    def _whole(self, shard: int, verify: bool) -> bool:
        path = self._path(shard)
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            return False
        try:
            known = read_json(path.with_suffix(".json"), MEND)
        except UserError:
            return False
        return (
            known.get("index") == self.index_id
            and known.get("rows_sha256") == self.store.record(shard)["sha256"]
            and known.get("bytes") == path.stat().st_size
            and (not verify or known.get("sha256") == sha256_file(path))
        )

    def update(self) -> list[int]:
        """Make the codes of the shards that lack them; returns these. Memory: the codes of one
        shard, k / 8 bytes a row, and some 100 MB.
        """
        todo = self.missing()
        rows = sum(self.store.count(i) for i in todo)
        with tqdm(total=rows, desc="codes", unit="row") as bar:
            for shard in todo:
                codes = self._empty()
                for block in self._blocks(shard):
                    codes.add(self.space.rows(block).numpy())
                    bar.update(len(block))
                with atomic(self._path(shard)) as file:
                    _write(codes, file)
                write_json(self._path(shard).with_suffix(".json"), self._record(shard))
        self.__dict__.pop("_shards", None)
        return todo

    def _record(self, shard: int) -> dict[str, Any]:
        path, rows = self._path(shard), self.store.record(shard)["sha256"]
        about = {"index": self.index_id, "rows_sha256": rows}
        return about | {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def _blocks(self, shard: int) -> Iterator[torch.Tensor]:
        """The rows of a shard, float32 [b, k]."""
        size, (start, stop) = max(1, BLOCK_VALUES // self.store.dim), self.store.shard_range(shard)
        for first in range(start, stop, size):
            yield self.store.tensor_rows(range(first, min(first + size, stop)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.faiss"

    # ---- searching

    @cached_property
    def space(self) -> Whitening:
        """Where the codes live."""
        path, mend = self.folder / "whitening.safetensors", remade(self.folder, self.mend)
        return Whitening.load(path, self.manifest["widths"], mend=mend)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's code."""
        return int(self._empty().code_size)

    def _empty(self) -> Any:
        return faiss().read_index(str(self.folder / "empty.faiss"))

    @cached_property
    def _shards(self) -> list[tuple[int, Any]]:
        """(first row, codes mapped from the file) of each finished shard."""
        library, found = faiss(), []
        for shard in range(self.store.num_split):
            try:
                codes = library.read_index(str(self._path(shard)), library.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise self._refused(f"has a damaged shard {shard} ({error})") from None
            found.append((self.store.bounds[shard], codes))
        return found

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


def remade(folder: Path, mend: str) -> str:
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


def _trained(space: Whitening) -> Any:
    """An index without rows. FAISS would take the rows' mean from the queries, too, and so make
    these longer: the space has done so with the rows alone.
    """
    library = faiss()
    codes = library.IndexRaBitQ(space.dim, library.METRIC_INNER_PRODUCT)
    codes.qb = QUERY_BITS
    codes.train(np.zeros((1, space.dim), np.float32))
    return codes


def _write(codes: Any, file: Any) -> None:
    library = faiss()
    library.write_index(codes, library.PyCallbackIOWriter(file.write))
