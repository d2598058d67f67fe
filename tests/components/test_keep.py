"""Scores on the disk: what is read back is what was written, or one line that names what is not."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from concept_trak.components.parameter_groups import select
from concept_trak.components.score_io import FACTS, TENSORS, load_scores, save_scores
from concept_trak.components.scores import Scores
from concept_trak.errors import UserError


@pytest.fixture
def kept(tiny_denoiser, tmp_path):
    """(folder, what was kept in it, its components)."""
    among = select(tiny_denoiser.network, "cross_attention")
    g = torch.Generator().manual_seed(0)
    mean = {c.name: torch.randn(c.weight.shape, generator=g) for c in among}
    stderr = {name: value.abs() for name, value in mean.items()}
    scores = Scores("erase", mean, stderr, [900, 100], np.ones((2, len(among))))
    save_scores(tmp_path, scores, among)
    return tmp_path, scores, among


def test_scores_come_back_as_they_were(kept):
    folder, scores, among = kept
    for found in (load_scores(folder), load_scores(folder, among)):
        assert found.names() == scores.names() and found.levels == scores.levels
        assert all(torch.equal(found.mean[n], scores.mean[n]) for n in scores.mean)
        assert all(torch.equal(found.stderr[n], scores.stderr[n]) for n in scores.mean)
    facts = json.loads((folder / FACTS).read_text())
    del facts["sha256"]  # as before digests were kept
    (folder / FACTS).write_text(json.dumps(facts))
    assert load_scores(folder).names() == scores.names()


def first(tensors, kind="mean"):
    return next(name for name in tensors if name.startswith(kind))


TENSOR_SPOILS = {
    "one is missing": lambda t: t.pop(first(t)),
    "one too many": lambda t: t.update({"mean/none": torch.zeros(2)}),
    "whole numbers": lambda t: t.update({first(t): t[first(t)].long()}),
    "doubles": lambda t: t.update({first(t): t[first(t)].double()}),
    "another shape of the error": lambda t: t.update({first(t, "stderr"): torch.zeros(1)}),
    "NaN": lambda t: t[first(t)].mul_(torch.nan),
    "other values": lambda t: t[first(t)].neg_(),
}
FACT_SPOILS = (
    *({"names": []}, {"names": "mid"}, {"names": [1]}, {"names": None}, {"aim": "destroy"}),
    *({"aim": ["erase"]}, {"levels": []}, {"levels": ["1", "2"]}, {"levels": [1]}, {"profile": 3}),
    *({"profile": [[1.0], [1.0]]}, {"profile": [[1.0], [1.0, 2.0]]}, {"sha256": "0"}),
)


@pytest.mark.parametrize("spoil", TENSOR_SPOILS)
def test_other_tensors_are_one_line(spoil, kept):
    folder, *_ = kept
    tensors = load((folder / TENSORS).read_bytes())
    TENSOR_SPOILS[spoil](tensors)
    (folder / TENSORS).write_bytes(save(tensors))
    refused(folder)


@pytest.mark.parametrize("spoil", FACT_SPOILS, ids=str)
def test_other_facts_are_one_line(spoil, kept):
    folder, *_ = kept
    facts = json.loads((folder / FACTS).read_text()) | spoil
    (folder / FACTS).write_text(json.dumps(facts))
    refused(folder)


def test_scores_of_other_weights_are_one_line(kept, tiny_denoiser):
    folder, _, among = kept
    refused(folder, among[1:])
    refused(folder, select(tiny_denoiser.network, "feed_forward"))


def refused(folder, among=()):
    with pytest.raises(UserError, match=r"scores.*; make the scores again") as told:
        load_scores(folder, among)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)
