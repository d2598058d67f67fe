"""A finished store in the forms that others go on with; values are float32 whatever was stored.

numpy   rows.npy [N, k]; losses.npy [N] if the store keeps losses.
trak    the save_dir of a TRAKer (traker 0.3.2) whose model id 0 is featurized but not finalized:
        0/grads.mmap [N, k] are the rows, out_to_loss is 1, features await `finalize_features`.
dattri  the cache_dir of a BlockProjectedIFAttributor (dattri 0.3.0) with offload="disk" after its
        gradients and before its preconditioners. Its layers are the projection's blocks.

Each has a rows.json beside it, written last: identity and provenance of the store, shape, sha256 of
the files that hold the rows, and how to read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..atomic_io import READ_BYTES, atomic, atomic_folder, disk_errors, sha256_file, write_json
from ..errors import UserError, remove_hint
from ..registry import unknown
from ..validated_io import read_json, safe_join
from .dtypes import decode, npy_header
from .manifest import block_widths
from .store import Store

FLOAT, INT = np.dtype("<f4"), np.dtype("<i4")
CHUNK_BATCHES, CHUNK_ROWS, CHUNK_BYTES = 16, 2048, 2**26  # the first two are dattri's own


def export(store: Store, folder: Path, kind: str) -> Path:
    """Write a finished store into the new or empty `folder` as one of `KINDS`; returns the folder,
    which is left alone if it holds that very export.

    One block of rows is in memory at a time. An error, or a kill, leaves the folder as it was.
    UserError for an unknown kind, an unfinished store, a folder with content, a full disk.
    """
    if kind not in KINDS:
        raise UserError(unknown("--kind", kind, tuple(KINDS)))
    store.refuse_unfinished()
    folder, (write, how) = Path(folder).absolute(), KINDS[kind]
    with disk_errors(folder):
        if folder.is_dir() and any(folder.iterdir()):
            if _is_there(store, folder, how):
                return folder
            remedy = f"give --out-dir another folder, or {remove_hint(folder)}"
            raise UserError(f"{folder} is not empty; {remedy}")
    with atomic_folder(folder) as made:
        with tqdm(total=store.num_rows, desc=f"export {kind}", unit="row", delay=1) as bar:
            digests = write(store, made, bar)
        write_json(made / "rows.json", _description(store, digests, how))
    return folder


def _is_there(store: Store, folder: Path, how: str) -> bool:
    """Whether the folder holds the export of this store, whole."""
    with contextlib.suppress(UserError, OSError, TypeError, AttributeError):
        known = read_json(folder / "rows.json", remove_hint(folder, "export again"))
        digests = known["sha256"] if known.get("sha256") else {"rows.json": ""}
        whole = all(sha256_file(safe_join(folder, f, "the file")) == d for f, d in digests.items())
        return whole and known == json.loads(json.dumps(_description(store, digests, how)))
    return False


def _description(store: Store, digests: dict[str, str], how: str) -> dict:
    """What rows.json says."""
    shape = {"shape": [store.num_rows, store.dim], "dtype": "float32"}
    made_from = {key: store.manifest[key] for key in ("identity", "provenance")}
    known = {"rows": store.num_rows, "dim": store.dim, "kind": projection_kind(store)}
    read_with = how.format(**known, blocks=len(block_widths(store.manifest)))
    return {**shape, **made_from, "sha256": digests, "read_with": read_with}


def projection_kind(store: Store) -> str:
    """The name of the projection that made the rows; trak's "na" if the store does not say."""
    return store.identity.get("projection", {}).get("kind", "na")


def _blocks(store: Store, max_rows: int, bar: tqdm) -> Iterator[np.ndarray]:
    """Yield the rows in order, float32 [b <= max_rows, k]."""
    for _, stored in store.stored_blocks(max_rows):
        bar.update(len(stored))
        yield decode(stored, store.dtype)


def _write(path: Path, header: bytes, blocks: Iterable[np.ndarray]) -> str:
    """Write a file piece by piece; returns its sha256."""
    digest = hashlib.sha256(header)
    with atomic(path) as file:
        file.write(header)
        for block in blocks:
            file.write(block.data)
            digest.update(block.data)
    return digest.hexdigest()


def _rows_npy(store: Store, path: Path, bar: tqdm) -> str:
    """All rows as one .npy [N, k]; returns its sha256."""
    blocks = _blocks(store, max(1, READ_BYTES // (4 * store.dim)), bar)
    return _write(path, npy_header(FLOAT, (store.num_rows, store.dim)), blocks)


def _numpy(store: Store, folder: Path, bar: tqdm) -> dict[str, str]:
    digests = {"rows.npy": _rows_npy(store, folder / "rows.npy", bar)}
    if store.has_losses:
        header = npy_header(FLOAT, (store.num_rows,))
        digests["losses.npy"] = _write(folder / "losses.npy", header, [store.losses()])
    return digests


def _trak(store: Store, folder: Path, bar: tqdm) -> dict[str, str]:
    """The files of trak's MmapSaver; all .mmap are .npy files."""
    model, rows = folder / "0", store.num_rows
    for made in (model, folder / "scores"):
        made.mkdir()
    digests = {"0/grads.mmap": _rows_npy(store, model / "grads.mmap", bar)}
    for name, dtype in (("out_to_loss", FLOAT), ("_is_featurized", INT)):
        _write(model / f"{name}.mmap", npy_header(dtype, (rows, 1)), [np.ones((rows, 1), dtype)])
    with atomic(model / "features.mmap") as file:  # zeros, which take no room until trak fills them
        size = file.write(npy_header(FLOAT, (rows, store.dim)))
        file.truncate(size + 4 * rows * store.dim)
    metadata = {"JL dimension": store.dim, "JL matrix type": projection_kind(store)}
    write_json(folder / "metadata.json", metadata | {"train set size": rows})
    write_json(folder / "experiments.json", {})
    write_json(folder / "id_0.json", {"0": {"is_featurized": 1, "is_finalized": 0}})
    return digests


def _dattri(store: Store, folder: Path, bar: tqdm) -> dict[str, str]:
    """The files of dattri's MetadataManager and ChunkedMemoryMapHandler; batch_metadata.json last.

    dattri keeps up to 12 chunks in memory and loses batches beyond 2048 rows a chunk, hence both
    limits.
    """
    fitting = CHUNK_BYTES // (CHUNK_BATCHES * 4 * store.dim)
    size = max(1, min(CHUNK_ROWS // CHUNK_BATCHES, fitting))
    blocks, widths, digests = _blocks(store, size, bar), block_widths(store.manifest), {}
    counts = [min(size, b - row) for a, b in pairwise(store.bounds) for row in range(a, b, size)]
    (folder / "grad").mkdir()
    for first in range(0, len(counts), CHUNK_BATCHES):
        chunk = _chunk(first, counts[first : first + CHUNK_BATCHES], widths)
        path = folder / "grad" / chunk["chunk_filename"]
        mmap = path.with_suffix(".mmap")
        digests[f"grad/{mmap.name}"] = _write(mmap, b"", islice(blocks, len(chunk["batches"])))
        write_json(path.with_name(f"{path.name}_metadata.json"), chunk)
    starts = [0, *accumulate(counts)]
    info = {i: {"start_idx": starts[i], "sample_count": n} for i, n in enumerate(counts)}
    layers = {"layer_names": [f"block_{i}" for i in range(len(widths))], "layer_dims": widths}
    totals = {"total_proj_dim": store.dim, "total_samples": store.num_rows}
    write_json(folder / "batch_metadata.json", {"batch_info": info, **layers, **totals})
    return digests


def _chunk(first: int, counts: list[int], widths: list[int]) -> dict:
    """dattri's description of the chunk of the batches from `first` on, of so many rows each."""
    last, ends = first + len(counts) - 1, list(accumulate(counts))
    rows = enumerate(zip(counts, ends, strict=True), first)
    return {
        "chunk_filename": f"chunk_gradients_{first}_{last}",
        "data_type": "gradients",
        "batch_start": first,
        "batch_end": last,
        "storage_dtype": "float32",
        "shape": [ends[-1], sum(widths)],
        "layer_dims": widths,
        "batches": [{"batch_idx": i, "start_row": end - n, "end_row": end} for i, (n, end) in rows],
        "flush_mode": "sync",
    }


KINDS: dict[str, tuple[Callable[[Store, Path, tqdm], dict[str, str]], str]] = {
    "numpy": (_numpy, 'numpy.load("rows.npy", mmap_mode="r")'),
    "trak": (
        _trak,
        "trak.TRAKer(model, task, train_set_size={rows}, save_dir=this folder, projector=one with "
        'proj_dim {dim} and proj_type "{kind}", use_half_precision=False).finalize_features(): the '
        "rows are model id 0",
    ),
    "dattri": (
        _dattri,
        "dattri.algorithm.block_projected_if.BlockProjectedIFAttributor(task, layer_names={blocks} "
        'names, offload="disk", cache_dir=this folder): call compute_preconditioners() and '
        "compute_ifvp(), not cache(), which would make the gradients anew",
    ),
}
