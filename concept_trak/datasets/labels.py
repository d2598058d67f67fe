"""Concepts of an object x style dataset: which words name a concept, and which pictures carry it.

A caption is "<object phrase> in the style of <style phrase>", e.g. "a cat in the style of openmoji
line"; its concepts are the object ("cat" or "a cat") and the style ("openmoji line",
"openmojiline", or "in the style of openmoji line").
"""

from __future__ import annotations

import os
import re

import numpy as np

from ..errors import UserError
from ..flags import command_line
from ..parsing import nearest, normalized
from ..settings import EMOJI
from .image_folder import LABELS, ImageCaptionDataset

STYLE_PREFIX = " in the style of "
COLUMNS = ("object", "style")
FEW = 6  # words that stand for all where none is near


def caption(object_phrase: str, style_phrase: str) -> str:
    """("a cat", "openmoji line") -> "a cat in the style of openmoji line"."""
    return f"{object_phrase}{STYLE_PREFIX}{style_phrase}"


def concepts(dataset: ImageCaptionDataset) -> dict[str, tuple[str, str]]:
    """Every word or phrase that names a concept -> (metadata column, value).

    E.g. "a cat" -> ("object", "cat").
    """
    vocabulary: dict[str, tuple[str, str]] = {}
    for record in dataset.records:
        for column in COLUMNS:
            if (value := record.get(column)) is None:
                continue
            phrase = record.get(f"{column}_phrase") or value
            whole = [f"{STYLE_PREFIX.strip()} {phrase}"] if column == "style" else []
            for name in (value, phrase, *whole):
                vocabulary.setdefault(name, (column, value))
    return vocabulary


def values(dataset: ImageCaptionDataset, column: str) -> dict[str, int]:
    """{what the pictures show, as captions say it without an article: how many pictures}."""
    counts: dict[str, int] = {}
    for record in dataset.records:
        if (value := record.get(column)) is not None:
            phrase = record.get(f"{column}_phrase") or value
            word = value if column == "object" else phrase
            counts[word] = counts.get(word, 0) + 1
    return counts


def parse_concept(
    dataset: ImageCaptionDataset, target: str, column: str = "object"
) -> tuple[str, str]:
    """(column, value) of one concept word; letter case and outer blanks do not matter.

    column: of which kind the word seems to be. Raises UserError, naming words that are near or else
    some of that kind, if the dataset does not know it.
    """
    vocabulary = {normalized(k).casefold(): value for k, value in concepts(dataset).items()}
    word = normalized(target).strip().casefold()
    if word in vocabulary:
        return vocabulary[word]
    close = nearest(word, vocabulary)
    if close:
        remedy = f"did you mean {' or '.join(map(repr, close))}?"
    else:
        there = list(values(dataset, column)) or list(vocabulary)
        some = there[:: max(1, len(there) // FEW)][:FEW]
        remedy = f"it knows {len(there)} of that kind ({column}), such as {', '.join(some)};"
    embedded = str(dataset.root) == EMOJI["data_dir"]
    every = command_line("concepts", "emoji", {} if embedded else {"data_dir": str(dataset.root)})
    raise UserError(
        f"unknown concept {target!r} in {os.path.relpath(dataset.root)}; {remedy} all: {every}"
    )


def relevant(dataset: ImageCaptionDataset, target: str) -> np.ndarray:
    """bool [N]: which pictures carry the concept, by the metadata.

    Raises UserError if the dataset does not know the word.
    """
    column, value = parse_concept(dataset, target)
    carry = [
        item is not None and normalized(item) == normalized(value)
        for item in dataset.column(column)
    ]
    return np.array(carry, dtype=bool)


def has_labels(dataset: ImageCaptionDataset) -> bool:
    """Whether the metadata say what each picture shows, in all columns of `LABELS`; a column of
    such a name in other people's data says something else.
    """
    return all(record.get(name) for record in dataset.records for name in LABELS)


def relevance_or_none(dataset: ImageCaptionDataset, target: str) -> np.ndarray | None:
    """`relevant` where the data has labels, else None."""
    return relevant(dataset, target) if has_labels(dataset) else None


def check_known(dataset: ImageCaptionDataset, prompt: str, targets: list[str]) -> None:
    """UserError for a target, or a style of the prompt, that labelled data does not know."""
    if has_labels(dataset):
        style = re.search(r"\bin the style of (.+)$", prompt, re.IGNORECASE)
        if style:
            parse_concept(dataset, style[1], "style")
        for word in targets:
            is_style = (
                style and normalized(word).strip().casefold() in normalized(style[0]).casefold()
            )
            parse_concept(dataset, word, "style" if is_style else "object")
