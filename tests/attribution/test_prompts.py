"""Targets, negatives and folder names from words."""

import doctest

import pytest

from concept_trak.attribution import prompts
from concept_trak.attribution.prompts import (
    negative_of,
    negatives,
    query_slug,
    slug,
    split_list,
    target_slug,
)
from concept_trak.errors import UserError


def test_examples_of_the_docstrings():
    assert doctest.testmod(prompts).attempted > 0 and doctest.testmod(prompts).failed == 0


@pytest.mark.parametrize(
    "prompt,target,want",
    [
        ("Pikachu in the style of Pablo Picasso", "Pablo Picasso", "Pikachu"),
        ("Pikachu in the style of Pablo Picasso", "Pikachu", "in the style of Pablo Picasso"),
        ("an elephant in the style of openmoji line", "elephant", "in the style of openmoji line"),
        ("a dog and a cat", "dog", "a cat"),
        ("a dog and a cat", "cat", "a dog"),
        ("a dog and a cat", "a dog", "a cat"),
        ("a cat", "cat", ""),
        ("cat", "cat", ""),
        ("A Cat", "cat", ""),
        ("a house, painted by Monet", "Monet", "a house"),
        ("a red cat, a blue dog", "cat", "a red, a blue dog"),
        ("a cat, a dog in the style of blob", "in the style of blob", "a cat, a dog"),
    ],
)
def test_negative_is_the_prompt_without_the_target_and_the_words_that_led_to_it(
    prompt, target, want
):
    assert negative_of(prompt, target) == want


def test_target_equal_to_the_prompt_leaves_nothing():
    assert negative_of("in the style of blob", "in the style of blob") == ""


def test_a_target_is_whole_words():
    with pytest.raises(UserError, match="'cat' is not in the prompt"):
        negative_of("a category of things", "cat")
    assert (
        negative_of("a c++ (1998) book", "c++ (1998)") == "a book"
        or negative_of("a c++ (1998) book", "c++ (1998)") == "book"
    )


@pytest.mark.parametrize(
    "prompt,target,message",
    [
        ("", "cat", "PROMPT is empty"),
        ("  ", "cat", "PROMPT is empty"),
        ("a cat", "", "empty concept"),
        ("a cat", "dog", "not in the prompt"),
    ],
)
def test_empty_prompts_empty_targets_and_absent_targets_are_refused(prompt, target, message):
    with pytest.raises(UserError, match=message):
        negative_of(prompt, target)


def test_lists_are_cut_at_pipes_or_else_at_commas():
    assert split_list("a, b ,c") == ["a", "b", "c"]
    assert split_list("a cat, sitting | blob") == ["a cat, sitting", "blob"]
    assert split_list("|x") == ["", "x"]


def test_given_negatives_are_used_and_must_be_as_many_as_the_targets():
    prompt = "a dog and a cat"
    assert negatives(prompt, ["dog", "cat"], "") == ["a cat", "a dog"]
    assert negatives(prompt, ["dog", "cat"], "x|y") == ["x", "y"]
    assert negatives(prompt, ["dog", "cat"], "|y") == ["", "y"]
    with pytest.raises(UserError, match="3 items for 2 targets"):
        negatives(prompt, ["dog", "cat"], "x,y,z")


def test_the_negative_of_a_single_target_may_hold_commas():
    assert negatives("a dog and a cat", ["dog"], "a cat, sitting") == ["a cat, sitting"]


def test_an_absent_target_is_refused_even_when_negatives_are_given():
    with pytest.raises(UserError, match="bird"):
        negatives("a dog and a cat", ["bird"], "x")


def test_slugs_are_those_of_the_reference_and_never_shared_by_two_targets():
    assert slug("Pablo Picasso", 32) == target_slug("Pablo Picasso") == "pablo-picasso"
    assert query_slug("Pikachu in the style of Pablo Picasso").startswith(
        "pikachu-in-the-style-of-pablo-picasso-"
    )
    long = "a very long concept of more than thirty-two letters"
    names = ["猫", "犬", "c++", "c", long, long + " too", "Pablo Picasso"]
    assert len({target_slug(n) for n in names}) == len(names)
