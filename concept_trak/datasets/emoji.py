"""Concepts of an object x style dataset: which words name a concept, and which pictures carry it.

A caption is "<object phrase> in the style of <style phrase>", e.g. "a cat in the style of openmoji
line"; its concepts are the object ("cat" or "a cat") and the style ("openmoji line",
"openmojiline", or "in the style of openmoji line").
"""

from __future__ import annotations

import difflib
import re

import numpy as np

from ..errors import UserError
from .folder import ImageCaptionDataset

STYLE_JOINT = " in the style of "


def caption(object_phrase: str, style_phrase: str) -> str:
    """("a cat", "openmoji line") -> "a cat in the style of openmoji line"."""
    return f"{object_phrase}{STYLE_JOINT}{style_phrase}"


def concepts(dataset: ImageCaptionDataset) -> dict[str, tuple[str, str]]:
    """Every word or phrase that names a concept -> (metadata column, value).

    E.g. "a cat" -> ("object", "cat").
    """
    vocabulary: dict[str, tuple[str, str]] = {}
    for record in dataset.records:
        for column in ("object", "style"):
            if (value := record.get(column)) is None:
                continue
            phrase = record.get(f"{column}_phrase") or value
            whole = [f"{STYLE_JOINT.strip()} {phrase}"] if column == "style" else []
            for name in (value, phrase, *whole):
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
    meant = f"did you mean {' or '.join(map(repr, close))}?"
    remedy = meant if close else "use an object or a style of its metadata"
    raise UserError(f"unknown concept {target!r} in {dataset.root}; {remedy}")


def relevant(dataset: ImageCaptionDataset, target: str) -> np.ndarray:
    """bool [N]: which pictures carry the concept, by the metadata.

    Raises UserError if the dataset does not know the word.
    """
    column, value = concept(dataset, target)
    return np.array([item == value for item in dataset.column(column)], dtype=bool)


def has_labels(dataset: ImageCaptionDataset) -> bool:
    """Whether the metadata say what a picture shows."""
    return any(v is not None for name in ("object", "style") for v in dataset.column(name))


def truth(dataset: ImageCaptionDataset, target: str) -> np.ndarray | None:
    """`relevant` where the data has labels, else None."""
    return relevant(dataset, target) if has_labels(dataset) else None


def refuse_unknown(dataset: ImageCaptionDataset, prompt: str, targets: list[str]) -> None:
    """UserError for a target, or a style of the prompt, that labelled data does not know."""
    if has_labels(dataset):
        style = re.search(r"\bin the style of (.+)$", prompt, re.IGNORECASE)
        for word in [*([style[1]] if style else []), *targets]:
            concept(dataset, word)
