"""Edits: the published rule, exact undo, stacks, other models, operators."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from concept_trak.components.concept_plan import (
    ComponentQuery,
    attribute_components,
    edit_from_scores,
    plan_of,
)
from concept_trak.components.edit_operators import Operator
from concept_trak.components.edits import FIELDS, EditedNetwork, load_edit, make_edit, save_edit
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import Scores
from concept_trak.components.selection import SelectionRule, choose
from concept_trak.components.states import Sampling
from concept_trak.errors import UserError

ASKED = ComponentQuery("a cat", num_seeds=1, sampling=Sampling(3.0, 5, 5))


def bits(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def literal_mask(weight, gradient, ratio):
    """The published rule, row by row, in plain Python: positions that are zeroed."""
    gone = set()
    for i, (w, g) in enumerate(zip(weight.tolist(), gradient.tolist(), strict=True)):
        scores = [a * b for a, b in zip(w, g, strict=True)]
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        for j in order[: int(ratio * len(scores))]:
            if not scores[j] < 0:
                gone.add(i * len(scores) + j)
    return gone


@pytest.mark.parametrize("name", ["erase", "amplify"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.7])
def test_preset_paper_zeroes_what_the_literal_rule_does(tiny_model, name, ratio):
    aim, network = COMPONENT_OBJECTIVES[name], tiny_model.network
    among = select(network, "paper")
    found = attribute_components(tiny_model, ASKED, aim, among)
    edit, _ = edit_from_scores(
        tiny_model, found, plan_of("paper", ratio, "scalar", Operator()), ASKED
    )
    # gradients by plain autograd: of J for erasing, of +L for amplifying, summed over the states
    seen = ASKED.states(tiny_model, aim, 0)
    weights = [c.weight.requires_grad_() for c in among]
    total = 0
    for s in seen:
        eps_hat = tiny_model.eps(s.x_t, s.t, s.cond)
        if name == "erase":
            base = tiny_model.eps(s.x_t, s.t, s.cond_neg).detach()
            total = total + (base - eps_hat).square().sum()
        else:
            total = total + (eps_hat - s.eps).square().mean()
    gradients = torch.autograd.grad(total, weights)
    for c, g in zip(among, gradients, strict=True):
        c.weight.requires_grad_(False)
        wanted = literal_mask(c.weight, g, ratio)
        got = edit.changes.get(c.name, (torch.zeros(0),))[0].long().tolist()
        assert len(wanted ^ set(got)) <= 0.01 * len(wanted)  # ties of the last bit


def test_the_published_rounding_is_told_and_never_a_silent_no_op(tiny_model):
    among = select(tiny_model.network, "paper")
    shapes = {c.name: torch.ones(c.weight.shape) for c in among}
    scores = Scores("erase", shapes, shapes, [1], np.zeros((1, len(among))))
    with pytest.raises(UserError, match="RATIO=0.001 edits nothing: the published rule rounds"):
        choose(scores, among, SelectionRule(0.001, paper=True))
    found = choose(
        scores, among, SelectionRule(1 / 32, paper=True)
    )  # rows of 8: none; rows of 32: one
    assert found.untouched == tuple(c.name for c in among if c.weight.shape[1] < 32)
    assert choose(scores, among, SelectionRule(1e-6)).count == 1  # ours takes at least one


@pytest.mark.parametrize("granularity", ["scalar", "row", "column", "head", "module"])
def test_a_choice_is_of_whole_groups_the_best_first_within_the_ratio(tiny_model, granularity):
    among = select(tiny_model.network, "cross_attention")
    g = torch.Generator().manual_seed(0)
    values = {c.name: torch.randn(c.weight.shape, generator=g) for c in among}
    scores = Scores("erase", values, values, [1], np.zeros((1, len(among))))
    found = choose(scores, among, SelectionRule(0.3, granularity))
    assert 0 < found.count <= max(0.3 * found.among + 1, max(c.weight.numel() for c in among))
    taken, left = [], []
    for c in among:
        mask = torch.zeros(c.weight.numel(), dtype=torch.bool)
        mask[found.picked.get(c.name, torch.zeros(0, dtype=torch.long))] = True
        groups = c.grouped(mask.reshape(c.weight.shape), granularity)
        assert (groups.all(1) | ~groups.any(1)).all()
        means = c.grouped(values[c.name], granularity).mean(1)
        taken += means[groups.all(1)].tolist()
        left += means[~groups.any(1)].tolist()
    assert min(taken) > 0 and min(taken) >= max(left, default=-9) - 1e-6


def test_apply_and_undo_are_exact_whatever_is_stacked(tiny_model, tmp_path):
    network = tiny_model.network
    before = bits(network)
    found = attribute_components(
        tiny_model, ASKED, COMPONENT_OBJECTIVES["erase"], select(network, "cross_attention")
    )
    plans = [
        plan_of("cross_attention", 0.2, "scalar", Operator("zero")),
        plan_of("cross_attention", 0.3, "row", Operator("scale", 0.5)),
    ]
    edits = [edit_from_scores(tiny_model, found, plan, ASKED)[0] for plan in plans]
    for i, edit in enumerate(edits):
        save_edit(tmp_path / f"{i}.safetensors", edit)
        again = load_edit(tmp_path / f"{i}.safetensors")
        assert again.digest() == edit.digest()
        edits[i] = again
    with EditedNetwork(network) as edited:
        edited.apply(edits[0])
        first = bits(network)
        edited.apply(edits[1])
        assert not same(first, bits(network))
        edited.undo()
        assert same(first, bits(network)) and not same(before, first)
    assert same(before, bits(network))
    with pytest.raises(UserError, match="no edit to undo"):
        edited.undo()


def test_an_edit_of_another_model_or_a_damaged_file_is_refused(
    tiny_model, other_pipeline, tmp_path
):
    from concept_trak.models.text_to_image import load_pipeline

    found = attribute_components(
        tiny_model, ASKED, COMPONENT_OBJECTIVES["erase"], select(tiny_model.network, "feed_forward")
    )
    plan = plan_of("feed_forward", 0.1, "scalar", Operator())
    edit, _ = edit_from_scores(tiny_model, found, plan, ASKED)
    other = load_pipeline(str(other_pipeline))
    before = bits(other.network)
    with pytest.raises(UserError, match="was made for another model"):
        EditedNetwork(other.network).apply(edit)
    assert same(before, bits(other.network))
    path = tmp_path / "edit.safetensors"
    save_edit(path, edit)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError):
        load_edit(path)
    with pytest.raises(UserError):
        load_edit(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["zero", "scale", "mean", "gradient"])
def test_an_operator_does_what_it_says_and_touches_nothing_else(tiny_model, name):
    network = tiny_model.network
    before = bits(network)
    found = attribute_components(
        tiny_model, ASKED, COMPONENT_OBJECTIVES["erase"], select(network, "cross_attention")
    )
    plan = plan_of("cross_attention", 0.2, "scalar", Operator(name, 0.25))
    edit, chosen = edit_from_scores(tiny_model, found, plan, ASKED)
    assert same(before, bits(network)) and edit.count == chosen.count
    for key, (index, old, new) in edit.changes.items():
        weight = before[key].flatten()
        assert torch.equal(weight[index], old)
        if name == "zero":
            assert not new.any()
        if name == "scale":
            torch.testing.assert_close(new, 0.75 * old)
        if name == "mean":
            rows = before[key].mean(1)
            torch.testing.assert_close(new, rows[index // before[key].shape[1]])
    if name == "gradient":
        aim, seen = (
            COMPONENT_OBJECTIVES["erase"],
            ASKED.states(tiny_model, COMPONENT_OBJECTIVES["erase"], 0),
        )
        targets = [aim.target(tiny_model, s) for s in seen]
        unedited = mean_value(aim, tiny_model, seen, targets)
        with EditedNetwork(network) as edited:
            edited.apply(edit)
            assert mean_value(aim, tiny_model, seen, targets) < unedited


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(tiny_model, ratio):
    among = select(tiny_model.network, "cross_attention")
    values = {c.name: torch.ones(c.weight.shape) for c in among}
    scores = Scores("erase", values, values, [1], np.zeros((1, len(among))))
    with pytest.raises(UserError, match="RATIO"):
        choose(scores, among, SelectionRule(ratio))
    values[among[0].name][0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        choose(scores, among, SelectionRule(0.1))


def test_an_edit_can_be_made_of_nothing_but_positions_and_values(tiny_model):
    name = select(tiny_model.network, "feed_forward")[0].name
    edit = make_edit(tiny_model.network, {name: torch.ones(2)}, {name: torch.tensor([0, 3])})
    with EditedNetwork(tiny_model.network) as edited:
        edited.apply(edit)
        assert edited.network.get_parameter(name).flatten()[[0, 3]].tolist() == [1, 1]


# what may be wrong with an edit of the right model: (index, old, new) -> the same
INDEX, OLD, NEW = range(3)
SPOILS = {
    "beyond the weight": (INDEX, lambda x: x + 10**9),
    "negative": (INDEX, lambda x: x - 1),
    "one twice": (INDEX, lambda x: x * 0),
    "positions as floats": (INDEX, lambda x: x.float()),
    "positions of 32 bits": (INDEX, lambda x: x.int()),
    "a mask": (INDEX, lambda x: x.bool()),
    "two dimensions": (INDEX, lambda x: x[None]),
    "one value for all": (NEW, lambda x: x[0]),
    "too few values": (NEW, lambda x: x[:2]),
    "whole numbers": (NEW, lambda x: x.long()),
    "halves": (NEW, lambda x: x.half()),
    "brain floats": (NEW, lambda x: x.bfloat16()),
    "infinite": (NEW, lambda x: x + torch.inf),
    "NaN": (OLD, lambda x: x * torch.nan),
    "other old values": (OLD, lambda x: x + 1),
}
FACTS = {
    "a list": {"about": "[1]"},
    "deep": {"about": "[" * 100_000},
    "a key twice": {"about": '{"a": 1, "a": 2}'},
    "a number that is none": {"about": '{"a": NaN}'},
    "another digest": {"digest": "0" * 64},
}


def small_edit(network, count=4):
    name = select(network, "feed_forward")[0].name
    index = torch.arange(count)
    return make_edit(network, {name: torch.zeros(count)}, {name: index}), name


def write(path, edit, **facts):
    """A file as anyone may make it, its digest that of its content."""
    tensors = {
        f"{name}/{part}": value.contiguous()
        for name, values in edit.changes.items()
        for part, value in zip(FIELDS, values, strict=True)
    }
    told = {"model": edit.model, "digest": edit.digest(), "about": json.dumps(edit.about)}
    path.write_bytes(save(tensors, told | facts))
    return path


def refused(path, network, *words):
    """One line that names the file, and nothing is written."""
    before = bits(network)
    with EditedNetwork(network) as edited, pytest.raises(UserError) as told:
        edited.apply(load_edit(path))
    assert same(before, bits(network))
    said = str(told.value)
    assert "\n" not in said and len(said) < 600
    assert [word for word in (str(path), *words, "run_erase.sh") if word not in said] == []


@pytest.mark.parametrize("spoil", SPOILS)
def test_an_edit_that_does_not_fit_its_model_is_one_line_and_changes_nothing(
    spoil, tiny_model, tmp_path
):
    edit, name = small_edit(tiny_model.network)
    part, change = SPOILS[spoil]
    values = list(edit.changes[name])
    values[part] = change(values[part])
    spoiled = replace(edit, changes={name: tuple(values)})
    refused(write(tmp_path / "edit.safetensors", spoiled), tiny_model.network, name)


@pytest.mark.parametrize("spoil", FACTS)
def test_an_edit_whose_record_does_not_fit_is_one_line(spoil, tiny_model, tmp_path):
    edit, _ = small_edit(tiny_model.network)
    refused(write(tmp_path / "edit.safetensors", edit, **FACTS[spoil]), tiny_model.network)


def test_an_edit_of_other_names_or_of_nothing_is_one_line(tiny_model, tmp_path):
    network = tiny_model.network
    edit, name = small_edit(network)
    path = tmp_path / "edit.safetensors"
    for other in ("mid.none.weight", "", f"{name}/index", "conv_norm_out.running_mean"):
        changes = {other: edit.changes[name]}
        refused(write(path, replace(edit, changes=changes)), network, repr(other))
    tensors = {f"{name}/{part}": v for part, v in zip(FIELDS, edit.changes[name], strict=True)}
    told = {"model": edit.model, "digest": edit.digest(), "about": "{}"}
    for more in ({f"{name}/more": torch.zeros(4)}, {"loose": torch.zeros(4)}):
        path.write_bytes(save(tensors | more, told))
        refused(path, network)
    for part in FIELDS:
        path.write_bytes(save({k: v for k, v in tensors.items() if not k.endswith(part)}, told))
        refused(path, network, f"{name}/{part}")
    path.write_bytes(save(tensors))
    refused(path, network, "is no edit")
    none = tuple(v[:0] for v in edit.changes[name])
    for changes in ({}, {name: none}):
        refused(write(path, replace(edit, changes=changes)), network)


def test_old_values_are_the_models_or_those_of_an_edit_before(tiny_model, tmp_path):
    """Edits of one model stack in any order; one that was made on others follows them."""
    network = tiny_model.network
    first, name = small_edit(network, 4)
    second, _ = small_edit(network, 2)
    with EditedNetwork(network) as edited:
        edited.apply(first)
        third = make_edit(network, {name: torch.ones(3)}, {name: torch.arange(3)}, edited.base)
    for stack in ((first, second), (second, first), (first, third), (first, second, third)):
        with EditedNetwork(network) as edited:
            for edit in stack:
                edited.apply(edit)
    path = tmp_path / "third.safetensors"
    save_edit(path, third)
    refused(path, network, name, "EDITS")


def test_new_values_that_the_network_cannot_hold_are_refused(tiny_model):
    network = tiny_model.network
    edit, name = small_edit(network)
    index, old, new = edit.changes[name]
    large = replace(edit, changes={name: (index, old, new + 1e6)})
    network = copy.deepcopy(network).half()  # the other belongs to all tests
    with pytest.raises(UserError, match="cannot hold"):
        EditedNetwork(network, edit.model).apply(large)
    EditedNetwork(network, edit.model).apply(edit)
