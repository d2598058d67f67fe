"""The baseline judge_features: cosine of what the judge of the emoji data makes of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from concept_trak.attribution.baselines import Baseline
from concept_trak.registry import RANKERS
from concept_trak.settings import JUDGE

if TYPE_CHECKING:
    from concept_trak.attribution.question import Query


@RANKERS.register("judge_features")
class JudgeFeatures(Baseline):
    """A network that was trained to name objects and styles of the emoji data, held-out pairs
    included: what a good outside model of these pictures sees. Of other pictures it knows nothing.
    """

    @staticmethod
    def available() -> bool:
        """Whether the judge is there: it belongs to a checkout, not to an installed package."""
        return (JUDGE / "judge.json").is_file()

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """Cosine of the centred logits of both heads, of equal weight."""
        from .io import load_judge
        from .net import resized

        judge, train = load_judge(JUDGE), self.task.train
        size = self.task.model.image_size
        shown = np.stack([q.picture.pixels for q in questions])
        asked, rows = (
            judge.features(resized(pixels, judge.settings.size))
            for pixels in (shown, train.images(range(len(train)), size=size))
        )
        return asked @ rows.T
