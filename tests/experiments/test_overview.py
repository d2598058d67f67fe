"""The page of all tables says what the tables say, and which are not there."""

import json

from concept_trak import cli
from experiments.overview import overview


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    told = overview(tmp_path)
    for command in ("synthetic/run_all.sh", "faces/run_all.sh", "run_abc.sh", "run_eval.sh"):
        assert command in told


def test_figures_stand_beside_those_of_the_paper(tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "emoji").mkdir()
    made = {"id": {"trak": 0.5, "nda": 0.25}, "ood": {"trak": 0.125}, "control": 0.75}
    (tmp_path / "synthetic/table.json").write_text(json.dumps(made))
    steps = [{"change": -0.25, "ci95": [-0.5, 0.0]}] * 4
    abc = {"published": {"trak": 0.5}, "blind": {"trak": 0.0}, "crowd": {}, "steps": steps}
    abc["ablation"] = [0.5, 0.25, 0.25, 0.25, 1.0]
    (tmp_path / "emoji/abc_table.json").write_text(json.dumps(abc))
    (tmp_path / "cad").mkdir()
    low, high = ({name: value for name in ("ua", "ira", "cra")} for value in (0.25, 0.75))
    cad = {"objects": {"a": low, "b": high}, "styles": {"c": high}}
    cad["paper"] = {"object": {"a": low, "b": low}, "style": {"c": low}}
    (tmp_path / "cad/table.json").write_text(json.dumps(cad))
    lines = overview(tmp_path).splitlines()
    assert "| objects, best plan | 0.50 | 0.50 | 0.50 |" in lines
    assert "| styles, published rule | 0.25 | 0.25 | 0.25 |" in lines
    assert "| trak | 0.50 | 0.80 | 0.12 | 0.45 |" in lines
    assert "| nda | 0.25 | - | - | - |" in lines
    assert "| + unit norm | 1.000 | -0.250 [-0.50, +0.00] | 0.955 |" in lines
    assert "**ablation, recipe reference**: not in abc_table_reference.json yet" in lines
    assert "| trak | 0.50 | 0.00 | - |" in lines


def test_the_command_prints_it(capsys):
    assert cli.main(["tables"]) == 0
    assert "caption_similarity" in capsys.readouterr().out
