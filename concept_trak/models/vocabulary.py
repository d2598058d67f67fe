"""Labels as words: what a class-conditional model is told, written so that a caption can say it.

A caption names one class of some attributes, "triangle, red"; an attribute that it does not name is
left open, which the model has learned too, and the empty caption leaves all open. So a question
about a concept is asked of labels as it is of prompts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The classes of each attribute, {attribute: (class, ...)}; a class is one word of its own.

    UserError for an attribute with fewer than two classes, or a word that stands for two things.
    """

    attributes: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        words = [word for classes in self.attributes.values() for word in classes]
        for name, classes in self.attributes.items():
            if len(classes) < 2:
                raise UserError(
                    f"attribute {name!r} has {len(classes)} classes; give attributes two of it"
                )
        for word in words:
            if words.count(word) > 1:
                raise UserError(f"the class {word!r} is there twice; rename one in attributes")
            if not re.fullmatch(r"\w+", word):
                raise UserError(
                    f"the class {word!r} is not one word; write it with _ in attributes"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes."""
        return tuple(self.attributes)

    @property
    def width(self) -> int:
        """Of a token: a place for each class, and one for each attribute that is left open."""
        return sum(len(classes) + 1 for classes in self.attributes.values())

    def parse(self, caption: str) -> dict[str, str]:
        """ "triangle, red" -> {"shape": "triangle", "color": "red"}; the case does not matter.

        UserError for a word that is no class, or two classes of one attribute.
        """
        found: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in caption.split(","))):
            attribute, word = self.attribute_of(part)
            if attribute in found:
                told = f"{found[attribute]!r} and {word!r}"
                raise UserError(
                    f"{caption!r} names two of {attribute}, {told}; leave one out of PROMPT, "
                    "or HELD_OUT"
                )
            found[attribute] = word
        return found

    def attribute_of(self, word: str) -> tuple[str, str]:
        """(attribute, class) of a word. UserError, with close matches, for one that is no class."""
        known = {c.casefold(): (a, c) for a, classes in self.attributes.items() for c in classes}
        if word.casefold() in known:
            return known[word.casefold()]
        close = difflib.get_close_matches(word.casefold(), known, n=3)
        choices = [known[c][1] for c in close] or [c for _, c in known.values()][:40]
        raise UserError(
            f"unknown class {word!r}; in PROMPT, TARGET_CONCEPTS and HELD_OUT use "
            f"{', '.join(choices)}"
        )

    def caption(self, labels: Mapping[str, str]) -> str:
        """Inverse of `parse`, attributes in their order."""
        return ", ".join(labels[name] for name in self.names if name in labels)

    def indices(self, labels: Sequence[Mapping[str, str]]) -> torch.Tensor:
        """int [B, A]: the class of each attribute, its number of classes where it is left open."""
        rows = [
            [classes.index(told[name]) if name in told else len(classes)]
            for told in labels
            for name, classes in self.attributes.items()
        ]
        return torch.tensor(rows).view(len(labels), len(self.attributes))

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        """int [B, A] -> one-hot [B, A, width] float32: a token an attribute."""
        sizes = torch.tensor([0, *(len(c) + 1 for c in self.attributes.values())])
        places = indices + sizes.cumsum(0)[:-1]
        return torch.nn.functional.one_hot(places, self.width).float()

    def others(self, word: str) -> list[str]:
        """The other classes of its attribute."""
        attribute, word = self.attribute_of(word)
        return [c for c in self.attributes[attribute] if c != word]
