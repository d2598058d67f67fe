"""What rankers are asked on a small model: the concepts of every held-out picture.

A concept's score is the mean over the held-out pictures that show it, the very pictures on which
its presence is measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from concept_trak.attribution.prompts import contrast_prompts
from concept_trak.attribution.question import Query, QueryImage
from concept_trak.attribution.task import AttributionTask
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.models.text_to_image import TextToImage

from .subsets import KINDS, Subset, with_captions


def task_of(task: AttributionTask, model: TextToImage, subset: Subset) -> AttributionTask:
    """A small model and the pictures, under the captions that it learned; latents are shared."""
    data = copy.copy(task.data)
    data.model, data.pictures = model, with_captions(task.data.pictures, subset)
    other = task.with_data(data)
    other.__dict__.pop("cond_null", None)
    other.model = model
    return other


@dataclass(frozen=True)
class ConceptQueries:
    """Questions about concepts. of {kind: [(concept, its places among `questions`)]}."""

    questions: list[Query]
    of: dict[str, dict[str, list[int]]]

    def mean(self, values: np.ndarray, kind: str, names: list[str]) -> np.ndarray:
        """Scores [D, Q, N] of the questions -> those of the concepts [D, len(names), N]."""
        return np.stack([values[:, self.of[kind][name]].mean(1) for name in names], 1)


def make_queries(task: AttributionTask, held_out: ImageCaptionDataset) -> ConceptQueries:
    """Both concepts of every held-out picture, as its real pixels show it."""
    model, content = task.model, held_out.content_hash()
    pixels = held_out.images(range(len(held_out)), size=model.image_size)
    questions: list[Query] = []
    of: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    parts = zip(held_out.records, model.encode_images(pixels).split(1), pixels, strict=True)
    for row, (record, x0, shown) in enumerate(parts):
        picture = QueryImage(held_out.captions[row], x0, None, shown, {"real": [content, row]})
        words = [record[f"{kind}_phrase"] for kind in KINDS]
        pairs = contrast_prompts(task.settings.query_form, picture.prompt, words)
        for kind, word, (plus, minus) in zip(KINDS, words, pairs, strict=True):
            of[kind].setdefault(record[kind], []).append(len(questions))
            questions.append(Query(picture, word, plus, minus, kind))
    return ConceptQueries(questions, of)
