"""The index's bench: its rows are what it says, and its figures are of what it says."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.store.store import Layout, Store
from experiments.scale import index as bench
from experiments.scale.index_codecs import KINDS, _measured
from experiments.scale.index_codecs import lines as code_lines
from experiments.scale.index_command import bench as command
from experiments.scale.projection_dims import lines as width_lines

WIDTHS = (160, 160)
pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'concept-trak[index]'")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 "real" rows with a mean and a falling spectrum."""
    drawn = np.random.default_rng(0)
    rows = drawn.standard_normal((40, 320)) * np.arange(1, 321) ** -0.4 + 0.1
    store = Store.create(tmp_path_factory.mktemp("real"), Layout(40, 320, 2, "float32"), {}, {})
    for shard in (0, 1):
        store.append(shard, rows[20 * shard : 20 * shard + 20].astype(np.float32), 20 * shard)
        store.finish(shard)
    return store


def test_a_block_has_the_second_moment_of_the_real_rows(source):
    real = source.tensor_rows(range(40))
    rows = bench.Synthetic(real.numpy(), WIDTHS).rows(40_000, 1)
    for part, wanted in zip(rows.split(160, 1), real.split(160, 1), strict=True):
        found, exact = part.T @ part / len(part), wanted.T @ wanted / len(wanted)
        assert (found - exact).norm() < 0.05 * exact.norm()
    # new rows lie outside the span of the real ones with a part of their noise
    outside = rows[:100] - rows[:100] @ torch.linalg.pinv(real) @ real
    assert 0.05 < outside.square().sum() / rows[:100].square().sum() < 0.3


def digests(store):
    paths = sorted(store.folder.glob("train_grad-*.npy"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_synthetic_rows_go_on_after_a_kill_with_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BLOCK_ROWS", 256)
    whole = bench.synthetic_store(tmp_path / "whole", source, WIDTHS, 1000)
    rows, create, calls, stores = bench.Synthetic.rows, Store.create, [], []

    def remembered(*given):
        stores.append(create(*given))
        return stores[-1]

    def killed(self, count, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(self, count, seed)

    monkeypatch.setattr(bench.Synthetic, "rows", killed)
    monkeypatch.setattr(Store, "create", remembered)
    with pytest.raises(KeyboardInterrupt):
        bench.synthetic_store(tmp_path / "killed", source, WIDTHS, 1000)
    for writer in stores[0]._writers.values():
        writer.close()  # as a real kill does
    monkeypatch.setattr(bench.Synthetic, "rows", rows)
    again = bench.synthetic_store(tmp_path / "killed", source, WIDTHS, 1000)
    assert digests(again) == digests(whole)


def test_figures_of_a_case(source, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CANDIDATES", (10, 1000))
    store = bench.synthetic_store(tmp_path, source, WIDTHS, 2048)
    queries = source.rows(range(6))
    case = bench.IndexCase("small", store, WIDTHS, queries)
    facts = bench.bench_case(case, *bench.truth(case))
    assert facts["bytes_ratio"] == 2 * 320 / (256 / 8 + 8) == 16
    few, many = [e for e in facts["recall"] if e["damping"] == 1.0]
    assert few["recall_at_10"] < many["recall_at_10"] and many["recall_at_10"] > 0.9
    assert many["least_recall_at_10"] > 0.9 and "recall_at_100" not in few
    assert bench.recall_of(facts) == many and facts["timed_at"] == 1024
    assert facts["speedup"] == pytest.approx(facts["scan_s"] / facts["search_s"])
    resumed, seconds = bench.built(case)
    assert seconds == pytest.approx(facts["build_s"])  # nothing was made: that of before
    assert "1/16.0" in bench.lines(facts) and len(bench.lines(facts).splitlines()) == 5 + 6
    assert "eigenvalues of 40 synthetic rows" in bench.spectra(store, source)


def test_codes_are_compared_on_the_same_rows(source, tmp_path):
    store = bench.synthetic_store(tmp_path, source, WIDTHS, 2048)
    solved = bench.solved_by_sample(store, WIDTHS, source.rows(range(4)), [1.0])[0]
    rows = store.tensor_rows(range(2048))
    wanted = np.argsort(-(solved @ rows.double().numpy().T), 1)[:, :10]
    by_name = {kind.name: kind for kind in KINDS}
    table = [
        _measured(by_name[name], (store, WIDTHS, 1.0), rows, solved, wanted)
        for name in ("scalar, 8 bit", "RaBitQ", "RaBitQ, not whitened")
    ]
    assert all(0 < e["recall_at_10_of_50"] <= e["recall_at_10_of_200"] <= 1 for e in table)
    assert "| RaBitQ | 256 | 40 |" in code_lines(table, 2048)


def test_tables_and_refusals(tmp_path):
    entry = {"k": 4032, "recall_at_10": 0.8, "ci95": [0.7, 0.9], "same_at_10": 1, "same_at_100": 1}
    assert "| 4,032 | 0.800 [0.700, 0.900] | 1.000 | 1.000 |" in width_lines([entry])
    given = {"parts": "nothing", "rows": 4096, "workdir": str(tmp_path), "benchmark": "emoji"}
    with pytest.raises(UserError, match="--parts='nothing' is unknown; give --parts some of"):
        command(SimpleNamespace(**given))
    with pytest.raises(UserError, match="--rows must be at least 2048"):
        command(SimpleNamespace(**given | {"parts": "paper", "rows": 5}))
    with pytest.raises(UserError, match="synthetic.json is missing; measure that part first"):
        command(SimpleNamespace(**given | {"parts": "paper"}))
