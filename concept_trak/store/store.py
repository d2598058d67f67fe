"""Sharded, crash-safe store of projected gradient rows; `folder` names its files.

Rows are appended to the .part file and counted in the .json only after fsync, so a killed run
resumes at the last counted row and ends byte-identical. Each shard has files of its own: several
processes may fill different shards of one store at once, and several machines one shard, in
`pieces`. A store may lie on object storage (`remote`). This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_io import disk_errors, locked, sha256_file, write_bytes, write_json
from ..errors import UserError
from ..process import log
from .chunks import Chunk, gaps, pack, unpack
from .dtypes import decode
from .layout import StoreLayout
from .manifest import COMPARED, Layout, check_equal, raw_manifest, read_manifest
from .remote import MANIFEST, remote_of
from .remote_writer import RemoteShardWriter
from .verify import check_shard, fetch_all, refuse_non_finite
from .writer import ShardWriter, encoded

if TYPE_CHECKING:
    import torch


class Store(StoreLayout):
    """Rows [num_rows, dim] over num_split shards. Use `Store.create`, `Store.open` or
    `Store.adopt_raw`.
    """

    def __init__(self, folder: Path, manifest: dict) -> None:
        super().__init__(folder, manifest)
        self._writers: dict[int, ShardWriter | RemoteShardWriter] = {}
        self.keeps_copies = True  # of the shards that are finished here, on object storage

    # ---- making and opening

    @classmethod
    def create(
        cls, folder: Path, layout: Layout, identity: dict, provenance: dict | None = None
    ) -> Store:
        """Make the store's manifest, or reopen the store when layout and `identity` (JSON) agree
        with what is there.

        provenance: versions and such, kept but never compared (default:
        concept_trak.settings.provenance()). Raises UserError naming the first thing that differs.
        """
        if provenance is None:
            from ..settings import provenance as collect  # imports torch: only when needed

            provenance = collect()
        identity = json.loads(json.dumps(identity))
        manifest = layout.manifest() | {"identity": identity, "provenance": provenance}
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remote = remote_of(folder)
        with locked(folder):
            path = folder / MANIFEST if remote is None else remote.bring(MANIFEST)
            if not path.exists():
                write_json(path, manifest)
                if remote is not None:
                    remote.keep(MANIFEST)
        store = cls.read_manifest(folder)
        for key in COMPARED:
            check_equal(folder, key, manifest[key], store.manifest[key])
        check_equal(folder, "losses", layout.losses, store.has_losses)
        return store

    @classmethod
    def read_manifest(cls, folder: Path) -> Store:
        """The store of a folder, finished or not; UserError if there is none."""
        if (remote := remote_of(folder)) is not None:
            remote.bring(MANIFEST)
        return cls(folder, read_manifest(folder))

    @classmethod
    def open(cls, folder: Path, expect: dict | None = None, verify: bool = True) -> Store:
        """Open a complete store for reading.

        expect: as for `expect`. verify: compare every file's sha256 (reads the whole store). Raises
        UserError for a missing store, an expected key that differs, and unfinished, truncated or
        changed shards.
        """
        store = cls.read_manifest(Path(folder))
        store.expect(expect or {})
        store.refuse_unfinished()
        fetch_all(store)
        for shard in range(store.num_split):
            check_shard(store, shard, verify)
        return store

    def expect(self, values: dict[str, Any]) -> None:
        """UserError unless these keys agree with the identity (or with num_rows, dim, dtype,
        layout, losses), naming the first that does not.
        """
        known = {"losses": False} | self.manifest | self.identity
        for key, value in json.loads(json.dumps(values)).items():
            check_equal(self.folder, key, value, known.get(key))

    @classmethod
    def adopt_raw(
        cls, folder: Path, dim: int, identity: dict | None = None, provenance: dict | None = None
    ) -> Store:
        """Write the manifest of a folder of header-less float32 shards train_grad-0.npy ... (the
        released layout) and open it.

        identity, provenance: as for `create`; {"adopted": "raw float32"} is added to the identity.
        Raises UserError for missing, truncated or real .npy shards and for a row that is not
        finite; then no manifest is written.
        """
        store = cls.raw_shards(folder, dim, identity, provenance)
        for shard in range(store.num_split):
            refuse_non_finite(store, shard, store.grads)
            digest = sha256_file(store.path(shard, ".npy"))
            store.write_record(shard, store.count(shard), {"sha256": digest})
        write_json(store.folder / "manifest.json", store.manifest)
        return store

    @classmethod
    def raw_shards(
        cls, folder: Path, dim: int, identity: dict | None = None, provenance: dict | None = None
    ) -> Store:
        """The store that `adopt_raw` would make, with nothing written yet: `rows` works. UserError
        as there, values unchecked.
        """
        identity = json.loads(json.dumps({"adopted": "raw float32", **(identity or {})}))
        extra = {"identity": identity, "provenance": provenance or {}}
        return cls(folder, raw_manifest(Path(folder), dim) | extra)

    # ---- writing

    def append(
        self, shard: int, rows: np.ndarray, first_row: int, losses: np.ndarray | None = None
    ) -> None:
        """Append rows [b, dim] float32, the next ones of the shard; first_row is the global index
        of the first. losses [b] float32: each row's loss, in a store with losses and only there.

        Raises UserError naming the sample for NaN, Inf or a value the stored dtype cannot hold; for
        a full disk; for a finished shard; and for a shard that another process is writing.
        ValueError if the rows are not the next ones, and for losses too many, too few or none.
        """
        self._with_writer(shard, lambda writer: writer.append(rows, first_row, losses))

    def finish(self, shard: int) -> None:
        """Seal a complete shard: checksums into its record, then its final name. Nothing to do for
        a finished one.
        """
        if not self.finished(shard):
            self._with_writer(shard, lambda writer: writer.finish())
            self._writers.pop(shard).close()
        self.remove_pieces(shard)

    def _with_writer(
        self, shard: int, action: Callable[[ShardWriter | RemoteShardWriter], None]
    ) -> None:
        """On any error forget the writer, so that the next append starts again from the last
        counted row.
        """
        try:
            if shard not in self._writers:
                kind = ShardWriter if self.remote is None else RemoteShardWriter
                self._writers[shard] = kind(self, shard)
            with disk_errors(self.path(shard, ".npy.part")):
                action(self._writers[shard])
        except BaseException:
            if writer := self._writers.pop(shard, None):
                writer.close()
            raise

    # ---- pieces

    def put_piece(self, piece: Chunk, rows: np.ndarray, losses: np.ndarray | None = None) -> None:
        """Keep rows [b, dim] float32, and their losses [b], of a shard that others may be working
        at, too. UserError as `append`.
        """
        stored = encoded(self, rows, piece.first, losses)
        if len(rows) != len(piece):
            raise ValueError(f"{piece.name} takes {len(piece)} rows, not {len(rows)}")
        self.write_piece(
            piece, pack(self.store_id, stored[0], None if losses is None else stored[1])
        )

    def write_piece(self, piece: Chunk, content: bytes) -> None:
        """Keep the content of a piece; see `pieces.pack`."""
        if self.remote is None:
            write_bytes(self.folder / piece.name, content)
        else:
            self.remote.write(piece.name, content)

    def stored_piece(self, piece: Chunk) -> list[np.ndarray]:
        """[stored rows [b, dim][, losses [b]]]. UserError for a piece that is not whole, which is
        removed: its rows are to be made again.
        """
        if self.remote is None:
            content = (self.folder / piece.name).read_bytes()
        else:
            content = self.remote.read(piece.name) or b""
        try:
            shape = (len(piece), self.dim)
            rows, losses = unpack(
                content, self.store_id, shape, self.grads.stored_type, self.has_losses
            )
        except ValueError as error:
            self._remove(piece)
            raise UserError(
                f"{self.where}/{piece.name} {error}; it is removed, and its rows are made again "
                f"by: {self.line(SHARDS=piece.shard)}"
            ) from None
        return [rows] if losses is None else [rows, losses]

    def absorb(self, shard: int) -> None:
        """Append the rows that come next as long as pieces hold them; a piece that is not whole is
        told and removed. Nothing to do on object storage, where shards are made of pieces.
        """
        row = self.next_row(shard)
        for piece in self.pieces(shard) if self.remote is None else ():
            if not piece.first <= row < piece.stop or self.finished(shard):
                continue
            try:
                rows, *losses = (part[row - piece.first :] for part in self.stored_piece(piece))
            except UserError as error:
                log(str(error))
                return
            self.append(shard, decode(rows, self.dtype), row, losses[0] if losses else None)
            row = piece.stop

    def next_row(self, shard: int) -> int:
        """First row of the shard that was not appended."""
        writer = self._writers.get(shard)
        return self.resume_row(shard) if writer is None else writer.next_row

    def missing(self, shard: int) -> list[tuple[int, int]]:
        """(first, stop) of the runs of rows that nobody has made yet, in order."""
        start, stop = self.shard_range(shard)
        if self.finished(shard):
            return []
        done, writer = self.pieces(shard), self._writers.get(shard)
        if isinstance(writer, RemoteShardWriter):
            return gaps(start, stop, [*done, *writer.waiting])
        return gaps(self.next_row(shard), stop, done)

    def remove_pieces(self, shard: int) -> None:
        """Of a finished shard."""
        for piece in self.pieces(shard):
            self._remove(piece)

    def _remove(self, piece: Chunk) -> None:
        if self.remote is not None:
            return self.remote.remove(piece.name)
        with disk_errors(self.folder):
            (self.folder / piece.name).unlink(missing_ok=True)

    # ---- files beside the rows

    def beside(self, name: str) -> Path:
        """Where a small file of the store is, or would be; brought from object storage."""
        return self.folder / name if self.remote is None else self.remote.bring(name)

    def keep_beside(self, name: str, value: Any) -> None:
        """Keep a small file of the store, JSON."""
        write_json(self.folder / name, value)
        if self.remote is not None:
            self.remote.keep(name)

    # ---- reading

    def stored_blocks(self, max_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, [b <= max_rows, dim]) over the finished shards in order, in the stored
        type (uint16 for bfloat16); `decode` widens it. Blocks do not cross shards. UserError for a
        shard that is not the one that was finished.
        """
        for shard in range(self.num_split):
            if self.finished(shard):
                check_shard(self, shard, True, self.series[:1])
                yield from self.shard_blocks(shard, self.grads, max_rows)

    def tensor_blocks(
        self, max_rows: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """As `stored_blocks` but torch float32 tensors on `device`; torch widens float16 ten times
        faster than numpy.
        """
        for start, stored in self.stored_blocks(max_rows):
            yield start, widened(stored, self.dtype, device)

    def rows(self, indices: Iterable[int]) -> np.ndarray:
        """float32 [len(indices), dim] of the given global rows, in that order."""
        return decode(self.stored_rows(indices), self.dtype)

    def stored_rows(self, indices: Iterable[int]) -> np.ndarray:
        """As `rows`, in the stored type (uint16 for bfloat16)."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (0 <= indices.min() and indices.max() < self.num_rows):
            given = indices.min() if indices.min() < 0 else indices.max()
            raise UserError(f"{self.folder} has no row {given}; give indices below {self.num_rows}")
        out = np.empty((len(indices), self.dim), self.grads.stored_type)
        shards = np.searchsorted(self.bounds, indices, side="right") - 1
        for shard in np.unique(shards):
            path, count = self.path(shard, ".npy"), self.count(shard)
            offset, shape = len(self.grads.header(count)), (count, self.dim)
            mapped = np.memmap(path, self.grads.stored_type, "r", offset=offset, shape=shape)
            here = shards == shard
            out[here] = mapped[indices[here] - self.bounds[shard]]
        return out

    def tensor_rows(self, indices: Iterable[int]) -> torch.Tensor:
        """As `rows`, but a torch tensor, widened as in `tensor_blocks`."""
        return widened(self.stored_rows(indices), self.dtype)

    def losses(self) -> np.ndarray:
        """float32 [num_rows], the loss of each row; UserError for a store without losses and for
        one that is not finished.
        """
        if not self.has_losses:
            mend = "make the train gradients again with F=contrast_llr, which keeps them"
            raise UserError(f"{self.folder} keeps no losses; {mend}")
        self.refuse_unfinished()
        return np.concatenate([self.shard_losses(shard) for shard in range(self.num_split)])

    def shard_losses(self, shard: int) -> np.ndarray:
        """float32 [rows of the shard] of a finished shard in a store with losses. UserError for a
        file that is not the one that was finished.
        """
        check_shard(self, shard, True, self.series[1:])
        blocks = self.shard_blocks(shard, self.series[1], self.num_rows)
        return np.concatenate([block for _, block in blocks])


def widened(stored: np.ndarray, dtype: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Stored values as float32 on a device."""
    import torch  # here only: writing shards needs no torch

    narrow = dtype == "bfloat16"
    block = torch.from_numpy(stored.view(np.int16) if narrow else stored)
    return (block.view(torch.bfloat16) if narrow else block).to(device).float()
