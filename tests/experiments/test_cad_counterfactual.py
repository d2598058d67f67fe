"""Retrained, edited and both on a tiny bench: the table is that of its cells, and nothing is made
twice.
"""

import json

import numpy as np
import pytest
from conftest import in_this_process

from concept_trak import cli
from concept_trak.datasets.image_folder import load_folder
from experiments.cad import counterfactual
from experiments.truth import concept_likelihood, small_model, train
from experiments.truth.concept_likelihood import MeasureSettings
from experiments.truth.subsets import Subset

TINY = small_model.SmallSettings((8, 8), 4, text_width=6, steps=4, batch=8, warmup=2)


class AsBright:
    """A judge that is as sure of every class as pictures are bright."""

    objects, styles = ["cat", "dog", "tree"], ["blob", "line", "flat", "soft"]

    class settings:  # noqa: N801 - stands for `Judge.settings`
        size = 8

    def predict(self, pictures):
        bright = pictures.mean((1, 2, 3)) / 255
        return None, None, {kind: np.stack([bright] * 4, 1) for kind in ("object", "style")}


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    held_out = load_folder(tiny_data).split("held_out").column("object")
    subsets = {"all": Subset("base-0", 0), "seed": Subset("base-1", 1)}
    subsets |= {"without": Subset("w-0", 0, (0, 4)), "random": Subset("r-0", 0, (2, 3))}

    for name, value in {
        "small_settings": lambda _: TINY,
        "subsets_of": lambda _: subsets,
        "targets": lambda *_: held_out[:1],
        "retrain": in_this_process,
        "load_judge": lambda _: AsBright(),
        "MEASURE": MeasureSettings(noises=1, drawn=1, num_steps=2),
        "SAMPLING": counterfactual.Sampling(3.0, 2, 2),
    }.items():
        monkeypatch.setattr(counterfactual, name, value)
    monkeypatch.setattr(concept_likelihood, "LEVELS", (300, 700))
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "score_seeds": 1, "ratio": 0.1}
    given |= {"truth_dir": tmp_path / "truth", "results_dir": tmp_path / "results/qual"}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items()] + ["--device=cpu"]


@pytest.fixture
def edits(monkeypatch):
    """{weight: positions} of every edit that was applied; each must zero what it touches."""
    seen, apply = [], counterfactual.EditedNetwork.apply

    def watched(self, edit):
        apply(self, edit)
        weights = dict(self.network.named_parameters())
        for name, (index, old, new) in edit.changes.items():
            assert old.any() and not new.any() and not weights[name].flatten()[index].any()
        seen.append({name: index.tolist() for name, (index, _, _) in edit.changes.items()})

    monkeypatch.setattr(counterfactual.EditedNetwork, "apply", watched)
    return seen


def test_the_table_is_that_of_its_cells_and_is_made_once(
    flags, edits, tmp_path, capsys, monkeypatch
):
    assert cli.main(["cad-counterfactual", *flags]) == 0
    out = capsys.readouterr().out.strip()
    line = json.loads(out.splitlines()[-1])
    (folder,) = (tmp_path / "results/qual/cad").glob("counterfactual-*")
    assert (folder / "table.md").read_text().strip() in out
    rows, unit = line["rows"], line["unit"]
    assert rows["all"]["unedited"]["score"]["value"] == 1 and unit["score"] > 0
    cells = {p.name[:6]: json.loads(p.read_text()) for p in tmp_path.glob("truth/cad-c*/*.json")}
    assert len(cells) == 4
    for arm in rows:
        (cell,) = (c for name, c in cells.items() if name.startswith(arm[:3]))
        for state in counterfactual.STATES:
            for figure, value in cell[state].items():
                share = value / (figure != "judged" and unit[figure] or 1)
                assert rows[arm][state][figure]["value"] == pytest.approx(share, abs=1e-4)
        assert cell["edited"]["score"] == 0 and cell["edited"]["moves"] != cell["unedited"]["moves"]
    lost = rows["all"]["unedited"]["moves"]["value"] - rows["without"]["edited"]["moves"]["value"]
    assert line["lost"]["both"]["moves"]["value"] == pytest.approx(lost, abs=2e-4)
    assert line["removed"] == {"all": 0, "seed": 0, "without": 2, "random": 2}
    assert len(set(line["models"].values())) == 4
    whole, seed, without, random = edits
    assert whole == without == random != seed  # the same places in all models of one seed

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(train, "loss_of_step", never)
    monkeypatch.setattr(counterfactual, "attribute_components", never)
    assert cli.main(["cad-counterfactual", *flags]) == 0
    assert (
        json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line
    )  # edits were taken back


def test_the_committed_plan_has_what_is_retrained():
    from concept_trak.settings import EMOJI
    from experiments.truth.subsets import read_plan

    data = load_folder(EMOJI["data_dir"]).split("train")
    plan = read_plan(counterfactual.KEPT / "plans/counterfactual.json", data)
    assert set(counterfactual.RETRAINED.values()) <= {s.name for s in plan.subsets}
