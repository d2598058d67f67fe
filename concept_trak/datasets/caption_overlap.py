"""What captions say, without a look at any picture: the text-only control."""

from __future__ import annotations

import re

import numpy as np

from ..parsing import normalized


def caption_overlap(concept: str, captions: list[str]) -> np.ndarray:
    """[N] share of the concept's words that each caption holds, "a" and "an" left out."""
    words = [set(re.findall(r"\w+", normalized(c).lower())) for c in [concept, *captions]]
    wanted = words[0] - {"a", "an", "the"}
    if not wanted:
        return np.zeros(len(captions), dtype=np.float32)
    return np.array([len(wanted & w) / len(wanted) for w in words[1:]], dtype=np.float32)
