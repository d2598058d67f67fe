"""Retention: do captions of everyday scenes still give pictures that fit them, and look real?

CLIP score of both pipelines and its change; Frechet distance of their pictures to real ones of
REAL_DIR or, without it, to one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_trak.errors import UserError
from concept_trak.settings import Settings

from .frechet import FEWEST, frechet, jackknife, refuse_few
from .metric_models import Clip, FeatureExtractor, Inception, require
from .prompts import PromptRow, SampleRequest
from .result import ProtocolResult, paired

KINDS = (".png", ".jpg", ".jpeg", ".webp")
OWN = (
    "a dog runs across a wet lawn with a ball",
    "three people wait at a bus stop in the rain",
    "a plate with rice, beans and a slice of lemon",
    "a red bicycle leans on a brick wall",
    "a cat sleeps on a stack of books",
    "a train crosses an old stone bridge",
    "children fly a kite on a windy beach",
    "a kitchen with white cupboards and a green kettle",
    "two horses graze behind a wooden fence",
    "a man repairs a wristwatch at a desk",
    "a bowl of oranges beside a window",
    "a sailing boat near a lighthouse",
    "a woman reads a newspaper in a cafe",
    "a snowy road between pine trees",
    "a market stall full of vegetables",
    "a bird stands on the roof of a parked car",
    "a clock tower above a busy square",
    "a laptop and a cup of tea on a round table",
    "a skier descends a steep slope",
    "a bunch of yellow flowers in a glass jar",
)


class Retention:
    """See `run.Published`."""

    sentences: tuple[str, ...] = ()
    own: Sequence[PromptRow] = tuple(map(PromptRow, OWN))

    def __init__(self, settings: Settings, device: str) -> None:
        s = self.settings = settings
        require("torchmetrics")
        self.real = real_pictures(s.real_dir)
        self.clip = Clip(s.clip_model, device)
        self.features: Clip | FeatureExtractor | Inception = self.clip
        if s.feature_model.endswith((".pth", ".pt")):
            self.features = Inception(Path(s.feature_model), device)
        elif s.feature_model:
            self.features = FeatureExtractor(s.feature_model, device)

    def check(self, asked: Sequence[SampleRequest]) -> None:
        """UserError for fewer pictures than a Frechet distance takes."""
        refuse_few(len(asked))

    def about(self) -> dict[str, Any]:
        """What measured."""
        told = {"clip": self.clip.about(), "features": self.features.about()}
        return told | {"real_pictures": len(self.real)}

    def measure(
        self,
        asked: Sequence[SampleRequest],
        before: list[Path],
        after: list[Path],
        erased: list[str],
    ) -> ProtocolResult:
        """Two rows: CLIP score, Frechet distance; see `run.Published`."""
        size, captions = self.settings.batch_size, [ask.prompt for ask in asked]
        fits = [self.clip.measure(paths, captions, size) for paths in (before, after)]
        found = ProtocolResult(("original", "edited", "change", "original to edited"))
        found.scores = {"clip_original": fits[0][0], "clip_edited": fits[1][0]}
        scores = paired(fits[0][0], fits[1][0])
        found.add("CLIP score", self.clip.source, len(asked), **scores)
        if self.features is self.clip:
            features = [embeddings for _, embeddings in fits]
        else:
            features = [self.features.of(paths, size) for paths in (before, after)]
        distances = self._distances(*features)
        found.add("Frechet distance", self.features.source, len(asked), **distances)
        found.line = {"clip_score": scores, "frechet": distances}
        if len(asked) <= features[0].shape[1]:
            told = f"{len(asked)} pictures for {features[0].shape[1]} features"
            found.notes.append(f"{told}: Frechet distances of so few are biased upwards")
        if self.real and not isinstance(self.features, Inception):
            found.notes.append(
                "features are not Inception's: not to be compared with published FIDs"
            )
        return found

    def _distances(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
        """Figures by column, of features [n, d]."""
        real = self.features.of(self.real, self.settings.batch_size) if self.real else None
        names = ("original to edited",) if real is None else ("original", "edited", "change")

        def of(places: np.ndarray) -> np.ndarray:
            one, other = before[places], after[places]
            if real is None:
                return np.array([frechet(one, other)])
            distances = [frechet(real, one), frechet(real, other)]
            return np.array([*distances, distances[1] - distances[0]])

        return dict(zip(names, jackknife(len(before), of), strict=True))


def real_pictures(folder: str) -> list[Path]:
    """Pictures below REAL_DIR, sorted; none for no folder. UserError for one that holds too few."""
    if not folder:
        return []
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in KINDS)
    if len(found) < FEWEST:
        told = f"REAL_DIR={folder} holds {len(found)} pictures ({', '.join(KINDS)})"
        raise UserError(f"{told}; give a folder with {FEWEST} or more, e.g. COCO's val2014")
    return found
