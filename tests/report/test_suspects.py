"""Suspects: every picture below the middle and no other, the worst first."""

import csv
import json

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.gradients.caption_fit import MIDDLE, describe_fit, relative_fit
from concept_trak.store.store import Store


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path):
    places = {"grad_dir": tmp_path / "grads", "results_dir": tmp_path / "results/qual"}
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "proj_dim": 32, "num_split": 2}
    return [f"--{k.replace('_', '-')}={v}" for k, v in (places | given).items()] + ["--device=cpu"]


def test_all_below_the_middle_are_listed_the_worst_first(flags, tmp_path, capsys):
    assert cli.main(["train-grad", *flags]) == 0
    assert cli.main(["suspects", *flags]) == 0
    (folder,) = (tmp_path / "grads").iterdir()
    beside = Store.open(folder).losses()
    fit = relative_fit(beside, beside)
    latest = tmp_path / "results/qual/suspects/latest"
    rows = list(csv.DictReader((latest / "suspects.csv").open()))
    listed = [float(row["fit"]) for row in rows]
    assert listed == sorted(listed) and len(listed) == (fit < MIDDLE).sum() > 0
    np.testing.assert_allclose(listed, np.sort(fit)[: len(listed)], atol=1e-3)
    record = json.loads((latest / "suspects.json").read_text())
    assert record["suspects"] == len(rows) and {"settings", "provenance"} <= set(record)
    assert (latest / "suspects.jpg").stat().st_size > 1000
    assert f"{len(rows)} of 11 captions" in capsys.readouterr().out


def test_rows_that_do_not_tell_are_refused_in_one_line(flags, capsys):
    assert cli.main(["train-grad", *flags, "--f=dps"]) == 0
    assert cli.main(["suspects", *flags, "--f=dps"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "error: rows of F=dps do not tell how captions fit; use F=contrast_llr"


def test_a_fit_in_words():
    said = [describe_fit(fit) for fit in (-1.0, MIDDLE - 0.01, MIDDLE, 0.74, 0.75, 3.0)]
    assert (
        said == ["caption does not fit"] * 2 + ["caption fits in part"] * 2 + ["caption fits"] * 2
    )
