"""The verbs: scores and edits as files and a page; an exported pipeline; one line for bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS, STYLES

from concept_trak import cli
from concept_trak.components.edits import EditedNetwork, load_edit
from concept_trak.components.score_io import load_scores
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.report import component_report
from concept_trak.settings import Components, resolve


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path):
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "concept": "cat"}
    given |= {"gen_num_inference_steps": 3, "score_seeds": 2, "ratio": 0.1, "device": "cpu"}
    given |= {"results_dir": tmp_path / "results/qual"}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]


def latest(tmp_path):
    return tmp_path / "results/qual/cad/latest"


def test_scores_are_files_and_a_page(flags, tmp_path, capsys):
    assert cli.main(["cad", *flags]) == 0
    folder = latest(tmp_path)
    found, facts = load_scores(folder), json.loads((folder / "scores.json").read_text())
    assert facts["prompt"] == "a cat" and len(facts["layers"]) == len(found.mean)
    assert sum(row["share"] for row in facts["layers"]) == pytest.approx(1)
    assert (folder / "layers.png").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert "Where “cat” lives" in page and "http" not in page.replace("http-equiv", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]  # RESULTS_DIR holds it all
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["qual"]
    tensors = (folder / "scores.safetensors").read_bytes()
    (folder / "scores.safetensors").write_bytes(tensors[:-4])
    with pytest.raises(UserError):
        load_scores(folder)
    assert capsys.readouterr().out.strip().endswith("report.html")


@pytest.mark.parametrize("verb", ["cad-erase", "cad-amplify"])
def test_an_edit_is_a_file_a_page_and_a_pipeline_that_diffusers_loads(verb, flags, tmp_path):
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "edited"
    assert cli.main([verb, *flags, f"--export={out}"]) == 0
    edit = load_edit(latest(tmp_path) / "edit.safetensors")
    model = load_pipeline(flags[0].partition("=")[2])
    exported = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    with EditedNetwork(model.network) as edited:
        edited.apply(edit)
        for name, weight in exported.unet.named_parameters():
            assert torch.equal(weight, model.network.get_parameter(name))
    page = (latest(tmp_path) / "report.html").read_text()
    assert page.count('alt="before:') == page.count('alt="after:') > 4
    assert ("the loss is lower" in page) == (verb == "cad-amplify")
    # on top of it, another one
    stacked = [*flags, "--concept=dog", f"--edits={latest(tmp_path) / 'edit.safetensors'}"]
    assert cli.main(["cad-erase", *stacked]) == 0
    second = load_edit(latest(tmp_path) / "edit.safetensors")
    assert second.model == edit.model and second.digest() != edit.digest()


@pytest.mark.parametrize("given, plan", [([], ["paper", 0.01]), (["--ratio=0.1"], None)])
def test_amplifying_has_its_own_choice_of_weights_unless_one_is_given(
    given, plan, flags, monkeypatch
):
    seen = []
    edit_weights = lambda s, *_: seen.append([s.selection, s.ratio]) or Path("x")  # noqa: E731
    monkeypatch.setattr(component_report, "edit_weights", edit_weights)
    own = [flag for flag in flags if not flag.startswith("--ratio")]
    assert cli.main(["cad-amplify", *own, *given]) == 0
    assert cli.main(["cad-erase", *own]) == 0
    usual = Components()
    assert seen == [plan or [usual.selection, 0.1], [usual.selection, usual.ratio]]


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--concept=unicorn"], "unknown concept 'unicorn'"),
        (["--ratio=0"], "RATIO=0.0 is out of range"),
        (["--ratio=1.5"], "RATIO=1.5 is out of range"),
        (["--ratio=nan"], "RATIO=nan"),
        (["--selection=ff"], "SELECTION names 'ff'"),
        (["--selection=paper", "--ratio=0.001"], "the published rule rounds down"),
        (["--edits=/nowhere/edit.safetensors"], "/nowhere/edit.safetensors"),
        (["--granularity=head", "--selection=feed_forward"], "no attention head"),
        (["--concept=", "--prompt= ", "--target-concepts="], "CONCEPT and PROMPT are empty"),
        (["--spare=unicorn"], "unknown concept 'unicorn'"),
        (["--export=."], "set EXPORT to a new folder"),
        (["--export=/"], "set EXPORT to a new folder"),
    ],
)
def test_bad_input_gives_one_line(changes, words, flags, tmp_path, capsys):
    assert cli.main(["cad-erase", *flags, *changes]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and words in told
    assert not list(tmp_path.rglob("*.html"))


def test_the_model_itself_is_no_place_for_an_export(flags, tmp_path, capsys):
    model = Path(flags[0].partition("=")[2])
    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}
    (tmp_path / "link").symlink_to(model)
    for place in (model, model.parent, model / "unet", tmp_path / "link", tmp_path):
        assert cli.main(["cad-erase", *flags, f"--export={place}"]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and f"EXPORT={place} " in told[0]
    assert before == {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}


def test_captions_of_every_style_are_spared_and_none_that_shows_the_concept(flags, tmp_path):
    assert cli.main(["cad-erase", *flags, "--spare=captions"]) == 0
    spared = load_edit(latest(tmp_path) / "edit.safetensors")
    assert cli.main(["cad-erase", *flags]) == 0
    plain = load_edit(latest(tmp_path) / "edit.safetensors")
    assert spared.count <= plain.count and spared.digest() != plain.digest()


def test_what_is_spared_is_named_by_concept_caption_or_style(tiny_data):
    given = resolve("emoji", {"data_dir": str(tiny_data), "concept": OBJECTS[0]})
    words = component_report.concept_prompts(given)
    data = load_folder(tiny_data)
    every = component_report.spared_prompts(given.but(spare="captions"), words)
    shown = {r["object"]: c for c, r in zip(data.captions, data.records, strict=True)}
    assert 0 < len(every) <= 2 * len(STYLES) and set(every) <= set(data.captions)
    assert not any(OBJECTS[0] in caption for caption in every)
    other = shown[OBJECTS[1]]
    assert (
        component_report.spared_prompts(given.but(spare=f"{other}|{OBJECTS[2]}"), words)[0] == other
    )
    assert component_report.spared_prompts(given, words) == []


def test_images_x_weights_are_a_table_a_map_and_an_array(flags, tmp_path, capsys):
    assert cli.main(["cad-images", *flags, "--granularity=head"]) == 0
    folder = latest(tmp_path)
    values, facts = (
        np.load(folder / "influence.npy"),
        json.loads((folder / "influence.json").read_text()),
    )
    assert values.shape == (11, len(facts["groups"])) and np.isfinite(values).all()
    rows = list(csv.DictReader((folder / "influence.csv").open()))
    listed = [float(row["score"]) for row in rows]
    assert len(rows) == 11 and listed == sorted(listed, reverse=True)
    np.testing.assert_allclose(listed, np.sort(values.sum(1))[::-1], rtol=1e-3)
    assert (folder / "influence.png").stat().st_size > 5000
    assert cli.main(["cad-images", *flags, "--granularity=row"]) == 2
    assert "set GRANULARITY to module or head" in capsys.readouterr().err


def test_an_edit_of_another_model_is_refused_in_one_line(flags, other_pipeline, tmp_path, capsys):
    assert cli.main(["cad-erase", *flags]) == 0
    path = latest(tmp_path) / "edit.safetensors"
    others = [f"--sd-model-path={other_pipeline}", f"--edits={path}"]
    assert cli.main(["cad-erase", *flags, *others]) == 2
    assert "was made for another model" in capsys.readouterr().err.strip().splitlines()[-1]
