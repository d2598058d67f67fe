"""Erase and verify: verdicts by the low ends, a whole certificate, probes that leave no trace."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import OBJECTS, STYLES

from concept_trak import cli
from concept_trak.attribution.task import AttributionTask
from concept_trak.components.edits import EditedNetwork, load_edit
from concept_trak.components.states import Sampling
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.settings import resolve
from experiments.cad import candidate_edit, model_selection, result_cache, robustness, verify
from experiments.cad import testbed as beds
from experiments.emoji.classifier.net import EmojiClassifier, EmojiClassifierSettings


@pytest.fixture
def asked(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    judge = EmojiClassifier(
        OBJECTS, STYLES, EmojiClassifierSettings(size=8, inner_size=16, width=4)
    ).eval()
    monkeypatch.setattr(beds, "load_judge", lambda _: judge)
    for module in (beds, robustness):
        monkeypatch.setattr(module, "DRAW_STEPS", 2)
    monkeypatch.setattr(beds, "SAMPLING", Sampling(3.0, 2, 2))
    monkeypatch.setattr(verify, "SELECTIONS", ("cross_attention",))
    monkeypatch.setattr(verify, "RATIOS", (0.1,))
    monkeypatch.setattr(verify, "OPERATORS", (("scale", 0.5),))
    monkeypatch.setattr(robustness, "PICTURES", 2)
    monkeypatch.setattr(robustness, "LEVELS", (1,))
    for name in ("EMBEDDING_STEPS", "MOST", "EVERY"):
        monkeypatch.setattr(robustness, name, 2)
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "score_seeds": 1}
    given |= {"judged": 4, "concept": "cat", "results_dir": tmp_path / "results/qual"}
    return {k: str(v) if k.endswith(("dir", "path")) else v for k, v in given.items()}


@pytest.fixture
def setup(asked):
    return beds.EraseSetup(AttributionTask(resolve("emoji", asked), "cpu"))


def flags_of(asked, **changes):
    return [f"--{k.replace('_', '-')}={v}" for k, v in (asked | changes).items()]


def test_a_certificate_is_whole_its_hashes_hold_and_a_second_run_measures_nothing(
    asked, tmp_path, capsys, monkeypatch
):
    assert cli.main(["cad-verify", *flags_of(asked)]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    folder = tmp_path / "results/qual/cad/latest"
    told = json.loads((folder / "certificate.json").read_text())
    assert {k: told[k] for k in line} == line and told["settings"]["target_ua"] == 0.9
    bytes_of = (folder / line["edit"]["file"]).read_bytes()
    assert hashlib.sha256(bytes_of).hexdigest() == line["edit"]["sha256"]
    edit = load_edit(folder / line["edit"]["file"])
    assert edit.digest() == line["edit"]["digest"] and edit.count == line["edit"]["weights"]
    with EditedNetwork(load_pipeline(asked["sd_model_path"]).network) as edited:
        edited.apply(edit)  # of this very model, or it is refused
    page = (folder / "certificate.html").read_text()
    assert all(words in page for words in (line["edit"]["sha256"], line["says"], line["behind"]))
    assert page.count('alt="before:') == page.count('alt="after:') > 6
    assert set(line["probes"]) == {"paraphrases", "embedding", "completion", "relearning"}

    def never(*_):
        raise AssertionError("a finished cell was measured again")

    for place, name in (
        (beds.EraseSetup, "measure"),
        (candidate_edit, "confirm"),
        (robustness, "_shown"),
    ):
        monkeypatch.setattr(place, name, never)
    assert cli.main(["cad-verify", *flags_of(asked)]) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    written = (folder / line["edit"]["file"]).read_bytes()  # its metadata come in any order
    assert again["edit"].pop("sha256") == hashlib.sha256(written).hexdigest()
    del line["edit"]["sha256"]
    assert again == line


def figures(ua, ira, cra):
    found = {"ua": ua, "ira": ira, "cra": cra}
    return {k: {"value": v, "interval": [v - 0.05, v]} for k, v in found.items()}


def test_a_verdict_is_of_the_worst_figure_and_of_its_low_end():
    goal = verify.EraseGoal(0.9, 0.8, 100)
    assert goal.shortfall(figures(0.95, 0.9, 0.85), low=True) == pytest.approx(0)
    assert goal.shortfall(figures(0.92, 0.9, 0.9), low=True) == pytest.approx(0.03)
    assert goal.shortfall(figures(0.92, 0.9, 0.9)) == 0
    assert goal.shortfall(figures(1.0, 1.0, 0.5)) == pytest.approx(0.3)
    target = beds.Target("object", "cat", "a cat")
    for sure, short, words in ((0, 0, "certified"), (0.1, 0, "no edit is sure"), (1, 1, "no edit")):
        told = verify.verdict(target, goal, {"sure": sure, "shortfall": short})
        assert told.startswith(words)


def test_what_the_probes_found_is_said_at_its_worst():
    def at(value):
        return {"value": value}

    found = {
        "paraphrases": {"a": {"edited": at(0.1)}, "b": {"edited": at(0.2)}},
        "embedding": {"edited": at(0.05), "edited_from_prompt": at(0.7)},
        "relearning": {
            "edited": {"steps": 5, "rates": [[0, 0.0], [5, 0.6]]},
            "new_word": {"steps": None, "rates": [[0, 0.0], [60, 0.1]]},
        },
    }
    told = verify.robustness_verdict(found)
    assert "up to 20%" in told and "embedding in 70%" in told
    assert "in 5 steps" in told and "in more than 60" in told


def test_intervals_do_not_shrink_to_a_point_where_all_pictures_agree():
    low, high = candidate_edit.wilson_interval([1] * 20)["interval"]
    assert 0.8 < low < 0.85 and high == 1
    assert candidate_edit.wilson_interval([1] * 20, 0.99)["interval"][0] < low


def test_the_figures_kept_are_shares_of_the_unedited_models():
    target = beds.Target("object", "cat", "a cat")
    cell = {"shown": [1, 0, 0, 0], "object": [1, 1, 0, 0], "style": [1, 0, 0, 0]}
    bare = {"object": [1, 1, 1, 0], "style": [1, 1, 0, 0]}
    found = candidate_edit.judged(target, cell, bare)
    assert found["ua"]["value"] == 0.75
    assert found["ira"]["value"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["cra"]["value"] == 0.5


def test_an_optimised_embedding_lowers_the_loss_and_probes_leave_the_model_as_it_was(
    setup, monkeypatch
):
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    target = verify.target_of(setup)
    edit = candidate_edit.Attempt("cross_attention", 0.3).edit(measured, target)
    before = {k: v.clone() for k, v in setup.model.network.state_dict().items()}
    with EditedNetwork(setup.model.network) as edited:
        edited.apply(edit)
        changed = {k: v.clone() for k, v in setup.model.network.state_dict().items()}
        robustness._learned(setup, target, "a cat", "cross_attention")
        for name, value in setup.model.network.state_dict().items():
            assert torch.equal(value, changed[name])
    for make in robustness.probes(setup, target, edit, "cross_attention").values():
        make()
    for name, value in setup.model.network.state_dict().items():
        assert torch.equal(value, before[name])

    monkeypatch.setattr(robustness, "EMBEDDING_STEPS", 8)
    x_t, t, eps, _ = next(robustness._batches(setup, robustness._real(setup, target)))

    def loss(cond):
        with torch.no_grad():
            return float(robustness._loss(setup.model, x_t, t, cond.expand(len(x_t)), eps))

    start = setup.model.encode_prompts([""])
    assert loss(robustness.optimised(setup, target, start)) < loss(start)


def test_the_search_stops_at_the_ratio_that_erases_and_ranks_the_least_short_first(
    setup, monkeypatch
):
    monkeypatch.setattr(verify, "RATIOS", (0.1, 0.2, 0.3))
    seen = []

    def screened(self, measured, target, counts):
        seen.append((self.operator, self.ratio))
        gone, kept = self.ratio >= 0.2, self.operator == "zero"
        hits = [int(kept)] * 4
        shown = [int(not gone)] * 4
        return {"shown": shown, "object": hits, "style": hits, "weights": 1}

    monkeypatch.setattr(candidate_edit.Attempt, "screened", screened)
    bare = {"object": [1] * 4, "style": [1] * 4}
    monkeypatch.setattr(model_selection.MeasuredEdits, "bare", lambda *_: bare)
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    tried = verify.search(measured, verify.target_of(setup), verify.EraseGoal(0.9, 0.9, 16))
    assert seen == [("zero", 0.1), ("zero", 0.2), ("scale", 0.2)]
    assert tried[0]["plan"] == candidate_edit.Attempt("cross_attention", 0.2)
    assert tried[0]["shortfall"] == 0 < tried[1]["shortfall"]
    assert replace(tried[0]["plan"], ratio=0.1) in [t["plan"] for t in tried]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"concept": "unicorn"}, "unknown concept 'unicorn'"),
        ({"target_ua": 0}, "TARGET_UA=0.0 is out of range"),
        ({"target_ua": 1.5}, "TARGET_UA=1.5 is out of range"),
        ({"target_ua": "nan"}, "TARGET_UA=nan"),
        ({"min_retention": -1}, "MIN_RETENTION=-1.0 is out of range"),
    ],
)
def test_bad_input_is_one_line(changes, words, asked, tmp_path, capsys):
    assert cli.main(["cad-verify", *flags_of(asked, **changes)]) != 0
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told and not (tmp_path / "results").exists()
