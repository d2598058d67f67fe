"""The scoring benchmark on a toy size: its numbers are right, whatever its times."""

import numpy as np
import pytest

from concept_trak.scoring.scores import scores
from experiments.scale import scoring as bench


@pytest.mark.parametrize("method", ["auto", "krylov_gram", "krylov_rows"])
def test_ours_equals_nine_explicit_inverses(tmp_path, method):
    case = bench.Case(600, 96, 3, 2**30, dtype="float32", method=method)
    result = bench.bench_scoring(case, tmp_path)
    assert result["max_rel_error"] < 1e-5 and result["reference_max_rel_error"] < 1e-2
    assert result["relative_residual"] < 1e-6 and result["own_row_first"] == 1.0
    low, high = result["scoring_speedup_spread"]
    assert result["rounds"] == 9 and 0 < low <= result["scoring_speedup"] <= high


def test_large_sizes_check_some_columns_instead_of_the_inverses(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "INVERSES_MAX", 32)
    monkeypatch.setattr(bench, "COLUMNS", 24)
    case = bench.Case(200, 48, 2, 2**30)
    result = bench.bench_scoring(case, tmp_path)
    assert "scoring_speedup" not in result and result["peak_rss_gib"] > 0
    assert result["columns_checked"] == 24 and result["columns_max_rel_error"] < 1e-5
    monkeypatch.setattr(bench, "scores", lambda *args, **kw: 1.01 * scores(*args, **kw))
    assert bench.bench_scoring(case, tmp_path)["columns_max_rel_error"] > 5e-3


def test_slow_references_get_one_round(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WHOLE_RUN_SECONDS", 0)
    assert bench.bench_scoring(bench.Case(200, 48, 1, 2**30), tmp_path)["rounds"] == 1


def test_synthetic_rows_do_not_depend_on_where_they_were_interrupted(tmp_path, monkeypatch):
    whole = bench.synthetic_store(tmp_path / "a", 3000, 16, "float32").rows(range(3000))
    append, left = bench.Store.append, [4]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        append(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bench.Store, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.synthetic_store(tmp_path / "b", 3000, 16, "float32")
    resumed = bench.synthetic_store(tmp_path / "b", 3000, 16, "float32").rows(range(3000))
    np.testing.assert_array_equal(resumed, whole)
