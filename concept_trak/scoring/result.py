"""The scores of all training images for one concept, at every damping, and what they are worth
where truth is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from . import metrics
from .ranking import ranking

METRIC_K = 10  # Recall@10 and least-10, whatever number of pictures is shown
# File names and the damping switch count in units of 0.1 * trace(K) / k.
MEAN_EIGENVALUE_FRACTION = 0.1


def lambda_label(damping: float) -> str:
    """Name of a damping in file names: relative to 0.1 x mean eigenvalue, so 1e-5 -> "1.0e-04"."""
    return f"{damping / MEAN_EIGENVALUE_FRACTION:.1e}"


@dataclass
class ConceptResult:
    """One target concept, scored.

    target:          the concept in the prompt's words, e.g. "elephant"
    negative_prompt: the prompt without the concept, against which the query gradient was taken
    scores:          float [D, N]; high = removing this training image would weaken the concept
    dampings:        D values, each relative to the mean eigenvalue of the Gram matrix:
                     lambda = damping trace(K) / k
    relevant:        bool [N], which images carry the concept; None where no labels exist

    Raises UserError if the shapes disagree, a score is not finite, or two dampings share a file
    name.
    """

    target: str
    negative_prompt: str
    scores: np.ndarray
    dampings: tuple[float, ...]
    relevant: np.ndarray | None = None
    told = ""  # how the scores were found, where that was not by scoring every image

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.dampings = tuple(float(damping) for damping in self.dampings)
        self._check_scores()
        if self.relevant is not None:
            self.relevant = np.asarray(self.relevant, dtype=bool)
            if self.relevant.shape != (self.num_images,):
                raise UserError(
                    f"truth of {self.target!r} is for {self.relevant.size} images, scores for "
                    f"{self.num_images}; give relevant a value for each image of scores"
                )

    def _check_scores(self) -> None:
        shape, num_dampings = self.scores.shape, len(self.dampings)
        if len(shape) != 2 or shape[0] != num_dampings or 0 in shape:
            raise UserError(
                f"scores of {self.target!r} have shape {shape}; give scores "
                f"[{num_dampings} dampings, N images]"
            )
        if not np.isfinite(self.scores).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(self.scores))[0])
            raise UserError(
                f"score of {self.target!r} for training image {column} at damping "
                f"{self.dampings[row]:g} is not finite; make the scores again with "
                "FORCE_RECOMPUTE_CONCEPT_GRAD=1"
            )
        if len(set(map(lambda_label, self.dampings))) < num_dampings:
            raise UserError(
                f"dampings {self.dampings} of {self.target!r} share a file name; leave "
                "one out of dampings"
            )

    @property
    def num_images(self) -> int:
        return self.scores.shape[1]

    @property
    def has_truth(self) -> bool:
        """Labels exist and a training image carries the concept: otherwise recall is undefined."""
        return self.relevant is not None and bool(self.relevant.any())

    def damping_index(self, damping: float) -> int:
        """Position of `damping` in the sweep; UserError names the sweep where it lacks it."""
        close = np.flatnonzero(np.isclose(self.dampings, damping, rtol=1e-6, atol=0))
        if close.size == 0:
            raise UserError(
                f"damping {damping:g} is not in the sweep of {self.target!r}; set DAMPING to one "
                f"of {self.dampings}"
            )
        return int(close[0])

    def ranked(self, damping_index: int, k: int, largest: bool = True) -> list[int]:
        """k training indices from the highest (lowest) score on; equal scores by index."""
        return ranking(self.scores[damping_index], largest, k).tolist()

    def scores_of(self, damping_index: int, indices: list[int]) -> np.ndarray:
        """[n] scores of the given training images."""
        return self.scores[damping_index, indices]

    def spread(self, damping_index: int) -> tuple[np.ndarray, np.ndarray]:
        """(training images [n], their scores [n]) that show how all scores are spread."""
        return np.arange(self.num_images), self.scores[damping_index]

    def quality(self) -> list[dict[str, float]] | None:
        """Recall@10, average precision and least-10 recall at each damping; None without truth."""
        if not self.has_truth:
            return None
        columns = {
            "recall_at_10": metrics.recall_at_k(self.scores, self.relevant, METRIC_K),
            "average_precision": metrics.average_precision(self.scores, self.relevant),
            "least_10_recall": metrics.least_k_recall(self.scores, self.relevant, METRIC_K),
        }
        return [
            {name: float(column[d]) for name, column in columns.items()}
            for d in range(len(self.dampings))
        ]

    def chance(self) -> dict[str, float] | None:
        """What a random order would score on each metric of `quality`; None without truth."""
        if not self.has_truth:
            return None
        counts = self.num_images, int(self.relevant.sum())
        recall = metrics.chance_recall_at_k(*counts, METRIC_K)
        precision = metrics.chance_average_precision(*counts)
        return {"recall_at_10": recall, "average_precision": precision, "least_10_recall": recall}

    def oracle_index(self) -> int | None:
        """The damping with the best Recall@10 (then average precision, then the smallest): it peeks
        at the truth. None without truth.
        """
        quality = self.quality()
        if quality is None:
            return None
        worth = [(row["recall_at_10"], row["average_precision"]) for row in quality]
        return max(range(len(worth)), key=worth.__getitem__)  # the first of equal ones
