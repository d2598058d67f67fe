"""The files of a store's shards and how far each shard has come; `Store` and its writer share it.

manifest.json            shape, dtype, layout, shard bounds, identity, provenance
train_grad-{i}.npy       finished rows of shard i: a real .npy, or raw values without a header
                         (layout "raw", as in the release)
train_loss-{i}.npy       a store with losses only: one float32 for each of these rows
train_grad-{i}.npy.part  rows being written; likewise train_loss-{i}.npy.part
train_grad-{i}.json      rows safe in every file and, once finished, the files' sha256
train_grad-{i}.piece-*   rows made apart from their neighbours; see `pieces`

On object storage (`remote`) the files are there; the folder is a copy of what was read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic_io import write_json
from ..errors import UserError
from ..validated_io import read_json
from .chunks import Chunk, gaps
from .dtypes import STORED_TYPES, npy_header
from .manifest import COMPUTE_HINT, DOWNLOAD_HINT, shorten
from .remote import remote_of


@dataclass(frozen=True)
class ArrayFile:
    """One of the things a store keeps of each sample, in a file a shard: its row, or its loss.

    name: what the files' names begin with. shape: of one sample. digest: the record's key for the
    sha256 of a finished file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    raw: bool
    digest: str

    @property
    def stored_type(self) -> np.dtype:
        """numpy's type of the stored values."""
        return STORED_TYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * self.stored_type.itemsize

    def header(self, count: int) -> bytes:
        """The .npy header of a shard of `count` samples (its length is fixed by them), empty for
        raw shards.
        """
        return b"" if self.raw else npy_header(self.stored_type, (count, *self.shape))

    def described(self, count: int) -> str:
        """What a file of `count` samples holds, for a message."""
        return f"{count} rows of {self.shape[0]}" if self.shape else f"{count} losses"


class StoreLayout:
    """A store's manifest, file names and progress records; `Store` adds reading and writing."""

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.num_rows, self.dim = manifest["num_rows"], manifest["dim"]
        self.dtype, self.layout = manifest["dtype"], manifest["layout"]
        self.bounds, self.identity = manifest["bounds"], manifest["identity"]
        self.num_split = len(self.bounds) - 1
        core = {key: value for key, value in manifest.items() if key != "provenance"}
        self.store_id = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()
        raw = self.layout == "raw"
        self.grads = ArrayFile("train_grad", (self.dim,), self.dtype, raw, "sha256")
        self.series, self.has_losses = [self.grads], manifest.get("losses", False)
        if self.has_losses:
            self.series.append(ArrayFile("train_loss", (), "float32", raw, "loss_sha256"))
        self.remote = remote_of(self.folder)

    @property
    def where(self) -> str:
        """The folder, or the address it is a copy of."""
        return os.path.relpath(self.folder) if self.remote is None else self.remote.url

    def shard_range(self, shard: int) -> tuple[int, int]:
        """(first row, last row + 1) of a shard."""
        return self.bounds[shard], self.bounds[shard + 1]

    def count(self, shard: int) -> int:
        """Rows of a shard."""
        return self.bounds[shard + 1] - self.bounds[shard]

    def path(self, shard: int, ending: str, name: str = "train_grad") -> Path:
        """The shard's file with the given ending."""
        return self.folder / f"{name}-{shard}{ending}"

    def finished(self, shard: int) -> bool:
        """Whether the shard has its final name and its checksum."""
        rows = self.path(shard, ".npy")
        there = rows.exists() if self.remote is None else rows.name in self.remote.names()
        return there and "sha256" in self.record(shard)

    def pieces(self, shard: int) -> list[Chunk]:
        """The pieces of a shard that are there, in order."""
        if self.remote is None:
            names = [path.name for path in self.folder.glob(f"train_grad-{shard}.piece-*")]
        else:
            names = [*self.remote.names()]
        return sorted(p for name in names if (p := Chunk.of(name)) and p.shard == shard)

    def pending(self, splits: Iterable[int] | None = None) -> list[int]:
        """Shards (of `splits`, default all) that are not finished, in order."""
        shards = range(self.num_split) if splits is None else splits
        return [shard for shard in shards if not self.finished(shard)]

    def refuse_unfinished(self) -> None:
        """UserError that lists the shards that are not finished."""
        if unfinished := self.pending():
            what = f"shard {shorten(unfinished)} of {self.num_split} is not finished"
            raise UserError(f"{self.folder}: {what}; go on with it: {self.line()}")

    def resume_row(self, shard: int) -> int:
        """First row (global index) of the shard that is not yet safely on disk."""
        start, stop = self.shard_range(shard)
        if self.finished(shard):
            return stop
        if self.remote is not None:
            return (gaps(start, stop, self.pieces(shard)) or [(stop, stop)])[0][0]
        on_disk = [self._on_disk(shard, series) for series in self.series]
        return start + max(0, min(self.record(shard).get("rows", 0), *on_disk))

    def _on_disk(self, shard: int, series: ArrayFile) -> int:
        """Whole samples in the unfinished shard's file of that series; negative without a header.

        Losses get their final name before the rows do, so a kill can come between the two.
        """
        for ending in (".npy.part", ".npy"):
            path = self.path(shard, ending, series.name)
            if path.exists():
                header = len(series.header(self.count(shard)))
                return (path.stat().st_size - header) // series.item_bytes
        return 0

    @property
    def checksum(self) -> str:
        """sha256 over the store's identity and every finished shard's content."""
        records = [self.record(shard) for shard in range(self.num_split)]
        digests = ["".join(record.get(s.digest, "") for s in self.series) for record in records]
        return hashlib.sha256(" ".join([self.store_id, *digests]).encode()).hexdigest()

    def record(self, shard: int) -> dict:
        """Progress of the shard: {} or {"store", "rows"[, "sha256"[, "loss_sha256"]]}."""
        path = self.path(shard, ".json")
        if self.remote is not None:
            if path.name not in self.remote.names():
                return {}
            self.remote.bring(path.name)
        if not os.path.lexists(path):
            return {}
        record = read_json(path, self.remedy(shard))
        rows = record.get("rows", 0)
        if type(rows) is not int or not 0 <= rows <= self.count(shard):
            raise UserError(f"{path} is damaged (rows: {rows!r}): {self.remedy(shard)}")
        if record.get("store") != self.store_id:
            raise UserError(f"{path} belongs to another store: {self.remedy(shard)}")
        return record

    def write_record(self, shard: int, rows: int, digests: dict[str, str] | None = None) -> None:
        """Count `rows` of the shard as safe; with the files' digests, all of them as final."""
        record = {"store": self.store_id, "rows": int(rows), **(digests or {})}
        path = self.path(shard, ".json")
        write_json(path, record)
        if self.remote is not None:
            self.remote.keep(path.name)

    def shard_blocks(
        self, shard: int, series: ArrayFile, max_rows: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, stored values [b <= max_rows, *series.shape]) of a finished shard.

        Reads, rather than maps, so that memory stays bounded.
        """
        path, (start, stop) = self.path(shard, ".npy", series.name), self.shard_range(shard)
        with open(path, "rb") as file:
            file.seek(len(series.header(stop - start)))
            for first in range(start, stop, max_rows):
                shape = (min(max_rows, stop - first), *series.shape)
                block = np.fromfile(file, series.stored_type, math.prod(shape))
                if block.size != math.prod(shape):
                    raise UserError(f"{path} is truncated: {self.remedy(shard)}")
                yield first, block.reshape(shape)

    def remedy(self, shard: int) -> str:
        """What mends a shard."""
        if self.grads.raw:  # came from elsewhere
            files = shlex.quote(str(self.folder / f"train_grad-{shard}."))
            return f"remove it, rm {files}*, and fetch it again (0.8 GB): {DOWNLOAD_HINT}"
        return f"make that shard again: {self.line(SHARDS=shard, REPAIR=1)}"

    def line(self, **also: int) -> str:
        """The command line that made the store, with further variables."""
        made = self.manifest["provenance"].get("command")
        made = made if isinstance(made, str) else COMPUTE_HINT
        if "bash " in made:
            return " ".join([*(f"{name}={value}" for name, value in also.items()), made])
        return " ".join([made, *(f"--{name.lower()}={value}" for name, value in also.items())])
