"""What a folder of pictures names, to choose concepts from: its labels, or words of captions."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator

from ..parsing import normalized
from . import labels
from .image_folder import ImageCaptionDataset

WIDTH, MOST_WORDS, LETTERS = 96, 60, 3  # columns; words of captions shown, and their least length


def listing(dataset: ImageCaptionDataset) -> str:
    """The concepts by kind, objects by group where the metadata have that column; each is a word
    for TARGET_CONCEPTS. Without labels the most frequent words of the captions.
    """
    if not labels.has_labels(dataset):
        return _words(dataset)
    parts = []
    for column in labels.COLUMNS:
        counts = labels.values(dataset, column)
        if not counts:
            continue
        head = (
            f"{column}: {len(counts)}, each in {_span(counts.values())} of {len(dataset)} pictures"
        )
        groups = _groups(dataset) if column == "object" else {}
        parts.append("\n".join([head, *_paragraphs(counts, groups)]))
    example = emoji_example(dataset)
    return "\n\n".join([*parts, f"ask e.g.: {example}"] if example else parts)


def emoji_example(dataset: ImageCaptionDataset) -> str:
    """A question about the first picture that has both labels; "" without one."""
    for caption, words in labelled_questions(dataset):
        return f'PROMPT="{caption}" TARGET_CONCEPTS="{"|".join(words)}"'
    return ""


def labelled_questions(dataset: ImageCaptionDataset) -> Iterator[tuple[str, list[str]]]:
    """(caption, its concepts) of the pictures that have both labels."""
    for record, caption in zip(dataset.records, dataset.captions, strict=True):
        words = [record.get(f"{c}_phrase") or record.get(c) for c in labels.COLUMNS]
        if all(words) and all(word in caption for word in words):
            yield caption, words


def _groups(dataset: ImageCaptionDataset) -> dict[str, str]:
    return {
        r["object"]: str(r["group"]) for r in dataset.records if r.get("object") and r.get("group")
    }


def _paragraphs(counts: dict[str, int], groups: dict[str, str]) -> list[str]:
    """One a group, in the order of their first words."""
    members: dict[str, list[str]] = {}
    for word in counts:
        members.setdefault(groups.get(word, ""), []).append(word)
    return [
        textwrap.fill(
            ", ".join(words),
            WIDTH,
            initial_indent=f"  {group + ': ' if group else ''}",
            subsequent_indent="    ",
        )
        for group, words in members.items()
    ]


def _span(counts: object) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def frequent_words(dataset: ImageCaptionDataset) -> dict[str, int]:
    """{word: captions that hold it}, the MOST_WORDS most frequent ones."""
    found = Counter(
        word
        for caption in dataset.captions
        for word in set(re.findall(r"[^\W\d_]+", normalized(caption).casefold()))
        if len(word) >= LETTERS
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS])


def _words(dataset: ImageCaptionDataset) -> str:
    """The words of most captions, with the number of captions."""
    ranked = frequent_words(dataset).items()
    told = ", ".join(f"{word} ({count})" for word, count in ranked)
    head = f"no labels; the most frequent words of {len(dataset)} captions (any word may be asked)"
    return f"{head}:\n" + textwrap.fill(told, WIDTH, initial_indent="  ", subsequent_indent="  ")
