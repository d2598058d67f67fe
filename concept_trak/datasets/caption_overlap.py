"""What captions say, without a look at any picture: the text-only control."""

from __future__ import annotations

import functools
import re

import numpy as np

from ..parsing import normalized


def caption_overlap(concept: str, captions: list[str]) -> np.ndarray:
    """[N] share of the concept's words that each caption holds, "a" and "an" left out."""
    wanted = _words(concept) - {"a", "an", "the"}
    if not wanted:
        return np.zeros(len(captions), dtype=np.float32)
    return np.array([len(wanted & _words(c)) / len(wanted) for c in captions], dtype=np.float32)


@functools.lru_cache(1 << 16)  # captions come again with every question
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", normalized(text).lower()))
