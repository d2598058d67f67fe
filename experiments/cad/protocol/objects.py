"""Objects: does an ImageNet classifier still see the class that the prompt names?

The ten classes of Imagenette, in pictures of both pipelines. UA = share of the erased class's
pictures that the classifier no longer calls so; kept = accuracy on the other classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.settings import Settings

from .metric_models import Classifier
from .prompts import PromptRow, SampleRequest, fill
from .result import ProtocolResult, share, shares

CLASSES = (  # of Imagenette (Howard 2019), by their names in ImageNet
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
)
NAMED = 5  # classes that are named as what appears instead


class Objects:
    """See `run.Published`."""

    sentences: tuple[str, ...] = ("a photo of a {}",)
    own: Sequence[PromptRow] = tuple(fill(sentences, CLASSES))

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings = settings
        self.classifier = Classifier(settings.classifier, device)

    def check(self, asked: Sequence[SampleRequest]) -> None:
        """UserError for a class that the classifier does not know."""
        for name in dict.fromkeys(ask.of for ask in asked):
            self.classifier.index(name)

    def about(self) -> dict[str, Any]:
        """What measured."""
        return self.classifier.about()

    def measure(
        self,
        asked: Sequence[SampleRequest],
        before: list[Path],
        after: list[Path],
        erased: list[str],
    ) -> ProtocolResult:
        """A row a class, of accuracies; see `run.Published`."""
        size = self.settings.batch_size
        tops = [self.classifier.top(paths, size) for paths in (before, after)]
        of = np.array([ask.of for ask in asked])
        names, places = np.unique(of, return_inverse=True)
        wanted = np.array([self.classifier.index(name) for name in names.tolist()])[places]
        right = [(top == wanted).astype(float) for top in tops]
        gone = np.isin(of, erased)
        found = ProtocolResult(("original", "edited", "change"))
        found.scores = {"right_original": right[0], "right_edited": right[1]}
        for role, which in (("erased", gone), ("kept", ~gone)):
            if which.any():
                found.add("all", role, int(which.sum()), **shares(*(r[which] for r in right)))
        for name in dict.fromkeys(of.tolist()):
            which = of == name
            role = "erased" if name in erased else "kept"
            found.add(name, role, int(which.sum()), **shares(*(r[which] for r in right)))
        found.line = {"ua": share(1 - right[1][gone]) if gone.any() else None, "kept": None}
        if not gone.all():
            found.line["kept"] = shares(*(r[~gone] for r in right))
        if gone.any():
            became = Counter(str(self.classifier.labels[int(i)]) for i in tops[1][gone])
            found.line["became"] = dict(became.most_common(NAMED))
        else:
            found.notes.append("no class of the prompts is erased: every class is to be kept")
        return found
