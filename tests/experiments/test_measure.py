"""Measuring the embedded model: bounds over all its pictures, one noise for a seed and a place."""

import json
from pathlib import Path

import numpy as np
import pytest

from concept_trak.attribution.task import AttributionTask
from concept_trak.settings import resolve
from experiments.emoji import model_quality as measure


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The embedded model and four objects in all styles."""
    results = tmp_path_factory.mktemp("results") / "qual"
    quick = {"num_queries": 2, "gen_num_inference_steps": 2, "results_dir": str(results)}
    whole = AttributionTask(resolve("emoji", quick).on("cpu"), "cpu")
    whole.data.everything = whole.everything.subset(range(32))
    return whole


def test_the_bounds_are_over_every_picture_of_every_style(task):
    found = measure.upper_bounds(task, measure.load_judge(measure.JUDGE))
    assert set(found) == {"real", "reconstructed"}
    for kind in found.values():
        assert kind["style"]["cells"] == kind["style"]["pictures"] == 32
        assert kind["object"]["accuracy"] >= 0.9


def test_reconstruction_is_close_and_does_not_depend_on_the_batch(task):
    real = task.everything.images(range(32), task.model.image_size)
    decoded = task.model.reconstruct(real)
    assert decoded.shape == real.shape and decoded.dtype == np.uint8
    assert 0 < np.abs(decoded.astype(float) - real).mean() < 10
    assert np.abs(task.model.reconstruct(real[:1]).astype(int) - decoded[:1]).max() <= 1


def test_a_picture_depends_on_its_seed_and_place_alone(task):
    captions = task.everything.captions[:3]
    three = measure.draw(task, captions, seed=1)
    assert np.abs(measure.draw(task, captions[:1], seed=1).astype(int) - three[:1]).max() <= 1
    assert (measure.draw(task, captions[:1], seed=2) != three[:1]).any()


def test_the_last_line_holds_what_the_file_holds(task, capsys):
    measure.measure_model(task)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    path = Path(task.settings.results_dir) / "model/latest/accuracy.json"
    written, count = json.loads(path.read_text()), 2 * measure.SEEDS
    assert all(printed[kind]["style"]["pictures"] == count for kind in ("seen", "held_out"))
    assert printed.items() <= written.items() and {"settings", "provenance"} <= set(written)
