"""Targets, negatives and folder names from words."""

import doctest
import random
import re
import unicodedata

import pytest

from concept_trak.attribution import prompts
from concept_trak.attribution.answer import held_against_itself
from concept_trak.attribution.prompts import (
    asking_words,
    contains,
    contrast_prompts,
    negatives,
    query_slug,
    slug,
    split_list,
    target_folders,
    target_slug,
    without_target,
)
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.settings import EMOJI, resolve


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
    assert without_target(prompt, target) == want


def test_target_equal_to_the_prompt_leaves_nothing():
    assert without_target("in the style of blob", "in the style of blob") == ""


def test_a_target_is_whole_words():
    with pytest.raises(UserError, match="'cat' is not in the prompt"):
        without_target("a category of things", "cat")
    assert (
        without_target("a c++ (1998) book", "c++ (1998)") == "a book"
        or without_target("a c++ (1998) book", "c++ (1998)") == "book"
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
        without_target(prompt, target)


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


# --- c- asks for everything but the target


def one_match(prompt, target):
    """The rule that the published answers were made by, for a target that stands once."""
    match = re.search(rf"(?<!\w){re.escape(target)}(?!\w)", prompt, re.IGNORECASE)
    before, after = prompt[: match.start()], prompt[match.end() :]
    before = re.sub(r"(?:\b(?:a|an|the)\s+)$", "", before, flags=re.IGNORECASE)
    joining = r"(?:,|\b(?:in the style of|painted by|by|with|and|of|on)\b)\s*$"
    before = re.sub(joining, "", before.rstrip(), flags=re.IGNORECASE)
    rest = re.sub(r"\s+(?=[\s,])", "", f"{before.rstrip()} {after.strip()}").strip(" ,")
    return re.sub(r"^(?:and|with|by|of|on)\s+", "", rest, flags=re.IGNORECASE)


def test_every_prompt_of_the_embedded_data_is_asked_as_before():
    data = load_folder(EMOJI["data_dir"])
    for record, caption in zip(data.records, data.captions, strict=True):
        style = record["style_phrase"]
        words = [record["object"], record["object_phrase"], style, f"in the style of {style}"]
        for word in words:
            wanted = (caption, one_match(caption, word))
            assert contrast_prompts("slider", caption, [word]) == [wanted]
    assert len(data) > 700


@pytest.mark.parametrize(
    "prompt,target,want",
    [
        ("a cat and a cat", "cat", ""),
        ("a cat and a black cat", "cat", "a black"),
        ("a cat and a black cat", "black cat", "a cat"),
        ("a Cat, a dog and the CAT", "cat", "a dog"),
        ("new new york york", "new york", ""),
        ("a cat  dog and a cat dog", "cat dog", ""),
        ("the cat's hat and a cat", "cat", "hat"),
        ("the cats\u2019 hat", "cats", "hat"),
        ("a 'cat' in a hat", "cat", "in a hat"),
        ("a sign (cat) there", "cat", "a sign there"),
        ("a cat in style of blob", "blob", "a cat"),
        ("a cat in the blob style", "blob", "a cat"),
        ("a cat in blob style, at night", "blob", "a cat, at night"),
        ("a STRASSE and a Stra\u00dfe", "stra\u00dfe", ""),
    ],
)
def test_the_target_goes_wherever_it_stands(prompt, target, want):
    assert without_target(prompt, target) == want
    assert contains(prompt, target) and contains(asking_words(prompt, target), target)


@pytest.mark.parametrize(
    "prompt,target,told",
    [
        ("a cat in a cat-shaped hat", "cat", "'cat-shaped'"),
        ("a black-cat mask", "cat", "'black-cat'"),
        ("a half\u2011cat", "cat", "'half\u2011cat'"),
        ("a cat among cats", "cat", "'cats'"),
        ("two black cats and a black cat", "black cats", "'black cat'"),
        ("a woman among women", "woman", "'women'"),
        ("a wolf of the wolves", "wolf", "'wolves'"),
    ],
)
def test_what_cannot_be_taken_out_is_refused_where_it_would_be(prompt, target, told):
    with pytest.raises(UserError, match=f"{told}.*set NEGATIVE_PROMPTS"):
        contrast_prompts("slider", prompt, [target])
    assert contrast_prompts("slider", prompt, [target], "a hat") == [(prompt, "a hat")]
    assert contrast_prompts("cfg", prompt, [target]) == [(prompt, "")]


GLUE = "a an the in style of painted by with and on".split()
NOUNS = ["cat", "black cat", "cat's", "hat", "blob", "Monet", "caf\u00e9", "tree"]
JOINTS = [" and ", ", ", " on ", " with ", " in the style of ", " in style of ", " by ", "  ", " "]


def drawn(rng):
    """A prompt of a few of NOUNS, which may repeat, and one of them."""
    nouns = [rng.choice(NOUNS) for _ in range(rng.randint(1, 6))]
    text = ""
    for noun in nouns:
        article = rng.choice(["a ", "the ", "an ", "", "A "])
        text += (rng.choice(JOINTS) if text else "") + article + rng.choice([noun, noun.upper()])
    target = rng.choice(nouns)
    return text, rng.choice([target, target.capitalize(), unicodedata.normalize("NFD", target)])


def content(text):
    """Its words but GLUE, an owner's "'s" left out."""
    text = unicodedata.normalize("NFC", text).casefold()
    found = (word.removesuffix("'s") for word in re.findall(r"[\w']+", text))
    return [word for word in found if word not in GLUE]


def test_of_any_prompt_all_but_the_target_is_left_in_its_order():
    for seed in range(500):
        prompt, target = drawn(random.Random(seed))
        [(plus, minus)] = contrast_prompts("slider", prompt, [target])
        told = f"{prompt!r} {target!r} {minus!r}"
        assert plus == prompt and contains(plus, target), told
        assert contains(asking_words(prompt, target), target), told
        assert not contains(minus, target), told
        lost, left = content(prompt), iter(content(prompt))
        assert all(word in left for word in content(minus)), told  # in order
        for word in content(minus):
            lost.remove(word)
        assert set(lost) <= set(content(target)), told


@pytest.mark.parametrize(
    "prompt,target,want",
    [
        (
            "\u4e00\u53ea\u732b\u5728\u516c\u56ed\u91cc",
            "\u732b",
            "\u4e00\u53ea\u5728\u516c\u56ed\u91cc",
        ),
        ("\u516c\u5712\u306e\u732b\u3068\u72ac", "\u732b", "\u516c\u5712\u306e\u3068\u72ac"),
        ("\u6211\u7231AI\u6280\u672f", "AI", "\u6211\u7231\u6280\u672f"),
        (
            "\u0e41\u0e21\u0e27\u0e43\u0e19\u0e2a\u0e27\u0e19",
            "\u0e41\u0e21\u0e27",
            "\u0e43\u0e19\u0e2a\u0e27\u0e19",
        ),
        (
            "\u0ec1\u0ea1\u0ea7\u0ec3\u0e99\u0eaa\u0ea7\u0e99",
            "\u0ec1\u0ea1\u0ea7",
            "\u0ec3\u0e99\u0eaa\u0ea7\u0e99",
        ),
        (
            "\u1786\u17d2\u1798\u17b6\u1793\u17c5\u179f\u17bd\u1793",
            "\u1786\u17d2\u1798\u17b6",
            "\u1793\u17c5\u179f\u17bd\u1793",
        ),
        (
            "\u1000\u103c\u1031\u102c\u1004\u103a\u1021\u102d\u1019\u103a",
            "\u1000\u103c\u1031\u102c\u1004\u103a",
            "\u1021\u102d\u1019\u103a",
        ),
    ],
)
def test_scripts_without_blanks(prompt, target, want):
    assert without_target(prompt, target) == want and contains(prompt, target)


@pytest.mark.parametrize(
    "text,part",
    [
        ("a xAI\u6280", "AI"),  # inside a word of a script with blanks
        ("\u0e41\u0e21\u0e48", "\u0e41\u0e21"),  # a letter without its tone
        ("\u1786\u17d2\u1798\u17b6", "\u1786"),  # without the letter below it
        ("\u0915\u092e\u0940", "\u0915\u092e"),  # without its vowel
        ("g\u030cabc", "g"),  # a sign that no letter is composed with
    ],
)
def test_no_part_of_a_word_or_letter_is_a_target(text, part):
    assert not contains(text, part)


def test_composed_and_decomposed_letters_are_the_same():
    for form in ("NFC", "NFD"):
        prompt = unicodedata.normalize(form, "a caf\u00e9 and a dog")
        for other in ("NFC", "NFD"):
            target = unicodedata.normalize(other, "Caf\u00e9")
            assert without_target(prompt, target) == "a dog"
            assert contains(prompt, target) and target_slug(target) == target_slug("Caf\u00e9")
    asked = {"prompt": "a cafe\u0301", "target_concepts": "cafe\u0301", "data_dir": "cafe\u0301"}
    settings = resolve("emoji", asked)
    assert settings.prompt == "a caf\u00e9" and settings.target_concepts == "caf\u00e9"
    assert settings.data_dir == "cafe\u0301"  # a path is what it is


@pytest.mark.parametrize("twice", [["cat", "cat"], ["Cat", "cat"], ["black cat", "Black  cat"]])
def test_a_target_is_asked_once(twice):
    with pytest.raises(UserError, match="are the same target; name it once"):
        contrast_prompts("cfg", "a black cat", twice)


def test_targets_of_one_slug_have_folders_of_their_own():
    assert target_folders(["cat", "Pablo Picasso"]) == ["target_cat", "target_pablo-picasso"]
    many = ["cat dog", "cat-dog", "cat - dog", "c\u00e2t dog"]
    assert len({name.casefold() for name in target_folders(many)}) == len(many)
    assert target_folders(["cat-dog"]) == ["target_cat-dog"]
    second = target_folders(["cat dog", "cat-dog"])[1]
    trap = ["cat dog", second.removeprefix("target_"), "cat-dog"]
    assert len({*target_folders(trap)}) == 3


def test_a_negative_prompt_that_asks_for_its_target_is_told():
    prompt, targets = "a dog and a cat", ["dog", "cat"]
    pairs = contrast_prompts("slider", prompt, targets, "a cat|a Cat asleep")
    (told,) = held_against_itself(targets, pairs)
    assert "'a Cat asleep' for 'cat'" in told and "\n" not in told
    assert not held_against_itself(targets, contrast_prompts("slider", prompt, targets))
