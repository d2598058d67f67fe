"""Amplifying what was rare in training, on a tiny bench."""

import json

import numpy as np
import pytest
from conftest import in_this_process

from concept_trak import cli
from concept_trak.attribution.task import AttributionTask
from concept_trak.components import concept_plan
from concept_trak.datasets.image_folder import load_folder
from concept_trak.settings import EMOJI, resolve
from experiments.cad import amplify_rare, counterfactual, testbed
from experiments.truth import small_model
from experiments.truth import train as trainer

TINY = small_model.SmallSettings((8, 8), 4, text_width=6, steps=4, batch=8, warmup=2)


class Judge:
    """A judge that calls bright pictures cats and dark ones dogs."""

    objects, styles = ["cat", "dog", "tree"], ["blob", "line", "flat", "soft"]

    class settings:  # noqa: N801 - stands for `Judge.settings`
        size = 8

    def predict(self, pictures):
        bright = pictures.mean((1, 2, 3)) / 255
        chances = np.stack([bright, 1 - bright, 0 * bright, 0 * bright], 1)
        return None, None, {"object": chances[:, :3], "style": chances}


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual, "small_settings", lambda _: TINY)
    monkeypatch.setattr(counterfactual, "retrain", in_this_process)
    monkeypatch.setattr(testbed, "load_judge", lambda _: Judge())
    monkeypatch.setattr(testbed, "DRAW_STEPS", 2)
    for name, value in {
        "RATIOS": (0.01, 0.1),
        "PAPER_RATIOS": (0.3,),
        "SELECTIONS": ("feed_forward",),
        "COUNTS": (2, 2),
        "FINAL": (4, 3),
        "NOISINGS": 1,
        "KEPT": 1,
    }.items():
        monkeypatch.setattr(amplify_rare, name, value)
    monkeypatch.setattr(concept_plan, "NOISINGS", 2)
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data}
    given |= {"truth_dir": tmp_path / "truth", "results_dir": tmp_path / "results/qual"}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items()] + ["--device=cpu"]


def test_the_table_is_that_of_its_cells_and_is_made_once(flags, tmp_path, capsys, monkeypatch):
    assert cli.main(["cad-rare", *flags]) == 0
    out = capsys.readouterr().out.strip()
    line = json.loads(out.splitlines()[-1])
    assert set(line["arms"]) == set(amplify_rare.ARMS) and len(line["tried"]) == 3
    for arm in amplify_rare.ARMS:
        of = line["arms"][arm]
        gains = [after - before for before, after in of["rates"]]
        assert of["gain"] == pytest.approx(np.mean(gains))
        assert of["gain_ci95"][0] <= of["gain"] <= of["gain_ci95"][1]
    # one that chooses is not reported, and what is reported chooses nothing
    own = max((t for t in line["tried"] if t["arm"] == "chosen"), key=lambda t: t["gain"])
    assert line["arms"]["chosen"]["plan"] == line["arms"]["random"]["plan"] == own["plan"]
    assert line["arms"]["random, published"]["plan"] == line["arms"]["published"]["plan"]
    assert line["arms"]["gradient"]["plan"][3] == "gradient"
    cells = [json.loads(p.read_text()) for p in (tmp_path / "truth/cad-rare").glob("*.json")]
    by_random = {}  # a control removes as many weights as what it stands beside
    for cell in (c for c in cells if c["what"][-2:] == [4, 3]):
        by_random.setdefault(str(cell["what"][:-3]), {}).setdefault(cell["what"][-3], set())
        by_random[str(cell["what"][:-3])][cell["what"][-3]].add(cell["weights"])
    pairs = [of for of in by_random.values() if True in of]
    assert len(pairs) == 2 and all(of[True] == of[False] for of in pairs)
    assert not (tmp_path / "results/qual/cad/cells").exists()  # they are of another model

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(trainer, "loss_of_step", never)
    monkeypatch.setattr(amplify_rare, "attribute_components", never)
    assert cli.main(["cad-rare", *flags]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line


def test_thinned_objects_keep_two_pictures_and_choose_apart_from_what_is_reported():
    task = AttributionTask(resolve("emoji", {"sd_model_path": EMOJI["sd_model_path"]}), "cpu")
    subset, targets = amplify_rare.undersample(task)
    names = {part: {t.name for t in of} for part, of in targets.items()}
    assert len(names["tune"]) == len(names["report"]) == 8 and not names["tune"] & names["report"]
    stayed, shown = subset.kept(len(task.train)), task.train.column("object")
    for name in set(shown):
        left = sum(keeps for keeps, one in zip(stayed, shown, strict=True) if one == name)
        assert left == (2 if name in names["tune"] | names["report"] else 7)


def test_only_pictures_that_stayed_are_scored(flags, tiny_data):
    given = {
        f.removeprefix("--").partition("=")[0].replace("-", "_"): f.partition("=")[2] for f in flags
    }
    task = AttributionTask(resolve("emoji", given), "cpu")
    subset, targets = amplify_rare.undersample(task)
    model = counterfactual.models_of(task, {"thinned": subset})["thinned"]
    bench, (target, *_) = amplify_rare.Rare(task, subset, model), targets["tune"]
    train = load_folder(tiny_data).split("train")
    rows = [i for i, name in enumerate(train.column("object")) if name == target.name]
    (row,) = set(rows) - set(subset.removed)
    assert len(bench.asked(target).real) == 1
    assert (bench.asked(target).real[0] == task.latents[row]).all()
