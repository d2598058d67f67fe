"""The result of a concept whose scores are known of some pictures only: those that an index found.

The pages of a result want the extreme pictures, which are among them, and how all scores are
spread, which a sample of rows drawn by chance tells. What needs the scores of all pictures (average
precision, LDS) is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .ranking import ranking
from .result import ConceptResult


@dataclass
class CandidateResult(ConceptResult):
    """A `ConceptResult` whose scores [D, M] are of the training images `rows` alone.

    rows: int64 [M], ascending. num_rows: N, how many training images there are. sampled: int64 [S],
    images drawn by chance; sampled_scores: [D, S], theirs. told: how the candidates were found, and
    how well that works, in sentences. relevant: [N], as there.

    Raises UserError as there, and for rows that do not fit the scores or N.
    """

    rows: np.ndarray = None
    num_rows: int = 0
    sampled: np.ndarray = None
    sampled_scores: np.ndarray = None
    told: str = ""

    def __post_init__(self) -> None:
        self.rows = np.asarray(self.rows, dtype=np.int64)
        self.sampled_scores = np.asarray(self.sampled_scores, dtype=np.float32)
        super().__post_init__()
        fits = self.rows.shape == self.scores.shape[1:] and (np.diff(self.rows) > 0).all()
        if not fits or self.rows[0] < 0 or self.rows[-1] >= self.num_rows:
            raise UserError(
                f"the {self.rows.size} candidates of {self.target!r} do not fit its scores "
                f"{list(self.scores.shape)} of {self.num_rows} images; give rows in "
                f"ascending order below {self.num_rows}, one for each score"
            )

    @property
    def num_images(self) -> int:
        return self.num_rows

    def ranked(self, damping_index: int, k: int, largest: bool = True) -> list[int]:
        """As there, among the candidates: right where the index found the extreme images."""
        return self.rows[ranking(self.scores[damping_index], largest, k)].tolist()

    def scores_of(self, damping_index: int, indices: list[int]) -> np.ndarray:
        """As there. KeyError for an image that is no candidate."""
        places = np.searchsorted(self.rows, indices)
        if (self.rows[np.minimum(places, len(self.rows) - 1)] != indices).any():
            raise KeyError("the score of an image that is no candidate is not known")
        return self.scores[damping_index, places]

    def spread(self, damping_index: int) -> tuple[np.ndarray, np.ndarray]:
        """As there, of the sample."""
        return self.sampled, self.sampled_scores[damping_index]

    def quality(self) -> list[dict[str, float]] | None:
        """None: average precision needs the scores of all images."""
        return None

    def chance(self) -> dict[str, float] | None:
        """None, as there is nothing to compare it with."""
        return None
