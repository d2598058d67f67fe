"""What every page and results folder of one question shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets import ImageCaptionDataset
from ..errors import UserError
from ..scoring.result import ConceptResult


@dataclass(frozen=True)
class Links:
    """Where the page's links lead, as URLs relative to it.

    pictures: of a training picture's file, by its row. files: {target: {what it is: URL}}. url: of
    any other file.
    """

    pictures: Callable[[int], str]
    files: Mapping[str, Mapping[str, str]]
    url: Callable[[Path], str] = str


@dataclass(frozen=True)
class SampleRow:
    """Pictures at equal noise, those of the concept first. name: of the model that drew them. note:
    how many weights were edited. links: {what it is: path}.
    """

    name: str
    note: str
    pictures: list[Image.Image]
    links: dict[str, Path]


@dataclass(frozen=True)
class ConceptWeights:
    """What the weights have to do with one target.

    layers: of `components.score_io.layer_statistics`, those with most of the positive scores. heads
    {attention:
    [sum of alpha of each head]}. page: of the scores. prompts: of the pictures of each row,
    the concept's `of_target` first.
    """

    target: str
    prompt: str
    layers: list[dict[str, Any]]
    heads: dict[str, list[float]]
    page: Path
    prompts: list[str]
    rows: list[SampleRow]
    of_target: int

    @property
    def largest_head(self) -> float:
        """Magnitude, for the colours."""
        return max((abs(x) for row in self.heads.values() for x in row), default=0.0) or 1.0


@dataclass(frozen=True)
class ReportContext:
    """What every page and results folder of one question shares.

    picture:       the query
    dataset:       the N scored rows; of it only `captions` and `images(indices, size)` are used
    top_k:         pictures at each end of a ranking
    fixed_damping: one of the sweep, the damping chosen without looking at this query
    settings, provenance: told as they are, nested dicts allowed
    fit:           [N], see `gradients.caption_fit.relative_fit`; None where it is not known
    links:         None for a page that stands alone
    weights:       of each concept, see `report.component_section`; none where they were not asked
    for weights_line:  the command that adds them
    """

    picture: Image.Image
    dataset: ImageCaptionDataset
    top_k: int
    fixed_damping: float
    settings: dict
    provenance: dict
    fit: np.ndarray | None = None
    links: Links | None = None
    weights: Sequence[ConceptWeights] = ()
    weights_line: str = ""

    def check(self, concept: ConceptResult) -> None:
        """UserError unless the scores are for this dataset's rows and top_k can be shown."""
        num_rows = len(self.dataset.captions)
        if concept.num_images != num_rows:
            raise UserError(
                f"scores of {concept.target!r} are for {concept.num_images} images but the dataset "
                f"has {num_rows}; give dataset the train split that was scored"
            )
        if self.top_k < 1:
            raise UserError(f"TOP_K={self.top_k} shows no picture; set TOP_K to at least 1")
