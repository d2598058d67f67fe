"""The command of the replay: files that agree with one another, and nothing made twice."""

import csv
import json

import numpy as np
import pytest

from concept_trak import cli
from experiments.cad import replay_attribution
from experiments.truth import replay, small_model, train

TINY = small_model.SmallSettings((8, 8), 4, text_width=6, steps=5, batch=8, warmup=2)


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(replay_attribution, "small_settings", lambda _: TINY)
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "concept": "cat"}
    given |= {"gen_num_inference_steps": 3, "score_seeds": 2, "ratio": 0.1, "device": "cpu"}
    given |= {"truth_dir": tmp_path / "truth", "results_dir": tmp_path / "results/qual"}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]


def test_a_replay_is_a_table_a_map_and_sums_that_close(flags, tmp_path, capsys, monkeypatch):
    assert cli.main(["cad-replay", *flags, "--methods=concept_trak,caption_similarity"]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    folder = tmp_path / "results/qual/cad/latest"
    told = json.loads((folder / "replay.json").read_text())
    assert {k: told[k] for k in line} == line and line["replay_is_the_training"]
    parts = np.load(folder / "replay.npy")
    assert parts.shape == (2, 11, len(told["groups"]))
    for k, part in enumerate(replay_attribution.PARTS):
        sums = line[part]
        assert sums["gap"] < 1e-5 and sums["pictures"] == pytest.approx(parts[k].sum())
        whole = sums["start"] + sums["pictures"] + sums["rounding"]
        assert whole == pytest.approx(sums["alpha"], rel=1e-4)
        assert -1 <= sums["concept_trak"]["spearman"] <= 1
        assert sums["caption_similarity"]["recall_at_10"] == 1  # captions name the concept
    # those edited have the highest scores, so they hold more than all together
    assert line["edited"]["alpha"] > max(0, line["selected"]["alpha"])
    rows = list(csv.DictReader((folder / "replay.csv").open()))
    listed = [float(row["edited"]) for row in rows]
    assert len(rows) == 11 and listed == sorted(listed, reverse=True)
    assert (folder / "replay.png").stat().st_size > 5000

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(replay.Replay, "_step", never)
    monkeypatch.setattr(train, "loss_of_step", never)
    assert cli.main(["cad-replay", *flags, "--methods=concept_trak,caption_similarity"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--concept=unicorn"], "unknown concept 'unicorn'"),
        (["--replay-steps=-1"], "REPLAY_STEPS=-1 is out of range"),
        (["--selection=time|ff"], "SELECTION names 'ff'"),
    ],
)
def test_bad_input_gives_one_line_before_anything_is_trained(
    changes, words, flags, tmp_path, capsys
):
    assert cli.main(["cad-replay", *flags, *changes]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and words in told
    assert not (tmp_path / "truth").exists()
