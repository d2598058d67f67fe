"""The section "weights" of an answer: the edits of the verbs, at two ratios, made once."""

import types
from dataclasses import replace

import numpy as np
import pytest
from test_report import Page, pair, shown

from concept_trak.attribution.naming import answer_folder
from concept_trak.components.edits import load_edit
from concept_trak.components.score_io import load_scores
from concept_trak.report import component_report, component_section
from concept_trak.report.context import Links
from concept_trak.report.page import write_report
from concept_trak.settings import resolve


@pytest.fixture
def task(tiny_pipeline, tiny_data, tmp_path):
    given = {"prompt": "a cat in the style of line", "target_concepts": "cat|line"}
    given |= {"sd_model_path": str(tiny_pipeline), "data_dir": str(tiny_data), "ratio": 0.1}
    given |= {"gen_num_inference_steps": 3, "score_seeds": 1, "weights": True}
    given |= {"results_dir": str(tmp_path / "qual")}
    return types.SimpleNamespace(settings=resolve("emoji", given), device="cpu")


def test_edits_are_those_of_the_verbs_and_are_made_once(task, tmp_path, monkeypatch):
    found = component_section.of_concepts(task)
    assert [of.target for of in found] == ["cat", "line"] and found[0].prompt == "a cat"
    for of in found:
        assert [row.name for row in of.rows] == [
            "unedited", "erased, 3.3 %", "erased, 10 %", "amplified, 3.3 %", "amplified, 10 %",
        ]  # fmt: skip
        assert all(len(row.pictures) == len(of.prompts) for row in of.rows)
        assert not np.array_equal(*(np.asarray(of.rows[i].pictures[0]) for i in (0, 2)))
    few, many = (load_edit(found[0].rows[i].links["edit"]) for i in (1, 2))
    assert many.count == pytest.approx(3 * few.count, rel=0.02)
    # what CONCEPT=cat bash scripts/cad/run_erase.sh makes
    alone = component_report.edit_weights(
        task.settings.but(concept="cat", weights=False), "cpu", "erase"
    )
    assert found[0].rows[2].links["edit"].parent == alone
    assert load_edit(alone / "edit.safetensors").digest() == many.digest()
    layers = {row["name"] for row in found[0].layers}
    assert layers <= set(load_scores(found[0].page.parent).names())

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(component_section, "write_edit", never)
    monkeypatch.setattr(component_report.ComponentRun, "scores", never)
    again = component_section.of_concepts(task)
    for a, b in zip(found[1].rows, again[1].rows, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))


def test_an_edit_that_is_refused_says_why_and_the_others_are_there(task):
    task.settings = task.settings.but(selection="paper", ratio=0.09, target_concepts="cat")
    (of,) = component_section.of_concepts(task)
    assert [bool(row.pictures) for row in of.rows] == [True, False, True, False, True]
    assert "the published rule rounds down" in of.rows[1].note


def test_the_page_shows_them_or_names_the_command_that_adds_them(task, tmp_path):
    task.settings = task.settings.but(target_concepts="cat")
    (of,) = component_section.of_concepts(task)
    links = Links(str, {c.target: {} for c in pair()})
    page = tmp_path / "report.html"
    write_report(page, "x", pair(), replace(shown(), weights=(of,), links=links))
    html, told = page.read_text(), Page(page.read_text())
    assert told.open == [] and html.count('alt="erased, 10 %: ') == len(of.prompts)
    assert "WEIGHTS=1" not in html
    write_report(page, "x", pair(), replace(shown(), weights_line="WEIGHTS=1 bash <run>.sh"))
    html = page.read_text()
    assert "WEIGHTS=1 bash &lt;run&gt;.sh" in html and 'id="weights"' not in html


def test_an_answer_with_the_section_is_another_answer(task):
    without = task.settings.but(weights=False)
    assert answer_folder(without) == answer_folder(without.but(ratio=0.2))
    folders = {answer_folder(s) for s in (without, task.settings, task.settings.but(ratio=0.2))}
    assert len(folders) == 3
