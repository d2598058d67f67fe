"""What a recipe costs, counted on a small network, is what the published numbers say."""

import torch

from concept_trak.settings import resolve
from experiments.scale import cost, sd14


def test_the_published_code_costs_134_forwards_an_image_and_ours_109():
    assert cost.count_literal() == 134
    assert cost.count_train(resolve("abc", {})) == 109


def test_forwards_of_a_query_grow_with_its_draws():
    one, two = (cost.count_query(resolve("abc", {"epochs": n})) for n in (1, 2))
    assert two == 2 * one == 144


def test_counting_leaves_autograd_as_it_was():
    before = torch.autograd.grad
    cost.count_train(resolve("own", {}))
    assert torch.autograd.grad is before


def test_hours_are_flop_over_speed():
    hours = sd14.gpu_hours(100, 0.8e12)
    assert hours["A100, 125 TFLOP/s"] == round(100 * 0.8e12 * 1e5 / 125e12 / 3600, 1)


def test_a_forward_pass_of_sd14_is_four_fifths_of_a_teraflop():
    assert 0.78e12 < sd14.count_flop() < 0.82e12
