"""What every page and results folder of one question shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..datasets import ImageCaptionDataset
from ..errors import UserError
from ..scoring.concept import ConceptResult


@dataclass(frozen=True)
class Links:
    """Where the page's links lead, as URLs relative to it.

    pictures: of a training picture's file, by its row. files: {target: {what it is: URL}}.
    """

    pictures: Callable[[int], str]
    files: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Shown:
    """What every page and results folder of one question shares.

    picture:       the query
    dataset:       the N scored rows; of it only `captions` and `images(indices, size)` are used
    top_k:         pictures at each end of a ranking
    fixed_damping: one of the sweep, the damping chosen without looking at this query
    settings, provenance: told as they are, nested dicts allowed
    fit:           [N], see `rows.fit.relative_fit`; None where it is not known
    links:         None for a page that stands alone
    """

    picture: Image.Image
    dataset: ImageCaptionDataset
    top_k: int
    fixed_damping: float
    settings: dict
    provenance: dict
    fit: np.ndarray | None = None
    links: Links | None = None

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
