"""Subset plans: the same bytes every time, balanced as promised, refused where they do not fit."""

import json
from collections import Counter

import numpy as np
import pytest

from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.settings import ROOT
from experiments.truth import subsets as plans
from experiments.truth import wrong_captions as lies_test


@pytest.fixture(scope="module")
def data():
    return load_folder(ROOT / "data/emoji").split("train")


PLANS = {
    "base": lambda data: plans.base_plan(data, (0, 1)),
    "lies": lambda data: plans.lies_plan(data, (0, 1)),
    "hidden": lambda data: plans.hidden_plan(data, (0,)),
    "lds": lambda data: plans.lds_plan(data, 6, 2),
    "counterfactual": lambda data: plans.counterfactual_plan(data, {"oracle": [3, 1]}, (0, 1)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_made_again_to_the_same_bytes_and_read_as_it_was_written(name, data, tmp_path):
    first, again = PLANS[name](data), PLANS[name](data)
    first.write(tmp_path / "first.json")
    again.write(tmp_path / "again.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert plans.read_plan(tmp_path / "first.json", data) == first


def test_groups_are_disjoint_halves_that_cover_all_concepts(data):
    groups = plans.split_concepts(data)
    for kind in plans.KINDS:
        tune, report = (set(groups[group][kind]) for group in plans.GROUPS)
        assert not tune & report and tune | report == set(data.column(kind))
        assert len(tune) == len(report)


def test_every_lie_is_wrong_in_object_and_style_and_claims_what_loses_no_picture(data):
    for subset in plans.lies_plan(data, (0, 1)).subsets[::2]:
        objects, styles = (lies_test.claimed_concepts(data, subset, kind) for kind in plans.KINDS)
        rows = np.array(sorted(subset.captions))
        assert len(rows) == plans.LIES
        shown = {kind: np.array(data.column(kind))[rows] for kind in plans.KINDS}
        assert (objects[rows] != shown["object"]).all() and (styles[rows] != shown["style"]).all()
        assert not set(objects[rows]) & set(shown["object"])
        counts = Counter(objects[rows]).values(), Counter(styles[rows]).values()
        assert all(max(c) - min(c) <= 1 for c in counts)
        group = plans.split_concepts(data)["report"]["object"]
        claimed = lies_test.claimed(data, subset, "object", group)
        assert len(claimed) == len(group) // 2


def test_the_model_without_them_lacks_exactly_the_liars(data):
    lies, without = plans.lies_plan(data, (3,)).subsets
    assert sorted(lies.captions) == list(without.removed) and lies.seed == without.seed


def test_a_subset_of_the_lds_keeps_concepts_at_their_rates(data):
    """A concept whose rate is 0 is gone, one whose rate is 1 mostly stays."""
    objects = np.array(data.column("object"))
    shares = []
    for subset in plans.lds_plan(data, 12, 0).subsets:
        kept = subset.kept(len(data))
        shares += [kept[objects == name].mean() for name in set(objects)]
    assert np.mean(np.array(shares) == 0) > 0.1 and np.mean(np.array(shares) > 0.85) > 0.05
    assert 0.3 < np.mean(shares) < 0.6


def test_the_second_seed_of_the_lds_has_the_same_subsets(data):
    subsets = plans.lds_plan(data, 5, 2).subsets
    assert [s.removed for s in subsets[:2]] == [s.removed for s in subsets[5:]]
    assert [s.seed for s in subsets[5:]] == [1, 1]


def test_a_hidden_concept_is_in_no_caption_of_its_picture(data):
    for subset in plans.hidden_plan(data, (0,)).subsets:
        kind = subset.name.split("-")[1]
        told = plans.texts_of(data, subset)
        for row in subset.captions:
            phrase = data.records[row][f"{kind}_phrase"]
            assert not any(phrase == text or text.endswith(f" {phrase}") for text in told[row])
        gone = {data.records[row][kind] for row in subset.removed}
        assert gone <= set(plans.split_concepts(data)["report"][kind])


def spoiled(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_plan_that_does_not_fit_is_refused_in_one_line(data, tmp_path):
    path = tmp_path / "plan.json"
    plans.base_plan(data, (0,)).write(path)
    with pytest.raises(UserError, match="is a plan for other pictures"):
        plans.read_plan(path, data.subset(range(100)))
    subset = {"name": "x", "seed": 0, "removed": [len(data)], "captions": {}}
    with pytest.raises(UserError, match="names pictures that"):
        plans.read_plan(spoiled(path, subsets=[subset]), data)
    fine = subset | {"removed": [1]}
    odd = [{"seed": "0"}, {"seed": True}, {"seed": 1.0}, {"seed": -1}, {"removed": ["1"]}]
    odd += [{"removed": [-1]}, {"name": "../x"}, {"name": ""}, {"name": 3}, {"name": "a\x1b"}]
    odd += [{"captions": {"1": ["a", "b"]}}, {"captions": {"1": "abc"}}, {"captions": {"x": []}}]
    assert plans.read_plan(spoiled(path, subsets=[fine]), data).subsets[0].removed == (1,)
    wrongs = [[fine | change] for change in odd]
    for wrong in (*wrongs, [fine, fine], [{"name": "x"}], "no list", [fine | {"captions": [1]}]):
        with pytest.raises(UserError, match="is no plan"):
            plans.read_plan(spoiled(path, subsets=wrong), data)
    plans.lies_plan(data, (0,)).write(tmp_path / "lds.json")
    with pytest.raises(UserError, match="lds.json is the plan 'lies'"):
        plans.kept_plan(tmp_path, "lds", data)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is not JSON"):
        plans.read_plan(path, data)
    with pytest.raises(UserError, match="is missing"):
        plans.read_plan(tmp_path / "none.json", data)


def test_an_arm_that_is_named_joins_a_plan_and_nothing_else_of_it_changes(data):
    asked = []

    def make(*names):
        asked.append(names)
        arms = {f"object-{name}": [i, i + 1] for i, name in enumerate(names)}
        return plans.counterfactual_plan(data, arms, (0, 1))

    kept = make("labels", "d_trak")
    assert (
        plans.with_arms(kept, ["d_trak"], lambda: make("d_trak", "new")) is kept and len(asked) == 1
    )
    grown = plans.with_arms(kept, ["d_trak", "new"], lambda: make("d_trak", "other", "new"))
    assert grown.subsets[:4] == kept.subsets
    assert [s.name for s in grown.subsets[4:]] == ["object-new-0", "object-new-1"]
    assert grown.subsets[4].removed == (2, 3)
