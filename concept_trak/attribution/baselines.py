"""Controls: rankers that know nothing of the model's training, to be reported beside attribution.

    pixel_neighbours    -||x_i - x_q||_2 on RGB pictures at the model's size
    latent_neighbours   -||z_i - z_q||_2 on VAE latents
    caption_similarity  share of the concept's words in the caption
    random              a fixed random order for each question

Captions name the truth in the emoji data, so the last is what text alone finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..datasets.caption_overlap import caption_overlap
from ..registry import RANKERS

if TYPE_CHECKING:
    from .question import Query
    from .task import AttributionTask


class Baseline:
    """A ranker without dampings: `similarity` [Q, N] of questions and training images."""

    control = True

    def __init__(self, task: AttributionTask) -> None:
        self.task = task

    def rank(self, questions: Sequence[Query]) -> np.ndarray:
        """[1, Q, N]; see `attribution.attributors.Attributor`."""
        return self.similarity(questions)[None]

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """[Q, N]."""
        raise NotImplementedError


@RANKERS.register("pixel_neighbours")
class PixelNeighbours(Baseline):
    """RGB values."""

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """Minus the distance of the pictures."""
        train, size = self.task.train, self.task.model.image_size
        shown = np.stack([q.picture.pixels for q in questions])
        return -distances(_flat(shown), _flat(train.images(range(len(train)), size=size)))


@RANKERS.register("latent_neighbours")
class LatentNeighbours(Baseline):
    """What the autoencoder makes of them."""

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """Minus the distance of the latents."""
        latents = np.concatenate([q.picture.x0.float().cpu().numpy() for q in questions])
        return -distances(_flat(latents), _flat(self.task.latents.float().numpy()))


@RANKERS.register("caption_similarity")
class CaptionSimilarity(Baseline):
    """Words."""

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """The share of the concept's words."""
        captions, known = self.task.train.captions, {}
        for words in {q.words for q in questions}:
            known[words] = caption_overlap(words, captions)
        return np.stack([known[q.words] for q in questions])


@RANKERS.register("random")
class Random(Baseline):
    """Chance, with its spread."""

    def similarity(self, questions: Sequence[Query]) -> np.ndarray:
        """Uniform numbers from a seed: the question's place."""
        count = len(self.task.train)
        return np.stack([np.random.default_rng(i).random(count) for i in range(len(questions))])


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32)


def distances(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Euclidean distances [Q, N] of [Q, D] and [N, D]."""
    square = (queries**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * queries @ rows.T
    return np.sqrt(np.maximum(square, 0))
