"""What is committed stays valid. Names of fields are hashed: one that changes would make days of
retraining "of other settings".
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from concept_trak.datasets.image_folder import load_folder
from concept_trak.settings import ROOT
from experiments.attributes.concept_likelihood import LabelledMeasure
from experiments.attributes.model.train import TrainSettings
from experiments.attributes.settings import AttributeSettings
from experiments.truth.concept_likelihood import MeasureSettings
from experiments.truth.small_model import SmallSettings
from experiments.truth.subsets import read_plan
from experiments.truth.train_many import is_measured, setup_digest


def of_attributes():
    own = AttributeSettings()
    steps = {"steps": own.truth_steps, "batch": own.truth_batch, "lr": own.truth_lr}
    return TrainSettings(**steps, save_every=10_000), LabelledMeasure()


SETUPS = {
    "truth": ((SmallSettings(), MeasureSettings()), "139739260f", 68),
    "synthetic/synthetic_4x4": (of_attributes(), "5ae80147a3", 186),
    "faces/faces": (of_attributes(), "5ae80147a3", 264),
}


def plain(settings):
    return json.loads(json.dumps(asdict(settings)))


@pytest.mark.parametrize("place", SETUPS)
def test_every_committed_measurement_is_of_todays_settings(place):
    (settings, measure), digest, count = SETUPS[place]
    bench = SimpleNamespace(settings=settings, measure=measure)
    files = sorted((ROOT / "experiments" / place / "presences").rglob("*.json"))
    records = [json.loads(path.read_text())["made_from"] for path in files]
    assert len(records) == count and setup_digest(bench) == digest
    for record in records:
        assert record["bench"] == digest
        assert record["settings"] == plain(settings) and record["measure"] == plain(measure)


def test_every_committed_model_of_the_emoji_data_is_that_of_its_plan():
    train = load_folder(ROOT / "data/emoji").split("train")
    home, found = ROOT / "experiments/truth", 0
    (settings, measure), *_ = SETUPS["truth"]
    for path in sorted((home / "plans").glob("*.json")):
        plan = read_plan(path, train)
        bench = SimpleNamespace(
            settings=settings,
            measure=measure,
            presences=lambda name, subset: home / "presences" / name / f"{subset.name}.json",
        )
        for subset in plan.subsets:
            if bench.presences(plan.name, subset).is_file():
                assert is_measured(bench, plan.name, subset), subset.name
                found += 1
    assert found == SETUPS["truth"][2]
