"""The table of component attribution: disjoint splits, equal counts, resumed cells, exact twins."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OBJECTS, STYLES

from concept_trak import cli
from concept_trak.attribution.task import AttributionTask
from concept_trak.components import concept_plan
from concept_trak.components.concept_plan import edit_from_scores
from concept_trak.components.parameter_groups import select
from concept_trak.components.states import Sampling
from concept_trak.errors import UserError
from concept_trak.settings import resolve
from experiments.cad import amplify, baselines, model_selection, result_cache, table
from experiments.cad import testbed as beds
from experiments.emoji.classifier.net import EmojiClassifier, EmojiClassifierSettings


@pytest.fixture
def asked(tiny_pipeline, tiny_data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    judge = EmojiClassifier(
        OBJECTS, STYLES, EmojiClassifierSettings(size=8, inner_size=16, width=4)
    ).eval()
    monkeypatch.setattr(beds, "load_judge", lambda _: judge)
    monkeypatch.setattr(model_selection, "SPARED", (2.0,))
    monkeypatch.setattr(model_selection, "SELECTIONS", ("cross_attention",))
    monkeypatch.setattr(model_selection, "PAPER_RATIOS", (0.2,))
    monkeypatch.setattr(model_selection, "RATIOS", (0.1,))
    monkeypatch.setattr(table, "CONTROLS", ("random", "wanda"))
    monkeypatch.setattr(beds, "DRAW_STEPS", 2)
    monkeypatch.setattr(beds, "SAMPLING", Sampling(3.0, 2, 2))
    monkeypatch.setattr(concept_plan, "NOISINGS", 2)
    given = {"sd_model_path": tiny_pipeline, "data_dir": tiny_data, "score_seeds": 1}
    given |= {"judged": 4, "num_queries": 1, "results_dir": tmp_path / "results/qual"}
    return {k: str(v) if k.endswith(("dir", "path")) else v for k, v in given.items()}


@pytest.fixture
def setup(asked):
    return beds.EraseSetup(AttributionTask(resolve("emoji", asked), "cpu"))


@pytest.mark.parametrize(
    "spoil",
    [
        {"what": ["something", "else"]},
        {"shown": [1, 0, 1, 1]},  # what is there is not what was written
        {"shown": [1, 0, 2], "digest": None},
        {"shown": ["1"], "digest": None},
        {"shown": [], "digest": None},
        {"style": None, "digest": None},
        {"object": [[1], [0]], "digest": None},
    ],
)
def test_a_kept_cell_that_is_not_what_was_written_is_one_line(spoil, tmp_path):
    made = result_cache.MeasurementCache.__new__(result_cache.MeasurementCache)
    made.kept, made.folder, made.origin = {}, tmp_path, ["model"]
    target, measured = beds.Target("object", "cat", "cat"), {"shown": [1, 0], "style": [1, 1]}
    assert made.cell(target, ["plan", 0.1], lambda: measured)["shown"] == [1, 0]
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text()) | spoil
    path.write_text(json.dumps({k: v for k, v in kept.items() if (k, v) != ("digest", None)}))
    with pytest.raises(UserError, match=rf"{path.name}: .*; remove it"):
        made.cell(target, ["plan", 0.1], dict)


def test_the_committed_cells_are_whole():
    kept = json.loads(result_cache.KEPT.read_text())
    for name, cell in kept.items():
        assert result_cache.checked(kept, name, cell["what"], result_cache.KEPT, "") == cell


def test_the_whole_table_is_made_and_a_second_run_measures_nothing(asked, capsys, monkeypatch):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in asked.items()]
    assert cli.main(["cad-eval", *flags]) == 0
    told = capsys.readouterr().out
    line = json.loads(told.strip().splitlines()[-1])
    for name, cell in line["objects"].items():
        assert f"| {name} | {cell['ua']:.2f} [" in told
    assert f"{line['objects_meeting']} all three" in told and "| wanda |" in told
    wanted = {"objects", "styles", "objects_meeting", "styles_meeting", "controls_beaten"}
    wanted |= {"pearson_j", "pearson_judge", "amplify_gain", "amplify_kept"}
    assert wanted <= set(line)
    assert [at["predicted"] > 0 for at in line["amplify_curve"]] == [True] * 3
    (weakest,) = line["amplify_weak"]["concepts"].items()
    assert weakest[1][1] - weakest[1][0] == pytest.approx(line["amplify_weak"]["gain"])
    for cell in [*line["objects"].values(), *line["styles"].values()]:
        assert 0 <= cell["ua"] <= 1 and cell["ua_ci95"][0] <= cell["ua"] <= cell["ua_ci95"][1]

    def never(*_):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(beds.EraseSetup, "measure", never)
    assert cli.main(["cad-eval", *flags]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line


def test_the_weakest_objects_are_found_among_those_that_chose_nothing(setup, monkeypatch):
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    tuned = {t.name for t in setup.targets["tune"]}
    worst = next(t.name for t in reversed(setup.targets["object"]))
    right = {name: [name != worst] * 3 for name in OBJECTS}

    def drawn(records, seeds):
        shown = np.array(right[records[0]["object"]])
        return SimpleNamespace(right=lambda kind: shown)

    monkeypatch.setattr(setup, "draw", drawn)
    found = amplify.Amplified(measured, (4, 4), model_selection.paper(0.2))._weakest(
        3, len(OBJECTS)
    )
    assert found[0].name == worst and not tuned & {t.name for t in found}


def test_what_amplifying_gains_is_of_pairs():
    before, after = {"shown": [0, 1], "object": [1, 1]}, {"shown": [1, 1], "object": [1, 0]}
    found = amplify.mean_gain([(before, after), (before, before)])
    assert found["gain"] == 0.25 and found["kept"] == 0.75
    assert found["gain_ci95"][0] <= 0.25 <= found["gain_ci95"][1]


def test_cells_that_were_kept_are_not_measured_again(setup, tmp_path, monkeypatch):
    target, first = setup.targets["object"][0], result_cache.MeasurementCache(setup)
    made = first.cell(target, ["some", 1], lambda: {"shown": [1, 0]})
    first.gather(tmp_path / "cells.json")
    monkeypatch.setattr(result_cache, "KEPT", tmp_path / "cells.json")
    monkeypatch.setattr(result_cache, "make_folder", lambda _: tmp_path / "empty")
    again = result_cache.MeasurementCache(setup)
    assert again.cell(target, ["some", 1], lambda: pytest.fail("measured again")) == made
    other = again.cell  # of another plan it is measured
    (tmp_path / "empty").mkdir()
    assert other(target, ["some", 2], lambda: {"shown": [0]})["shown"] == [0]


def test_what_is_tuned_is_never_reported_nor_kept(setup):
    tuned = {t.name for t in setup.targets["tune"]}
    assert tuned and not tuned & {t.name for t in setup.targets["object"]}
    assert not tuned & {r["object"] for r in setup.pool}
    for target in (*setup.targets["object"], *setup.targets["style"]):
        places = setup.kept(target, 5)
        assert places and all(setup.pool[i][target.kind] != target.name for i in places)


def test_the_twin_that_draws_is_as_it_was_after_an_edit(setup):
    before = {k: v.clone() for k, v in setup.drawer.network.state_dict().items()}
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    target = setup.targets["object"][0]
    plan = model_selection.Key("cross_attention", 0.5).plan
    edit, _ = edit_from_scores(setup.model, measured.scores(target), plan, setup.asked(target))
    setup.measure(target, edit, (2, 2))
    assert all(torch.equal(v, before[k]) for k, v in setup.drawer.network.state_dict().items())
    setup.mirror(edit)
    for name, (index, _, _) in edit.changes.items():
        assert not setup.drawer.network.get_parameter(name).flatten()[index].any()


def test_a_control_takes_as_many_weights_of_the_same_tensors(setup):
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    target, other = setup.targets["object"][0], setup.targets["tune"][0]
    asked, among = setup.asked(target), select(setup.model.network, "cross_attention")
    elsewhere = measured.scores(other)
    scores = measured.scores(target)
    plan = model_selection.Key("cross_attention", 0.2).plan
    edit, _ = edit_from_scores(setup.model, scores, plan, asked)
    picked = {k: index for k, (index, _, _) in edit.changes.items()}
    for name in baselines.CONTROLS:
        values = baselines.ranked_by(name, setup.model, among, scores, (asked, elsewhere))
        got = baselines.same_counts(values, picked)
        assert {k: len(v) for k, v in got.items()} == {k: len(v) for k, v in picked.items()}
        assert any(not torch.equal(got[k], picked[k]) for k in picked)
        for key, index in got.items():
            chosen = torch.zeros(values[key].numel(), dtype=torch.bool)
            chosen[index] = True
            flat = values[key].flatten()
            assert chosen.all() or flat[chosen].min() >= flat[~chosen].max()


def test_wanda_norms_are_those_of_the_inputs_on_the_states(setup):
    asked = setup.asked(setup.targets["object"][0])
    among = select(setup.model.network, "cross_attention.k")
    norms = baselines.input_norms(setup.model, asked, among)
    cond, _ = asked.conditions(setup.model)  # keys see the prompt's tokens, in every state
    count = beds.SAMPLING.num_levels
    for c in among:
        wanted = (count * cond.embeddings[0].square().sum(0)).sqrt()
        torch.testing.assert_close(norms[c.name], wanted, rtol=1e-4, atol=1e-5)


def test_figures_are_those_of_unlearncanvas_as_a_share_of_the_unedited_model():
    target = beds.Target("object", "cat", "a cat")
    bare = {"object": [1, 1, 1, 0], "style": [1, 1, 0, 0]}
    cell = {"shown": [1, 0, 0, 0], "object": [1, 1, 0, 0], "style": [1, 0, 0, 0], "became": {}}
    found = result_cache.figures(target, cell, bare)
    assert found["ua"] == 0.75
    assert found["ira"] == pytest.approx(2 / 3) and found["cra"] == pytest.approx(1 / 2)


def test_a_style_has_no_say_in_its_own_ratio():
    bad, good = ({"ua": u, "ira": 1.0, "cra": 1.0} for u in (0.1, 1.0))
    one, two = model_selection.Key("paper", 0.1), model_selection.Key("paper", 0.2)
    by_plan = {one: {"a": good, "b": bad, "c": good}, two: {"a": bad, "b": good, "c": bad}}
    found = table.chosen_by_others(by_plan, "style")
    assert {name: f["plan"][1] for name, f in found.items()} == {"a": 0.1, "b": 0.1, "c": 0.1}
    by_plan[two]["b"] = bad  # what b itself would gain or lose moves the others alone
    assert table.chosen_by_others(by_plan, "style")["b"]["plan"] == list(one)
    assert table.chosen_by_others({one: {"a": bad}}, "style")["a"]["plan"] == list(one)


def test_what_shows_the_target_is_not_spared(setup):
    measured = model_selection.MeasuredEdits(setup, result_cache.MeasurementCache(setup))
    target = setup.targets["style"][0]
    key = model_selection.Key("cross_attention", 0.2, spared=1.0, others="captions")
    names = [shown for shown, _ in measured._captions]
    assert {n[1] for n in names} == {t.name for t in setup.targets["style"]}
    own = measured.scores(target).mean
    left = [need.mean for shown, need in measured._captions if target.name not in shown]
    assert 0 < len(left) < len(names)
    for name, spared in measured.spared(target, key).mean.items():
        mean = sum(need[name].abs() for need in left) / len(left)
        torch.testing.assert_close(spared, own[name] - mean)


def test_masks_are_uniform_over_all_scalars(setup):
    among = select(setup.model.network, "cross_attention")
    total = sum(c.weight.numel() for c in among)
    rng = np.random.default_rng(0)
    drawn = [baselines.random_mask(among, 0.1, rng) for _ in range(200)]
    assert {sum(map(len, d.values())) for d in drawn} == {round(0.1 * total)}
    for c in among:
        share = np.mean([len(d.get(c.name, ())) / c.weight.numel() for d in drawn])
        assert share == pytest.approx(0.1, abs=0.02)
