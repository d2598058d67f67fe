"""The Python API on a tiny pipeline."""

import numpy as np
import pytest
import torch
from conftest import STYLES, small_run
from diffusers import StableDiffusionPipeline
from PIL import Image

import concept_trak
from concept_trak import Attributor
from concept_trak.components.edits import load_edit
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError

PROMPT, CONCEPTS = "a cat in the style of blob", ["cat", "blob"]


def attributor(images, model, folder, **more):
    sizes = small_run("", "", folder)
    for place in ("sd_model_path", "data_dir", "grad_dir", "results_dir", "device"):
        del sizes[place]
    return Attributor(images, model, folder, device="cpu", **sizes | more)


@pytest.fixture(scope="module")
def asked(tiny_pipeline, tiny_data, tmp_path_factory):
    """(attributor, answer)."""
    made = attributor(tiny_data, tiny_pipeline, tmp_path_factory.mktemp("api"))
    return made, made.fit().attribute(PROMPT, CONCEPTS, methods=["das"])


def test_the_package_gives_the_api_and_nothing_else():
    assert concept_trak.__all__ == ["Answer", "Attributor", "ConceptEdit"]
    assert all(hasattr(concept_trak, name) for name in concept_trak.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Attributer'"):
        concept_trak.Attributer  # noqa: B018


def test_an_answer_holds_scores_rankings_and_the_image(asked):
    _, answer = asked
    assert list(answer) == CONCEPTS and answer.image.size == (8, 8)
    cat = answer["cat"]
    assert cat.scores.shape == (11,) and cat.scores.dtype == np.float32
    assert cat.by_method.keys() == {"concept_trak", "das"}
    for method, scores in cat.by_method.items():
        top, bottom = cat.top(3, method), cat.bottom(3, method)
        assert [m.index for m in top] == np.argsort(-scores, kind="stable")[:3].tolist()
        assert [m.index for m in bottom] == np.argsort(scores, kind="stable")[:3].tolist()
        assert top[0].score == scores.max() and top[0].rank == 1
    assert top[0].path.is_file() and any(style in top[0].caption for style in STYLES)
    with pytest.raises(
        UserError, match="method='trak' was not asked; give method one of concept_trak"
    ):
        cat.top(3, "trak")


def test_an_answer_is_a_table(asked):
    pytest.importorskip("pandas")
    table = asked[1].to_pandas()
    assert len(table) == 2 * 2 * 11
    one = table[(table.concept == "blob") & (table.method == "das")]
    assert one.sort_values("rank").score.is_monotonic_decreasing
    assert one.score.tolist() == asked[1]["blob"].by_method["das"].tolist()


def test_an_answer_is_saved_as_the_report_of_the_command_line(asked, tmp_path):
    page = asked[1].save(tmp_path)
    assert page.name == "report.html" and page.is_relative_to(tmp_path)
    kept = np.load(page.parent / "target_cat/scores.npy")
    at = asked[1]["cat"].result.damping_index(asked[1].settings.damping)
    assert kept[at].tolist() == asked[1]["cat"].scores.tolist()


def test_a_second_attributor_computes_no_gradient_again(asked, monkeypatch):
    made, answer = asked
    monkeypatch.setattr("concept_trak.attribution.train_grad.compute_batch", None)
    settings = made.task.settings
    again = attributor(settings.data_dir, settings.sd_model_path, made.folder)
    assert again.attribute(PROMPT, ["cat"])["cat"].scores.tolist() == answer["cat"].scores.tolist()


def test_a_question_of_other_gradients_computes_them(asked):
    made, answer = asked
    scores = made.attribute(PROMPT, ["cat"], f="contrast")["cat"].scores
    assert scores.shape == (11,) and not np.array_equal(scores, answer["cat"].scores)


def test_shards_that_are_left_to_others_are_not_scored_without(tiny_data, tiny_pipeline, tmp_path):
    part = attributor(tiny_data, tiny_pipeline, tmp_path, shards="0")
    with pytest.raises(UserError, match="shard"):
        part.attribute(PROMPT, ["cat"])
    attributor(tiny_data, tiny_pipeline, tmp_path, shards="1,2").attribute(PROMPT, ["cat"])
    assert len(part.fit().attribute(PROMPT, ["cat"])["cat"].scores) == 11


def as_dataset(data):
    class Dataset:
        column_names = ["image", "text"]

        def __len__(self):
            return len(data)

        def __getitem__(self, key):  # a column, or a row; the images of all at once are too many
            if isinstance(key, int):
                return {"image": data.image(key), "text": data.captions[key]}
            return {"text": data.captions}[key]

    return Dataset()


@pytest.mark.parametrize("kind", ["pil", "arrays", "paths", "dataset"])
def test_images_and_a_pipeline_in_memory_score_as_those_on_disk(
    kind, asked, tiny_data, tiny_pipeline, tmp_path
):
    data = load_folder(tiny_data).split("train")
    pictures = [data.image(i) for i in range(len(data))]
    images = {
        "pil": pictures,
        "arrays": [np.asarray(p) for p in pictures],
        "paths": [data.path(i) for i in range(len(data))],
        "dataset": as_dataset(data),
    }[kind]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    captions = None if kind == "dataset" else data.captions
    made = attributor(images, pipe, tmp_path, captions=captions)
    scores = made.attribute(PROMPT, ["cat"])["cat"].scores
    np.testing.assert_allclose(scores, asked[1]["cat"].scores, rtol=1e-3, atol=1e-4)


def test_a_pipeline_in_memory_is_known_by_its_weights_and_configuration(tiny_pipeline, tiny_data):
    from concept_trak.models.text_to_image import from_pipeline

    def identity(change=None):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
        if change:
            change(pipe)
        return from_pipeline(pipe).identity()

    def other_weights(pipe):
        with torch.no_grad():
            next(pipe.unet.parameters()).add_(1)

    def other_schedule(pipe):
        config = dict(pipe.scheduler.config) | {"beta_end": 0.02}
        pipe.scheduler = type(pipe.scheduler).from_config(config)

    kept = identity()
    assert kept == identity() and len({kept, identity(other_weights)}) == 2
    assert identity(other_schedule) != kept


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_edit_changes_a_copy_and_is_undone(in_memory, tiny_data, tiny_pipeline, tmp_path):
    model = tiny_pipeline
    if in_memory:
        model = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    made = attributor(tiny_data, model, tmp_path, score_seeds=1)
    before = {k: v.clone() for k, v in made.task.model.network.named_parameters()}
    with made.edit("cat", ratio=0.01) as edit:
        own = dict(edit.pipe.unet.named_parameters())
        assert 0 < edit.chosen.count == sum((own[k] != v).sum() for k, v in before.items())
        saved = load_edit(edit.save(tmp_path / "edit") / "edit.safetensors")
        assert saved.digest() == edit.edit.digest()
        kept = edit.export(tmp_path / "edited")
    assert all(own[k].equal(v) for k, v in before.items())
    assert all(v.equal(before[k]) for k, v in made.task.model.network.named_parameters())
    loaded = StableDiffusionPipeline.from_pretrained(kept, safety_checker=None)
    assert any(not v.equal(before[k]) for k, v in loaded.unet.named_parameters())


def picture(size=(8, 8)):
    return Image.new("RGB", size)


REFUSED = {
    "number": ([picture()], ["a", "b"], "there are 1 images and 2 captions"),
    "none": ([], [], "there are 0 images"),
    "captions": ([picture()], None, "images is a list; give captions, too, or images as a folder"),
    "empty caption": ([picture()], [" "], "empty caption"),
    "array": ([np.zeros((8, 8))], ["a"], r"image 0 is an array float64 \[8, 8\]"),
    "kind": ([3], ["a"], "image 0 is a int; give image as a PIL image"),
    "file": (["no/such.png"], ["a"], "no/such.png"),
    "folder": ("no/such", None, "no/such does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_are_none_are_refused_in_a_line(case, tiny_pipeline, tmp_path):
    images, captions, told = REFUSED[case]
    with pytest.raises(UserError, match=told):
        attributor(images, tiny_pipeline, tmp_path, captions=captions)


class FluxPipeline:
    name_or_path = "black-forest-labs/FLUX.1-dev"


def test_a_wrong_model_setting_or_concept_is_refused_in_a_line(tiny_data, asked, tmp_path):
    with pytest.raises(UserError, match="FLUX.1-dev is a FluxPipeline"):
        attributor(tiny_data, FluxPipeline(), tmp_path)
    with pytest.raises(TypeError, match="no field 'sead'"):
        asked[0].attribute(PROMPT, ["cat"], sead=3)
    with pytest.raises(UserError, match="concepts='cat' is one text; give a list"):
        asked[0].attribute(PROMPT, "cat")
    with pytest.raises(UserError, match="dog"):
        asked[0].attribute(PROMPT, ["dog"])
    with pytest.raises(UserError, match="aim='remove' is unknown; give aim"):
        asked[0].edit("cat", aim="remove")
    with pytest.raises(KeyError):
        asked[1]["dog"]
