"""Sharded, crash-safe store of projected gradient rows: a folder with

    manifest.json          shape, dtype, layout, shard bounds, identity of everything that went in, provenance
    train_grad-{i}.npy     finished rows of shard i: a real .npy, or raw values without a header (layout "raw", as in the release)
    train_grad-{i}.npy.part, train_grad-{i}.json    rows being written; progress and, once finished, the sha256 of shard i

Rows are appended to the .part file and counted in the .json only after fsync, so a killed run
resumes at the last counted row and ends byte-identical. Each shard has files of its own: several
processes may fill different shards of one store at once. This module imports no torch, and stores
bfloat16 as the uint16 of its upper float32 half (numpy has no such type).
"""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import READ_BYTES, disk_errors, locked, sha256_file, write_json
from .writer import STORED_TYPES, ShardWriter, decode, finite, refuse_bad_rows

FORMAT = 1


class Store:
    """Rows [num_rows, dim] over num_split shards. Use `Store.create`, `Store.open` or
    `Store.adopt_raw`.
    """

    def __init__(self, folder, manifest):
        self.folder, self.manifest = Path(folder), manifest
        self.num_rows, self.dim = manifest["num_rows"], manifest["dim"]
        self.dtype, self.layout, self.bounds = (
            manifest["dtype"],
            manifest["layout"],
            manifest["bounds"],
        )
        self.identity, self.num_split = manifest["identity"], len(manifest["bounds"]) - 1
        core = {key: value for key, value in manifest.items() if key != "provenance"}
        self.store_id = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()
        self._writers = {}

    # ---- making and opening

    @classmethod
    def create(
        cls, folder, num_rows, dim, num_split, dtype, identity, layout="npy", provenance=None
    ):
        """Make the store's manifest, or reopen the store when shape and `identity` (JSON) agree
        with what is there.

        dtype: float16, bfloat16 or float32. layout: "npy" or "raw". provenance: versions and such,
        kept but never compared (default: concept_trak.settings.provenance()). Raises UserError
        naming the first thing that differs.
        """
        if dtype not in STORED_TYPES:
            raise UserError(
                f"unknown store dtype {dtype!r}: choose one of {', '.join(STORED_TYPES)}"
            )
        if layout not in ("npy", "raw"):
            raise UserError(f"unknown store layout {layout!r}: choose npy or raw")
        if not 1 <= num_split <= num_rows:
            raise UserError(
                f"num_split must be between 1 and the number of rows, {num_rows}, not {num_split}"
            )
        if provenance is None:
            from ..settings import (
                provenance as collect_provenance,  # imports torch: only when needed
            )

            provenance = collect_provenance()
        bounds = [num_rows * i // num_split for i in range(num_split + 1)]
        identity = json.loads(json.dumps(identity))
        manifest = {
            "format": FORMAT,
            "num_rows": num_rows,
            "dim": dim,
            "dtype": dtype,
            "layout": layout,
            "bounds": bounds,
        }
        manifest |= {"identity": identity, "provenance": provenance}
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / "manifest.json").exists():
                write_json(folder / "manifest.json", manifest)
        store = cls.read_manifest(folder)
        for key in ("num_rows", "dim", "dtype", "layout", "bounds", "identity"):
            _refuse_difference(folder, key, manifest[key], store.manifest[key])
        return store

    @classmethod
    def open(cls, folder, expect=None, verify=True):
        """Open a complete store for reading.

        expect: keys that must agree with the identity (or with num_rows, dim, dtype, layout).
        verify: compare every shard's sha256 (reads the whole store). Raises UserError for a missing
        store, an expected key that differs, and unfinished, truncated or changed shards.
        """
        store = cls.read_manifest(Path(folder))
        store.expect(expect or {})
        if unfinished := store.pending():
            what = f"shard {_listed(unfinished)} of {store.num_split} is not finished"
            raise UserError(f"{folder}: {what}: run the train gradients again")
        for shard in range(store.num_split):
            store._check_shard(shard, verify)
        return store

    def expect(self, values):
        """UserError unless these keys agree with the identity (or with num_rows, dim, dtype,
        layout), naming the first that does not.
        """
        known = self.manifest | self.identity
        for key, value in json.loads(json.dumps(values)).items():
            _refuse_difference(self.folder, key, value, known.get(key))

    @classmethod
    def adopt_raw(cls, folder, dim, identity=None, provenance=None):
        """Write the manifest of a folder of header-less float32 shards train_grad-0.npy ... (the
        released layout) and open it.

        identity, provenance: as for `create`; {"adopted": "raw float32"} is added to the identity.
        Raises UserError for missing, truncated or real .npy shards and for a row that is not
        finite; then no manifest is written.
        """
        store = cls.raw_shards(folder, dim, identity, provenance)
        for shard, (start, stop) in enumerate(zip(store.bounds, store.bounds[1:])):
            store._refuse_non_finite(shard)
            store.write_record(shard, stop - start, sha256_file(store.path(shard, ".npy")))
        write_json(store.folder / "manifest.json", store.manifest)
        return store

    @classmethod
    def raw_shards(cls, folder, dim, identity=None, provenance=None):
        """The store that `adopt_raw` would make, with nothing written yet: `rows` works. UserError
        as there, values unchecked.
        """
        folder = Path(folder)
        found = {
            int(m[1]): p
            for p in folder.glob("train_grad-*.npy")
            if (m := re.fullmatch(r"train_grad-(\d+)\.npy", p.name))
        }
        if not found or sorted(found) != list(range(len(found))):
            raise UserError(
                f"{folder}: expected train_grad-0.npy, -1.npy, ... without gaps, found "
                f"{_listed(sorted(found))}"
            )
        bounds = [0]
        for shard in range(len(found)):
            with open(found[shard], "rb") as file:
                if file.read(6) == b"\x93NUMPY":
                    raise UserError(
                        f"{found[shard]} is a real .npy file, not raw float32: it cannot be adopted"
                    )
            rows, rest = divmod(found[shard].stat().st_size, 4 * dim)
            if rest or not rows:
                raise UserError(
                    f"{found[shard]} is truncated or not of {dim} float32 values a row: fetch it "
                    "again"
                )
            bounds.append(bounds[-1] + rows)
        manifest = {
            "format": FORMAT,
            "num_rows": bounds[-1],
            "dim": dim,
            "dtype": "float32",
            "layout": "raw",
            "bounds": bounds,
        }
        identity = json.loads(json.dumps({"adopted": "raw float32", **(identity or {})}))
        return cls(folder, manifest | {"identity": identity, "provenance": provenance or {}})

    @classmethod
    def read_manifest(cls, folder):
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            _refuse_difference(folder, "format", FORMAT, manifest["format"])
            return cls(folder, manifest)
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no gradient store (no manifest.json): run the train gradients "
                "first"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{path} cannot be read as a store manifest ({error}): remove it and make the "
                "store again"
            ) from None

    # ---- progress

    def shard_range(self, shard):
        """(first row, last row + 1) of a shard."""
        return self.bounds[shard], self.bounds[shard + 1]

    def pending(self, splits=None):
        """Shards (of `splits`, default all) that are not finished, in order."""
        return [
            shard
            for shard in (range(self.num_split) if splits is None else splits)
            if not self.finished(shard)
        ]

    def resume_row(self, shard):
        """First row (global index) of the shard that is not yet safely on disk."""
        start, stop = self.shard_range(shard)
        if self.finished(shard):
            return stop
        counted = self.record(shard).get("rows", 0)
        part = self.path(shard, ".npy.part")
        on_disk = (
            (part.stat().st_size - len(self.header(shard))) // self.row_bytes
            if part.exists()
            else 0
        )
        return start + max(0, min(counted, on_disk))

    @property
    def checksum(self):
        """sha256 over the store's identity and every finished shard's content."""
        digests = [self.record(shard).get("sha256", "") for shard in range(self.num_split)]
        return hashlib.sha256(" ".join([self.store_id, *digests]).encode()).hexdigest()

    # ---- writing

    def append(self, shard, rows, first_row):
        """Append rows [b, dim] float32, the next ones of the shard; first_row is the global index
        of the first.

        Raises UserError naming the sample for NaN, Inf or a value the stored dtype cannot hold; for
        a full disk; for a finished shard; and for a shard that another process is writing.
        ValueError if the rows are not the next ones.
        """
        self._with_writer(shard, lambda writer: writer.append(rows, first_row))

    def finish(self, shard):
        """Seal a complete shard: checksum into its record, then its final name. Nothing to do for a
        finished one.
        """
        if not self.finished(shard):
            self._with_writer(shard, ShardWriter.finish)
            self._writers.pop(shard).close()

    def _with_writer(self, shard, action):
        """On any error forget the writer, so that the next append starts again from the last
        counted row.
        """
        try:
            if shard not in self._writers:
                self._writers[shard] = ShardWriter(self, shard)
            with disk_errors(self.path(shard, ".npy.part")):
                action(self._writers[shard])
        except BaseException:
            if writer := self._writers.pop(shard, None):
                writer.close()
            raise

    # ---- reading

    def blocks(self, max_rows):
        """Yield (first row, float32 [b <= max_rows, dim]) over the finished shards in order. Blocks
        do not cross shards.
        """
        for start, stored in self.stored_blocks(max_rows):
            yield start, decode(stored, self.dtype)

    def stored_blocks(self, max_rows):
        """As `blocks` but in the stored type (uint16 for bfloat16). Reads, rather than maps, so
        that memory stays bounded.
        """
        for shard in range(self.num_split):
            if not self.finished(shard):
                continue
            start, stop = self.shard_range(shard)
            with open(self.path(shard, ".npy"), "rb") as file:
                file.seek(len(self.header(shard)))
                for first in range(start, stop, max_rows):
                    count = min(max_rows, stop - first) * self.dim
                    block = np.fromfile(file, STORED_TYPES[self.dtype], count)
                    if block.size != count:
                        raise UserError(
                            f"{self.path(shard, '.npy')} is truncated: {_remedy(shard)}"
                        )
                    yield first, block.reshape(-1, self.dim)

    def tensor_blocks(self, max_rows, device="cpu"):
        """As `blocks` but torch float32 tensors on `device`; torch widens float16 ten times faster
        than numpy.
        """
        import torch  # here only: writing shards needs no torch

        for start, stored in self.stored_blocks(max_rows):
            block = torch.from_numpy(stored.view(np.int16) if self.dtype == "bfloat16" else stored)
            yield (
                start,
                (block.view(torch.bfloat16) if self.dtype == "bfloat16" else block)
                .to(device)
                .float(),
            )

    def rows(self, indices):
        """float32 [len(indices), dim] of the given global rows, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (0 <= indices.min() and indices.max() < self.num_rows):
            raise UserError(
                f"{self.folder} has rows 0 to {self.num_rows - 1}, not {indices.min()} to "
                f"{indices.max()}"
            )
        out = np.empty((len(indices), self.dim), np.float32)
        shards = np.searchsorted(self.bounds, indices, side="right") - 1
        for shard in np.unique(shards):
            start, stop = self.shard_range(shard)
            shape, header = (stop - start, self.dim), len(self.header(shard))
            mapped = np.memmap(
                self.path(shard, ".npy"), STORED_TYPES[self.dtype], "r", offset=header, shape=shape
            )
            out[shards == shard] = decode(mapped[indices[shards == shard] - start], self.dtype)
        return out

    # ---- checks

    def _check_shard(self, shard, verify):
        path, (start, stop) = self.path(shard, ".npy"), self.shard_range(shard)
        remedy = _remedy(shard)
        header = self.header(shard)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise UserError(
                    f"{path} does not hold {stop - start} rows of {self.dim} {self.dtype} values: "
                    f"{remedy}"
                )
        if path.stat().st_size != len(header) + (stop - start) * self.row_bytes:
            raise UserError(
                f"{path} is truncated or of another size than {stop - start} rows of {self.dim}: "
                f"{remedy}"
            )
        if verify and sha256_file(path) != self.record(shard).get("sha256"):
            self._refuse_non_finite(shard)
            raise UserError(
                f"{path} is not the file this store finished (checksum differs): {remedy}"
            )

    def _refuse_non_finite(self, shard):
        (start, stop), header = self.shard_range(shard), len(self.header(shard))
        path, step = self.path(shard, ".npy"), max(1, READ_BYTES // self.row_bytes)
        message = f"{path}: the row of sample {{}} is NaN or infinite: {_remedy(shard)}"
        with open(path, "rb") as file:
            file.seek(header)
            for first in range(start, stop, step):
                block = np.fromfile(
                    file, STORED_TYPES[self.dtype], min(step, stop - first) * self.dim
                ).reshape(-1, self.dim)
                refuse_bad_rows(finite(block, self.dtype), first, message)

    # ---- shared with ShardWriter

    def finished(self, shard):
        """Whether the shard has its final name and its checksum."""
        return self.path(shard, ".npy").exists() and "sha256" in self.record(shard)

    def record(self, shard):
        """Progress of the shard: {} or {"store", "rows"[, "sha256"]}."""
        path = self.path(shard, ".json")
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{path} is damaged: {_remedy(shard)}") from None
        if record.get("store") != self.store_id:
            raise UserError(f"{path} belongs to another store: {_remedy(shard)}")
        return record

    def write_record(self, shard, rows, sha256=None):
        """Count `rows` of the shard as safe; with sha256, all of them as final."""
        record = {"store": self.store_id, "rows": int(rows)} | (
            {"sha256": sha256} if sha256 else {}
        )
        write_json(self.path(shard, ".json"), record)

    def path(self, shard, ending):
        """The shard's file with the given ending."""
        return self.folder / f"train_grad-{shard}{ending}"

    @property
    def row_bytes(self):
        """Bytes of one stored row."""
        return self.dim * STORED_TYPES[self.dtype].itemsize

    def header(self, shard):
        """The .npy header of the whole shard (its length is fixed by the number of rows), empty for
        raw shards.
        """
        if self.layout == "raw":
            return b""
        start, stop = self.shard_range(shard)
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(STORED_TYPES[self.dtype])
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": descr, "fortran_order": False, "shape": (int(stop - start), self.dim)}
        )
        return buffer.getvalue()


def _refuse_difference(folder, name, wanted, found):
    """UserError naming the first key, however deep, in which two JSON values differ."""
    if wanted == found:
        return
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            _refuse_difference(folder, f"{name}.{key}", wanted.get(key), found.get(key))
    raise UserError(
        f"{folder} was made with {name} = {found!r}, not {wanted!r}: use the same settings or "
        "another folder"
    )


def _remedy(shard):
    return f"remove train_grad-{shard}.* and run the train gradients again"


def _listed(values):
    return (
        ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "") if values else "none"
    )
