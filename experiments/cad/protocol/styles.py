"""Styles: how far does the edit move pictures of the erased artist, and of the others?

LPIPS between the original's and the edited pipeline's picture of the same prompt and noise: high is
wanted for the erased artist, low for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.settings import Settings

from ..result_cache import mean_ci
from .lpips import LPIPS
from .prompts import PromptRow, SampleRequest, fill
from .result import ProtocolResult, unpaired_difference

ARTISTS = ("Pablo Picasso", "Vincent van Gogh", "Rembrandt", "Andy Warhol", "Caravaggio")


class Styles:
    """See `run.Published`."""

    sentences: tuple[str, ...] = (
        "a harbour at dawn in the style of {}",
        "a bowl of fruit on a table in the style of {}",
        "a portrait of an old man in the style of {}",
        "a street at night in the style of {}",
    )
    own: Sequence[PromptRow] = tuple(fill(sentences, ARTISTS))

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.lpips = settings, LPIPS(settings.alexnet_path, device)

    def check(self, asked: Sequence[SampleRequest]) -> None:
        """Nothing: every artist will do."""

    def about(self) -> dict[str, Any]:
        """What measured."""
        return self.lpips.about()

    def measure(
        self,
        asked: Sequence[SampleRequest],
        before: list[Path],
        after: list[Path],
        erased: list[str],
    ) -> ProtocolResult:
        """A row an artist, of distances; see `run.Published`."""
        distance = self.lpips.of(before, after, self.settings.batch_size)
        of = np.array([ask.of for ask in asked])
        gone = np.isin(of, erased)
        found = ProtocolResult(("lpips",), scores={"lpips": distance})
        for role, which in (("erased", gone), ("kept", ~gone)):
            figure = found.line[f"lpips_{role}"] = mean_ci(distance[which]) if which.any() else None
            if figure:
                found.add("all", role, int(which.sum()), lpips=figure)
        found.line["lpips_difference"] = None
        if gone.any() and not gone.all():
            figure = found.line["lpips_difference"] = unpaired_difference(
                distance[gone], distance[~gone]
            )
            found.add("all", "erased - kept", len(asked), lpips=figure)
        if not gone.any():
            found.notes.append("no artist of the prompts is erased: every style is to be kept")
        for name in dict.fromkeys(of.tolist()):
            which = of == name
            role = "erased" if name in erased else "kept"
            found.add(name, role, int(which.sum()), lpips=mean_ci(distance[which]))
        return found
