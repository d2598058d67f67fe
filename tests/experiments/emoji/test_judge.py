"""The judge names real art, sees through damage, and is measured on art it was not trained on."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from experiments.emoji.classifier import augment
from experiments.emoji.classifier.io import load_judge, save_judge
from experiments.emoji.classifier.net import (
    EmojiClassifier,
    EmojiClassifierSettings,
    cell_accuracy,
    resized,
)
from experiments.emoji.classifier.train import (
    cross_validate,
    damaged,
    fold_of_cells,
    train_and_save,
    train_judge,
)

DATA = Path(__file__).resolve().parents[3] / "data/emoji"
TINY = EmojiClassifierSettings(
    size=16, inner_size=16, width=4, epochs=30, fold_epochs=30, batch=8, dropout=0.0
)


@pytest.fixture(scope="module")
def dataset():
    return load_folder(DATA)


@pytest.fixture(scope="module")
def judge():
    return load_judge(DATA / "judge")


@pytest.fixture(scope="module")
def sample(dataset):
    """Every fifth picture, which meets all objects and all styles, with its names."""
    part = dataset.subset(range(0, len(dataset), 5))
    return part.images(range(len(part))), part.column("object"), part.column("style")


def toy(repeats=6, seed=0):
    """Bars whose style is their colour, red or blue: uint8 [4 * repeats, 16, 16, 3], object names,
    style names.
    """
    rng = np.random.default_rng(seed)
    images, objects, styles = [], [], []
    for index in range(4 * repeats):
        upright, red = index % 2, index // 2 % 2
        picture = np.full((16, 16, 3), 255, np.uint8)
        place = rng.integers(6, 9)
        picture[place : place + 3, 2:14] = (200, 0, 0) if red else (0, 0, 200)
        images.append(picture.transpose(1, 0, 2) if upright else picture)
        # several objects, as many cells as pictures
        objects.append(f"{'upright' if upright else 'flat'} {index // 8}")
        styles.append("red" if red else "blue")
    return np.stack(images), objects, styles


def test_judge_names_the_real_pictures(judge, sample):
    found = judge.measure(*sample)
    assert found["object"]["accuracy"] >= 0.97
    # Flat colour styles are close relatives: judge.json records 0.98 on all 2,912 pictures, which
    # bounds what it can measure.
    assert found["style"]["accuracy"] >= 0.88


def test_judge_names_pictures_enlarged_from_half_the_size(judge, dataset, sample):
    """The size at which the embedded model draws."""
    small = dataset.subset(range(0, len(dataset), 5)).images(range(len(sample[0])), 32)
    found = judge.measure(resized(small, 64), *sample[1:])
    assert found["object"]["accuracy"] >= 0.97
    assert found["style"]["accuracy"] >= 0.95


def test_judge_is_tolerant_of_shifts(judge, sample):
    images, objects, styles = sample
    shifted = np.full_like(images, 255)
    # down by 4 and left by 3 of 64 pixels, white coming in
    shifted[:, 4:, :-3] = images[:, :-4, 3:]
    found = judge.measure(shifted, objects, styles)
    assert found["object"]["accuracy"] >= 0.95
    assert found["style"]["accuracy"] >= 0.85


def test_judge_sees_through_damage(judge, sample):
    images, objects, styles = sample
    found = judge.measure(damaged(images, judge.settings), objects, styles)
    assert found["object"]["accuracy"] >= 0.9
    assert found["style"]["accuracy"] >= 0.8


# Known shortfall: it calls white noise at its full size a rainbow, with 0.56; the model, which
# draws at 32 pixels, cannot draw that.
FULL_SIZE = pytest.param(
    64, marks=pytest.mark.xfail(strict=True, reason="named a rainbow with 0.56")
)


@pytest.mark.parametrize("side", [8, 16, 32, FULL_SIZE])
def test_judge_does_not_see_objects_in_noise(judge, side):
    noise = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    assert np.median(judge.predict(resized(noise, 64))[2]["object"].max(1)) < 0.5


def test_judge_knows_every_object_and_just_the_styles_of_the_dataset(judge, dataset):
    # it learned from more art than the model did
    assert set(dataset.column("object")) < set(judge.objects)
    assert judge.styles == sorted(set(dataset.column("style")))


def test_committed_judge_is_small_and_only_safetensors():
    files = {path.name: path.stat().st_size for path in (DATA / "judge").iterdir()}
    assert set(files) == {"model.safetensors", "judge.json"}
    assert sum(files.values()) <= 5_000_000


def test_predict_gives_probabilities_that_agree_with_the_names(judge, sample):
    objects, styles, probabilities = judge.predict(sample[0][:7], batch=3)
    for head, names in {"object": objects, "style": styles}.items():
        assert np.allclose(probabilities[head].sum(1), 1, atol=1e-5)
        assert (probabilities[head].argmax(1) == names).all()
    alone = judge.predict(sample[0][2:3])[2]
    assert np.allclose(alone["object"][0], probabilities["object"][2], atol=1e-4)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
    ],
)
def test_pictures_of_another_shape_are_refused(images):
    with pytest.raises(UserError, match=r"\[n, 64, 64, 3\]"):
        EmojiClassifier(["cat"], ["blob"]).predict(images)


def test_measure_is_exact_on_a_made_up_case(monkeypatch):
    judge = EmojiClassifier(["cat", "dog"], ["blob", "line"])
    monkeypatch.setattr(
        judge, "predict", lambda images: (np.array([0, 0, 1, 0]), np.array([0, 1, 1, 0]), {})
    )
    objects, styles = ["cat", "cat", "dog", "dog"], ["blob", "blob", "line", "line"]
    found = judge.measure(np.zeros((4, 64, 64, 3), np.uint8), objects, styles)
    assert [found[name]["accuracy"] for name in ("object", "style", "both")] == [0.75, 0.5, 0.5]
    assert found["object"]["cells"] == 2 and found["object"]["pictures"] == 4


def test_measure_refuses_unknown_names_and_missing_ones():
    judge, pictures = EmojiClassifier(["cat"], ["blob"]), np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="unicorn"):
        judge.measure(pictures, ["unicorn"], ["blob"])
    with pytest.raises(UserError, match="1 pictures, 2 objects, 1 styles"):
        judge.measure(pictures, ["cat", "cat"], ["blob"])


def test_interval_is_as_wide_as_cells_are_few_however_many_seeds_each_has():
    cells = np.arange(20)
    right = cells % 2 == 0
    once = cell_accuracy(right, cells)
    often = cell_accuracy(np.repeat(right, 50), np.repeat(cells, 50))
    assert once["accuracy"] == often["accuracy"] == 0.5
    assert once["ci95"] == often["ci95"] and once["ci95"][1] - once["ci95"][0] > 0.3


def test_every_class_stays_in_training_in_every_fold(dataset):
    objects, styles = np.array(dataset.column("object")), np.array(dataset.column("style"))
    fold = fold_of_cells(objects, styles, 5)
    for k in range(5):
        assert set(objects[fold != k]) == set(objects) and set(styles[fold != k]) == set(styles)
        counts = [np.sum(styles[fold == k] == style) for style in set(styles)]
        assert max(counts) - min(counts) <= 2
    with pytest.raises(UserError, match="cat"):
        fold_of_cells(["cat", "dog", "dog"], ["blob", "blob", "line"], 2)


@pytest.fixture(scope="module")
def of_toys():
    """The judge that learned the toy pictures."""
    images, objects, styles = toy()
    return train_judge({"real": images}, objects, styles, TINY)


def test_training_learns_is_reproducible_and_survives_the_disk(of_toys, tmp_path):
    (images, objects, styles), judge = toy(), of_toys
    assert judge.measure(images, objects, styles)["style"]["accuracy"] == 1
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = train_judge({"real": images}, objects, styles, TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(judge.state_dict().values(), again.state_dict().values(), strict=True)
    )
    save_judge(judge, tmp_path / "judge", {"note": "toy"})
    loaded = load_judge(tmp_path / "judge")
    assert np.allclose(
        loaded.predict(images)[2]["style"], judge.predict(images)[2]["style"], atol=0.02
    )
    assert not list((tmp_path / "judge").glob("*.part"))


def test_cross_validation_names_only_pictures_it_was_not_trained_on(monkeypatch):
    images, objects, styles = toy()
    images[:, 0, 0, 0] = np.arange(len(images))  # a mark to know each picture by
    trained, named = [], []
    fit, predict = train_judge, EmojiClassifier.predict
    monkeypatch.setattr(
        "experiments.emoji.classifier.train.train_judge",
        lambda x, *rest: trained.append(set(x["real"][:, 0, 0, 0])) or fit(x, *rest),
    )
    monkeypatch.setattr(
        EmojiClassifier,
        "predict",
        lambda self, x: named.append(set(x[:, 0, 0, 0])) or predict(self, x),
    )
    report = cross_validate({"real": images}, objects, styles, TINY, folds=2)["real"]
    assert all(
        not (a & b) and len(a | b) == len(images) for a, b in zip(trained, named, strict=True)
    )
    assert set().union(*named) == set(range(len(images)))
    assert report["style"]["accuracy"] >= 0.9 and len(report["style"]["folds"]) == 2


def test_every_version_of_the_pictures_is_learned(of_toys):
    images, objects, styles = toy()
    versions = {"real": images, "reconstructed": 255 - images}
    judge = train_judge(versions, objects, styles, TINY)
    assert all(
        judge.measure(x, objects, styles)["style"]["accuracy"] == 1 for x in versions.values()
    )
    assert of_toys.measure(255 - images, objects, styles)["style"]["accuracy"] < 1


def test_the_judge_is_trained_measured_and_saved_in_one_call(tmp_path, capsys):
    images, objects, styles = toy()
    columns = {"object": objects, "style": styles}
    dataset = MagicMock(
        root=tmp_path,
        column=columns.get,
        images=lambda rows, size: images[list(rows)],
        content_hash=lambda: "data",
    )
    dataset.__len__.return_value = len(images)
    model = SimpleNamespace(
        image_size=16, reconstruct=lambda pictures: pictures // 2 + 100, identity=lambda: "weights"
    )
    settings = dataclasses.replace(TINY, epochs=2, fold_epochs=2)
    metrics = train_and_save(dataset, model, tmp_path / "judge", folds=2, settings=settings)
    assert json.loads(capsys.readouterr().out) == metrics
    facts = json.loads((tmp_path / "judge/judge.json").read_text())
    assert facts["metrics"] == metrics and (facts["data_hash"], facts["model"]) == (
        "data",
        "weights",
    )
    assert set(metrics["cross_validation"]) == set(metrics["train"]) == {"real", "reconstructed"}
    columns["object"] = [None, *objects[1:]]
    with pytest.raises(UserError, match="without an object"):
        train_and_save(dataset, model, tmp_path / "other", settings=TINY)
    assert not (tmp_path / "other").exists()


def test_missing_or_foreign_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="train_judge.sh$"):
        load_judge(tmp_path)
    save_judge(EmojiClassifier(["cat"], ["blob"], TINY), tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()[:-2] + b"xx"
    )
    with pytest.raises(UserError, match="not what judge.json describes"):
        load_judge(tmp_path)


def test_judge_of_another_architecture_is_refused(tmp_path):
    judge = EmojiClassifier(["cat"], ["blob"], TINY)
    judge.style_head = torch.nn.Linear(3, 1)
    save_judge(judge, tmp_path, {})
    with pytest.raises(UserError, match="another version"):
        load_judge(tmp_path)


def test_damage_keeps_shape_and_range_changes_pictures_and_is_seeded():
    x = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    once = augment.augment(x, torch.Generator().manual_seed(1))
    assert once.shape == x.shape and 0 <= once.min() and once.max() <= 1
    assert ((once - x).abs().mean((1, 2, 3)) > 0.01).all()
    assert torch.equal(once, augment.augment(x, torch.Generator().manual_seed(1)))


def test_warp_brings_in_white_and_hue_keeps_grey():
    white = torch.ones(4, 3, 48, 48)
    assert torch.allclose(augment.warp(white, torch.Generator().manual_seed(0)), white)
    rotation = augment.hue_matrix(torch.tensor([0.3, -1.2]))
    assert torch.allclose(rotation @ torch.ones(3), torch.ones(2, 3), atol=1e-6)
    assert torch.allclose(
        rotation @ rotation.transpose(1, 2), torch.eye(3).expand(2, 3, 3), atol=1e-6
    )


def test_quantise_is_the_identity_when_steps_are_tiny():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fine = augment.quantise(x, torch.Generator().manual_seed(0), coarsest=1e-6, probability=1.0)
    assert torch.allclose(fine, x, atol=1e-4)
    assert not torch.allclose(
        augment.quantise(x, torch.Generator().manual_seed(0), probability=1.0), x, atol=1e-2
    )
