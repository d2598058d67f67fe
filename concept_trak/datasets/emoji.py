"""Concepts of an object x style dataset: which words name a concept, and which pictures carry it.

A caption is "<object phrase> in the style of <style phrase>", e.g. "a cat in the style of openmoji
line"; its concepts are the object ("cat" or "a cat") and the style ("openmoji line",
"openmojiline", or "in the style of openmoji line").
"""

from __future__ import annotations

import difflib

import numpy as np

from ..errors import UserError
from .folder import ImageCaptionDataset

STYLE_JOINT = " in the style of "


def caption(object_phrase: str, style_phrase: str) -> str:
    """("a cat", "openmoji line") -> "a cat in the style of openmoji line"."""
    return f"{object_phrase}{STYLE_JOINT}{style_phrase}"


def concepts(dataset: ImageCaptionDataset) -> dict[str, tuple[str, str]]:
    """Every word or phrase that names a concept -> (metadata column, value), e.g. "a cat" ->
    ("object", "cat").
    """
    vocabulary: dict[str, tuple[str, str]] = {}
    for record in dataset.records:
        for column in ("object", "style"):
            value = record.get(column)
            if value is None:
                continue
            phrase = record.get(f"{column}_phrase") or value
            for name in (
                value,
                phrase,
                *([STYLE_JOINT.strip() + " " + phrase] if column == "style" else []),
            ):
                vocabulary.setdefault(name, (column, value))
    return vocabulary


def concept(dataset: ImageCaptionDataset, target: str) -> tuple[str, str]:
    """(column, value) of one concept word; letter case and outer blanks do not matter.

    Raises UserError, naming close matches, if the dataset does not know the word.
    """
    vocabulary = {name.casefold(): value for name, value in concepts(dataset).items()}
    word = target.strip().casefold()
    if word in vocabulary:
        return vocabulary[word]
    close = difflib.get_close_matches(word, vocabulary, n=3)
    remedy = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "use an object or a style of its metadata"
    )
    raise UserError(f"unknown concept {target!r} in {dataset.root}; {remedy}")


def relevant(dataset: ImageCaptionDataset, target: str) -> np.ndarray:
    """bool [N]: which pictures carry the concept, by the metadata.

    Raises UserError if the dataset does not know the word.
    """
    column, value = concept(dataset, target)
    return np.array([item == value for item in dataset.column(column)], dtype=bool)


def held_out_cells(dataset: ImageCaptionDataset) -> list[dict]:
    """The metadata rows kept out of training, one per held-out (object, style) cell."""
    return [record for record in dataset.records if record.get("split") == "held_out"]
