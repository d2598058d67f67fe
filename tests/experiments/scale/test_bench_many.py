"""The benchmark of many queries runs whole at a small size, and tells what it measured."""

import json

import pytest

from concept_trak import cli
from experiments.scale import batched_queries


def test_the_benchmark_tells_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batched_queries, "TOGETHER", 4)
    monkeypatch.setattr(batched_queries, "IN_ONE_PASS", 16)
    sizes = ["--n=400", "--k=96", "--max-memory=300MB", f"--workdir={tmp_path}"]
    assert cli.main(["bench-scoring", "--parts=large,small", *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["queries_4_ratio"] == pytest.approx(found["queries_4_s"] / found["second_query_s"])
    assert found["batch_16_speedup"] == pytest.approx(16 * found["alone_s"] / found["batch_16_s"])
    assert 0 < found["relative_residual"] < 1e-6 and found["batch_max_rel_error"] < 1e-6
    assert found["method"] == "primal" and found["provenance"]["versions"]["torch"]
    assert {path.name for path in tmp_path.iterdir()} == {"n400-k96"}


@pytest.mark.parametrize("wrong", ["--parts=large,middle", "--n=5"])
def test_what_cannot_be_timed_is_refused(capsys, wrong):
    assert cli.main(["bench-scoring", wrong]) == 2
    assert "give" in capsys.readouterr().err
