"""The tables of the bench of truth: figures that can be counted by hand, and the commands on what
is committed.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from concept_trak import cli
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.settings import DAMPINGS, ROOT, resolve
from experiments.truth import (
    concept_likelihood,
    counterfactual,
    lds,
    omitted_captions,
    setup,
    wrong_captions,
)
from experiments.truth import subsets as plans
from experiments.truth.subsets import (
    RetrainingPlan,
    Subset,
    counterfactual_plan,
    hidden_plan,
    lies_plan,
    split_concepts,
)
from experiments.truth.train_many import load_measurements


@pytest.fixture(scope="module")
def data():
    return load_folder(ROOT / "data/emoji").split("train")


@pytest.fixture(scope="module")
def subset(data):
    return lies_plan(data, (0,)).subsets[0]


def scores_of(data, subset, kind, names, lie, honest, unrelated):
    """[C, N]: one value for each of the three groups."""
    said, shown = wrong_captions.claimed_concepts(data, subset, kind), np.array(data.column(kind))
    rng = np.random.default_rng(0)
    out = np.full((len(names), len(data)), float(unrelated)) + 1e-3 * rng.random(len(data))
    for row, name in zip(out, names, strict=True):
        row[(shown == name) & (said == "")] += honest - unrelated
        row[said == name] += lie - unrelated
    return out


@pytest.mark.parametrize(
    "lie, honest, unrelated, wanted",
    [
        (-1, 1, 0, {"auc": 1, "auc_unrelated": 1, "lies_in_top10": 0, "recall_at_10": 1}),
        (2, 1, 0, {"auc": 0, "auc_unrelated": 0, "lies_in_top10": 1}),
        (0.5, 1, 0, {"auc": 1, "auc_unrelated": 0, "recall_at_10": 1}),
    ],
)
def test_figures_of_lies_are_those_counted_by_hand(data, subset, lie, honest, unrelated, wanted):
    names = wrong_captions.claimed(data, subset, "object", sorted(set(data.column("object"))))
    scores = scores_of(data, subset, "object", names, lie, honest, unrelated)
    found = wrong_captions.figures(scores, data, subset, "object", names)
    assert {figure: found[figure].mean() for figure in wanted} == pytest.approx(wanted)


def test_swapped_groups_are_noticed(data, subset):
    names = wrong_captions.claimed(data, subset, "object", sorted(set(data.column("object"))))
    scores = scores_of(data, subset, "object", names, -1, 1, 0)
    found = wrong_captions.figures(np.roll(scores, 1, 0), data, subset, "object", names)
    assert found["recall_at_10"].mean() < 0.2 and abs(found["auc"].mean() - 0.5) < 0.2


def presences(held_out, **by_kind):
    """Presences of these values for every held-out picture's concept."""
    losses = np.zeros((len(held_out), len(concept_likelihood.LEVELS), 4))
    at = concept_likelihood.PROMPTS.index
    losses[:, :, at("style")], losses[:, :, at("object")] = by_kind["object"], by_kind["style"]
    return concept_likelihood.ConceptMeasurements(losses, {})


def test_harm_is_what_claimed_concepts_lost(data, subset):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    said = set(wrong_captions.claimed_concepts(data, subset, "object"))
    lost = np.array([-0.5 if name in said else 0.0 for name in held_out.column("object")])
    without = presences(held_out, object=1.0, style=1.0)
    told = presences(held_out, object=1 + lost[:, None], style=1.0)
    found = wrong_captions.effect_on_claimed(told, without, held_out, data, subset)
    assert found["object"]["claimed"]["mean"] == -0.5 and found["object"]["relative"] == -0.5
    assert found["object"]["others"]["mean"] == 0 and found["style"]["claimed"]["mean"] == 0


def test_a_hidden_concept_is_found_by_what_pictures_show_or_not_at_all(data):
    subset = hidden_plan(data, (0,)).subsets[2]  # of the style
    names = sorted(set(data.column("style")))
    shown = np.stack([np.array(data.column("style")) == name for name in names]).astype(float)
    told = shown.copy()
    told[:, list(subset.captions)] = 0  # a ranking that only reads
    told += 1e-3 * np.random.default_rng(0).random(told.shape)
    looking, reading = (omitted_captions.figures(s, data, subset, names) for s in (shown, told))
    assert all(looking[figure].min() > 0.999 for figure in omitted_captions.FIGURES)
    assert reading["auc_told"].mean() == pytest.approx(1)
    assert abs(reading["auc_hidden"].mean() - 0.5) < 0.05


def test_what_hidden_pictures_taught_is_what_the_model_without_them_lacks(data):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    gone_names = split_concepts(data)["report"]["style"]
    lost = np.array([0.4 if name in gone_names else 0.0 for name in held_out.column("style")])
    learned = presences(held_out, object=0.0, style=1.0)
    gone = presences(held_out, object=0.0, style=1 - lost[:, None])
    found = omitted_captions.presence_lost("style", learned, gone, data, held_out)
    assert found == {"tune": 0.0, "report": 0.4}


def test_removing_what_taught_a_concept_is_a_drop_and_nothing_else_is(data):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    names = counterfactual.targets(data, "object")
    shown = np.array(data.column("object"))
    scores = {"concept_trak": np.stack([shown == name for name in names]).astype(float)}
    arms = counterfactual.removal_sets(data, "object", scores, "concept_trak")
    labels = [i for i, name in enumerate(shown) if name in names]
    assert arms["object-concept_trak"] == arms["object-labels"] == labels
    assert not set(arms["object-least"]) & set(labels[:7])
    lost = np.array([0.8 if name in names else 0.0 for name in held_out.column("object")])
    whole = {0: presences(held_out, object=1.0, style=1.0)}
    after = presences(held_out, object=1 - lost[:, None], style=1.0)
    plan = counterfactual_plan(data, arms, (0,))
    for p in (*whole.values(), after):
        p.judged.update({kind: np.ones(len(held_out)) for kind in ("object", "style")})
    nothing = presences(held_out, object=1.0, style=1.0)
    nothing.judged.update(whole[0].judged)
    after.judged.update({kind: np.full(len(held_out), 0.25) for kind in ("object", "style")})
    models = {s.name: nothing if "random" in s.name else after for s in plan.subsets}
    ours = "concept_trak"
    arms = counterfactual.presence_drops(plan, models, whole, data, held_out, ours)["object"]
    found = arms["labels"]
    assert (found["target_drop"], found["untouched_drop"], found["other_drop"]) == (0.8, 0, 0)
    assert found["judge_drop"] == 0.75 and found["removed"] == len(labels)
    assert arms[ours]["share_of_oracle"] == 1 and arms[ours]["behind_ours"] == 0
    assert arms["random"]["share_of_oracle"] == 0 and arms["random"]["oracle_drop"] == 0.8
    assert arms["random"]["behind_ours"] == 0.8 == arms["random"]["behind_ours_ci95"][0]
    assert arms["random"]["judge_behind_ours"] == 0.75 and arms["labels"]["judge_behind_ours"] == 0
    assert arms["random"]["judge_share_of_oracle"] == 0 and arms[ours]["judge_share_of_oracle"] == 1


def test_the_noise_of_a_drop_is_that_of_a_difference_of_two_seeds(data):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    whole = {seed: presences(held_out, object=1 + 0.1 * seed, style=1.0) for seed in (0, 1)}
    found = counterfactual.seed_noise(whole, data, held_out)
    assert found["object"]["target_drop"] == pytest.approx(0.1 / 1.05, abs=1e-4)
    assert found["object"]["other_drop"] == 0  # of styles, which did not change
    assert counterfactual.seed_noise({0: whole[0]}, data, held_out) == {
        "object": None,
        "style": None,
    }


def measured(values, kept, relevant):
    names = [str(i) for i in range(len(relevant))]
    return lds.GroundTruth(names, kept, values, relevant)


def test_presence_falls_with_the_pictures_that_taught_it_and_not_with_others():
    rng = np.random.default_rng(0)
    kept, relevant = rng.random((40, 60)) < 0.5, np.zeros((6, 60), dtype=bool)
    relevant[:, :7] = True
    presences_ = (
        kept @ relevant.T.astype(float)
    ) / 3.5  # all that is known of a concept is its seven pictures
    truth = measured(presences_, kept, relevant)
    knows = lds.presence_vs_removed(relevant.astype(float), truth, 7, 2.0)
    assert knows.mean == pytest.approx(1 - knows.removed / 7) and knows.top == 7
    others = np.roll(relevant, 20, 1).astype(float)
    blind = lds.presence_vs_removed(others, truth, 7, 2.0)
    assert np.ptp(blind.mean[1:-1]) < 0.15 < np.ptp(knows.mean)
    whole = lds.predictions(relevant.astype(float), truth)
    assert whole.predicted == pytest.approx(whole.measured) and whole.lds == pytest.approx(1)
    assert whole.partial == 0  # counting explains all of it


def test_the_ceiling_is_the_correlation_of_two_seeds(data):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    rng, names = np.random.default_rng(0), ["cat", "dog"]
    subsets = [Subset(f"lds-{i}-{seed}", seed, (i,)) for seed in (0, 1) for i in range(8)]
    plan, found = RetrainingPlan("lds", "", tuple(subsets)), {}
    for i in range(8):
        value = rng.random()
        for seed in (0, 1):
            found[f"lds-{i}-{seed}"] = presences(held_out, object=value + seed, style=0.0)
    assert lds.seed_agreement(plan, found, held_out, "object", names) == pytest.approx([1, 1])
    with pytest.raises(UserError, match="no subset was trained with two seeds"):
        lds.seed_agreement(
            RetrainingPlan("lds", "", tuple(subsets[:8])), found, held_out, "object", names
        )


@pytest.mark.parametrize("controls", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("test", ["lies", "hidden", "lds", "counterfactual"])
def test_the_command_makes_its_table_from_what_is_committed(
    test, controls, tmp_path, capsys, monkeypatch
):
    """By text alone, which needs no rows: it believes every lie, and counts labels."""
    if not controls:  # which look at every picture
        monkeypatch.setattr(setup, "chosen_rankers", lambda named: [named])
    place = f"--truth-dir={tmp_path}"
    methods = "--methods=caption_similarity"
    assert cli.main(["truth", "--test", test, "--device=cpu", place, methods]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if test == "lies":
        told = found["trained"]["object"]["caption_similarity"]
        assert told["lies_in_top10"] > 0.9 and told["auc_unrelated"] < 0.1
        assert {"untrained", "harm"} <= set(found)
    elif test == "hidden":
        for kind in ("object", "style"):
            told = found[kind]["caption_similarity"]
            assert told["auc_told"] > 0.95 and abs(told["auc_hidden"] - 0.5) < 0.1
        assert {effect["kind"] for effect in found["taught"]} == {"object", "style"}
    elif test == "counterfactual":
        assert found["labels"]["target_drop"] > 5 * abs(found["random"]["target_drop"])
        assert {"concept_trak", "least", "targets"} <= set(found)
    else:
        assert found["labels"]["partial"] == found["labels"]["style"]["partial"] == 0
        assert found["labels"]["lds"] > 0.1 and found["subsets"] >= 3 and "ceiling" in found
    (folder,) = (f for f in (tmp_path / "tables").iterdir() if not f.is_symlink())
    plots = {"lds": {"predicted.png", "removed.png"}, "counterfactual": {"drops.png", "drawn.png"}}
    wanted = {"metrics.json", "table.md"} | plots.get(test, set())
    assert wanted == {p.name for p in folder.iterdir()}
    for picture in folder.glob("*.png"):
        with Image.open(picture) as shown:
            assert min(shown.size) > 300 and np.ptp(np.asarray(shown.convert("L"))) > 200


def test_the_fit_of_pictures_is_the_one_beside_their_rows(tmp_path):
    from concept_trak.attribution.methods import open_or_compute_store
    from concept_trak.attribution.task import AttributionTask
    from experiments.truth.tables.lies import llr_of

    task = AttributionTask(tables_settings(tmp_path), "cpu")
    rows = range(30, 34)
    beside = open_or_compute_store(task).losses()[rows.start : rows.stop]
    assert llr_of(task, rows) == pytest.approx(beside, rel=1e-3, abs=1e-6)


def test_rivals_choose_and_ours_has_the_damping_of_the_settings():
    class Set:
        settings = resolve("emoji", {"damping": 1.0})

    swept, steps, single = (np.zeros((count, 1, 1)) for count in (len(DAMPINGS), 3, 1))
    at = [setup.damping_of("trak", Set, values, lambda: 2) for values in (swept, steps, single)]
    assert at == [2, 2, 0]
    assert DAMPINGS[setup.damping_of(setup.OURS, Set, swept, lambda: 2)] == 1.0
    assert setup.damping_of(setup.OURS, Set, single, lambda: 2) == 0


def test_presences_of_another_subset_are_refused(data, tmp_path, monkeypatch):
    """A plan that changed after its models were measured."""
    plan = lies_plan(data, (0,))
    other = RetrainingPlan("lies", plan.data, (Subset("lies-0", 0, (1, 2)),))
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    task = type("Corpus", (), {"settings": tables_settings(tmp_path)})
    with pytest.raises(UserError, match="is of another subset or other settings"):
        load_measurements(setup.bench_of(task), other, held_out)
    with pytest.raises(UserError, match="is missing"):
        load_measurements(
            setup.bench_of(task), RetrainingPlan("lies", plan.data, (Subset("no", 0),)), held_out
        )


def test_a_model_that_its_presences_were_not_measured_on_is_refused(tmp_path, monkeypatch):
    from concept_trak.attribution.task import AttributionTask

    task = AttributionTask(tables_settings(tmp_path), "cpu")
    base = setup.base_of(task)
    assert setup.model_of(task, "base", base.subsets[0]).weight_hash()
    monkeypatch.setattr(setup, "KEPT", tmp_path)
    path = setup.bench_of(task).presences("base", base.subsets[0])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"made_from": {"weights": "of another"}}))
    with pytest.raises(UserError, match="was measured on another model of base-0"):
        setup.model_of(task, "base", base.subsets[0])


def test_presences_of_another_plan_or_seed_are_refused(data, tmp_path, monkeypatch):
    held_out = load_folder(ROOT / "data/emoji").split("held_out")
    plan = plans.kept_plan(setup.KEPT / "plans", "lds", data)
    pair = tuple(s for s in plan.subsets if s.name in ("lds-0-0", "lds-0-1"))
    kept = setup.KEPT / "presences"
    task = type("Corpus", (), {"settings": tables_settings(tmp_path)})
    monkeypatch.setattr(setup, "KEPT", tmp_path)
    folder = tmp_path / "presences/lds"
    folder.mkdir(parents=True)

    def put(**files):
        for name, source in files.items():
            (folder / f"{name.replace('_', '-')}.json").write_bytes((kept / source).read_bytes())
        return load_measurements(setup.bench_of(task), replace(plan, subsets=pair), held_out)

    one, other = "lds/lds-0-0.json", "lds/lds-0-1.json"
    assert len(put(lds_0_0=one, lds_0_1=other)) == 2
    swaps = {"lds_0_0": other, "lds_0_1": one}, {"lds_0_0": "base/base-0.json", "lds_0_1": other}
    for swap in (*swaps, {"lds_0_0": one, "lds_0_1": "lies/lies-0.json"}):
        with pytest.raises(UserError, match=r"is of another subset .* lds-0-\d with seed \d"):
            put(**swap)


def tables_settings(folder):
    from concept_trak.settings import resolve

    return resolve("emoji", {"truth_dir": str(folder)})
