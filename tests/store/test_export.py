"""Properties of exports: numpy, trak's and dattri's own classes read the rows of the store."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from stores import IDENTITY, REPOSITORY, K, N, fill, make, some_losses, some_rows

from concept_trak import atomic_io
from concept_trak.errors import UserError
from concept_trak.store import export as module
from concept_trak.store.export import export
from concept_trak.store.store import Store

BLOCKS = {"kind": "logra", "modules": [3, 5], "blocks": 2}


@pytest.fixture
def store(tmp_path):
    return fill(make(tmp_path / "store", "float16"), some_rows())


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", ["numpy", "trak", "dattri"])
def test_rows_json_tells_what_the_rows_are(tmp_path, store, kind):
    folder = export(store, tmp_path / "deep/out", kind)
    told = json.loads((folder / "rows.json").read_text())
    assert folder == tmp_path / "deep/out" and told["identity"] == IDENTITY
    assert told["shape"] == [N, K] and told["dtype"] == "float32" and told["provenance"] == {}
    for name, digest in told["sha256"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert told["sha256"] and not list(folder.rglob("*.part"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy_rows_are_those_of_the_store_as_numpy_saves_them(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(module, "READ_BYTES", 3 * 4 * K)  # three rows at a time
    store = fill(make(tmp_path / "store", dtype), some_rows())
    folder = export(store, tmp_path / "out", "numpy")
    assert files_of(folder) == ["rows.json", "rows.npy"]
    np.save(tmp_path / "expected.npy", store.rows(range(N)))
    assert (folder / "rows.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_numpy_export_takes_the_losses_along(tmp_path):
    store = fill(make(tmp_path / "store", losses=True), some_rows())
    folder = export(store, tmp_path / "out", "numpy")
    np.testing.assert_array_equal(np.load(folder / "losses.npy"), some_losses())
    assert set(json.loads((folder / "rows.json").read_text())["sha256"]) == {
        "rows.npy",
        "losses.npy",
    }


MEASURED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from concept_trak.store.export import export
from concept_trak.store.store import Store
store = Store.open(Path(sys.argv[2]), verify=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for kind in ("numpy", "trak", "dattri"):
    export(store, Path(sys.argv[3]) / kind, kind)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_export_never_holds_all_rows(tmp_path):
    """160 MB of rows in three forms: less than half of one is in memory."""
    rows = np.ones((2500, 16384), np.float32)
    store = make(tmp_path / "store", "float16", num_rows=2500, num_split=2, dim=16384)
    fill(store, rows, batch=500)
    paths = str(REPOSITORY), str(tmp_path / "store"), str(tmp_path / "out")
    command = [sys.executable, "-c", MEASURED, *paths]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown * 1024 < rows.nbytes // 2
    assert np.load(tmp_path / "out/numpy/rows.npy", mmap_mode="r").shape == rows.shape


# ---- trak


def saver(folder, **changed):
    from trak.savers import MmapSaver

    metadata = {"JL dimension": K, "JL matrix type": "sjlt", "train set size": N} | changed
    return MmapSaver(folder, metadata, N, K, True, logging.WARNING, use_half_precision=False)


def test_trak_saver_opens_the_export(tmp_path, store):
    folder = export(store, tmp_path / "out", "trak")
    opened = saver(folder)
    assert opened.model_ids == {0: {"is_featurized": 1, "is_finalized": 0}}
    opened.load_current_store(0)
    np.testing.assert_array_equal(opened.current_store["grads"], store.rows(range(N)))
    assert (opened.current_store["out_to_loss"] == 1).all()
    assert opened.current_store["is_featurized"].sum() == N


def test_trak_export_has_the_files_that_trak_makes(tmp_path, store):
    ours = export(store, tmp_path / "ours", "trak")
    theirs = saver(tmp_path / "theirs")
    theirs.register_model_id(0, False)
    (ours / "rows.json").unlink()
    assert files_of(ours) == files_of(tmp_path / "theirs")
    for name in files_of(ours):
        if name.endswith(".mmap"):
            a, b = np.load(ours / name), np.load(tmp_path / "theirs" / name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            a, b = (json.loads((folder / name).read_text()) for folder in (ours, theirs.save_dir))
            assert a.keys() == b.keys()


def test_trak_refuses_to_mix_the_export_with_another_projection(tmp_path, store):
    folder = export(store, tmp_path / "out", "trak")
    with pytest.raises(AssertionError, match="using a sjlt JL matrix"):
        saver(folder, **{"JL matrix type": "rademacher"})


def test_traker_finalizes_the_export_and_scores_with_it(tmp_path, store):
    """TRAK's scores X (X^T X + lambda I)^-1 q, up to the scale that trak takes out."""
    from trak import TRAKer
    from trak.gradient_computers import AbstractGradientComputer
    from trak.projectors import NoOpProjector

    class Given(AbstractGradientComputer):
        """The batch is already its gradients."""

        def __init__(self, model, task, grad_dim, dtype, device, grad_wrt):
            super().__init__(model, task, grad_dim, dtype, device)

        def load_model_params(self, model):
            pass

        def compute_per_sample_grad(self, batch):
            return batch.clone()

        def compute_loss_grad(self, batch):
            raise AssertionError("the train rows are there already")

    folder = export(store, tmp_path / "out", "trak")
    projector = NoOpProjector(proj_dim=K, proj_type="sjlt", device="cpu")
    model, queries = torch.nn.Linear(1, 1, bias=False), torch.randn(3, K)
    options = {"projector": projector, "lambda_reg": 0.5, "use_half_precision": False}
    options |= {"device": "cpu", "gradient_computer": Given, "logging_level": logging.WARNING}
    traker = TRAKer(model, "image_classification", N, folder, **options)
    traker.finalize_features()
    rows = store.rows(range(N)).astype(np.float64)
    inverse = np.linalg.inv(rows.T @ rows + 0.5 * np.eye(K))
    expected = rows @ inverse / np.abs(inverse).mean()
    np.testing.assert_allclose(np.load(folder / "0/features.mmap"), expected, atol=1e-4)
    traker.start_scoring_checkpoint("queries", model.state_dict(), 0, len(queries))
    traker.score(queries, num_samples=len(queries))
    scores = np.array(traker.finalize_scores("queries"))
    np.testing.assert_allclose(scores, expected @ queries.double().numpy().T, atol=1e-3)


# ---- dattri


def attributor(folder, names):
    from dattri.algorithm.block_projected_if import BlockProjectedIFAttributor
    from dattri.task import AttributionTask

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    task = AttributionTask(lambda params, data: None, model, model.state_dict())
    return BlockProjectedIFAttributor(
        task, names, damping=0.1, offload="disk", cache_dir=str(folder)
    )


@pytest.fixture
def no_pinned_memory(monkeypatch):
    """dattri's buffers ask for pinned memory, which a machine without a GPU does not have."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))


def per_block(rows, widths):
    """sum over blocks of g_i^T (G^T G / N + 0.1 tr / d I)^-1 g_i."""
    total = np.zeros(len(rows))
    for block in np.split(rows.astype(np.float64), np.cumsum(widths)[:-1], axis=1):
        fisher = block.T @ block / len(block)
        damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
        total += np.einsum("nd,de,ne->n", block, np.linalg.inv(damped), block)
    return total


@pytest.mark.parametrize("projection, widths", [(None, [K]), (BLOCKS, [3, 5])])
def test_dattri_goes_on_from_the_export(
    tmp_path, monkeypatch, no_pinned_memory, projection, widths
):
    """Its preconditioners, inverse-Hessian products and self-influences are those of the rows."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 2 * module.CHUNK_BATCHES)  # batches of two rows
    identity = IDENTITY | ({"projection": projection} if projection else {})
    store = fill(make(tmp_path / "store", "float16", identity, num_split=7), some_rows(), batch=9)
    folder = export(store, tmp_path / "out", "dattri")
    names = ["0", "1"][: len(widths)]
    found = attributor(folder, names)
    assert found.metadata.layer_dims == widths and found.metadata.get_total_samples() == N
    rows = store.rows(range(N))
    mapping = found.metadata.get_batch_to_sample_mapping()
    assert sorted(row for span in mapping.values() for row in range(*span)) == list(range(N))
    for batch, (start, stop) in mapping.items():
        layers = found.offload_manager.retrieve_gradients(batch)
        assert [layer.shape[1] for layer in layers] == widths
        np.testing.assert_array_equal(torch.cat(layers, 1).numpy(), rows[start:stop])
    found.compute_preconditioners()
    found.compute_ifvp()
    np.testing.assert_allclose(
        found.compute_self_attribution().numpy(), per_block(rows, widths), rtol=1e-4
    )


def test_dattri_batches_fill_chunks_as_its_own_do(tmp_path):
    """At most 2048 rows a chunk, beyond which dattri loses batches, and at most CHUNK_BYTES."""
    store = make(tmp_path / "store", num_rows=3000, num_split=1, dim=2)
    folder = export(fill(store, np.ones((3000, 2)), batch=3000), tmp_path / "out", "dattri")
    told = [json.loads(p.read_text()) for p in sorted((folder / "grad").glob("*.json"))]
    assert sorted(chunk["shape"][0] for chunk in told) == [952, 2048]
    assert sorted(len(chunk["batches"]) for chunk in told) == [8, 16]


# ---- refusals


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path, store):
    with pytest.raises(UserError, match="--kind 'hdf5' is unknown.*numpy, trak, dattri"):
        export(store, tmp_path / "out", "hdf5")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_store_is_refused(tmp_path):
    store = fill(make(tmp_path / "store"), some_rows(), shards=[0])
    with pytest.raises(UserError, match="shard 1, 2, 3 of 4 is not finished"):
        export(store, tmp_path / "out", "numpy")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path, store):
    (tmp_path / "out").mkdir()
    export(store, tmp_path / "out", "numpy")
    before = (tmp_path / "out/rows.npy").stat().st_mtime_ns
    with pytest.raises(UserError, match="is not empty; give --out-dir another folder"):
        export(store, tmp_path / "out", "trak")
    assert files_of(tmp_path / "out") == ["rows.json", "rows.npy"]
    assert (tmp_path / "out/rows.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not empty"):
        export(store, store.folder, "numpy")
    Store.open(store.folder)
    with pytest.raises(UserError, match="cannot write .*: a file of that name is there"):
        export(store, tmp_path / "out/rows.npy", "numpy")


@pytest.mark.parametrize("kind", ["numpy", "trak", "dattri"])
@pytest.mark.parametrize("files_before", [0, 1, 2])
def test_a_full_disk_is_one_line_and_the_next_run_goes_through(
    tmp_path, monkeypatch, store, kind, files_before
):
    fsync, left = os.fsync, [2 * files_before]  # atomic syncs the file, then its folder

    def full(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_io.os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full") as error:
            export(store, tmp_path / "out", kind)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert "rows.json" in files_of(export(store, tmp_path / "out", kind))


def test_many_rows_show_their_progress(tmp_path, monkeypatch, store):
    shown, wanted = [], []

    class Bar(module.tqdm):
        def __init__(self, total, **options):
            wanted.append(total)
            super().__init__(total=total, **options)

        def update(self, n=1):
            shown.append(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    for kind in module.KINDS:
        export(store, tmp_path / kind, kind)
        assert wanted.pop() == sum(shown) == N
        shown.clear()
