"""An answer as JSON, read from its folder: the same whoever made it, this service, another one, or
the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..attribution.answer import caption_fits
from ..attribution.task import AttributionTask
from ..datasets import labels
from ..datasets.image_folder import ImageCaptionDataset
from ..errors import UserError, remove_hint
from ..report.pictures import data_uri, load_pictures
from ..report.saved_answer import PAGE, read_asked
from ..report.scores import CANDIDATE_ROWS, CANDIDATES, CSV, NPY
from ..report.write import pictures_digest
from ..scoring.ranking import ranking
from ..store.store import Store
from ..validated_io import read_json, read_npy, safe_join

METRICS = "metrics.json"


class ImageResponse(BaseModel):
    """A training picture in a ranking.

    match: whether its labels name the concept, where there are labels. fit: about 1 where its
    caption fits it, below 0.5 where it may be wrong. picture, thumbnail: addresses, or a data URL.
    """

    model_config = ConfigDict(extra="forbid")
    rank: int
    index: int
    score: float
    file_name: str
    caption: str
    match: bool | None = None
    fit: float | None = None
    picture: str
    thumbnail: str | None = None


class ConceptResponse(BaseModel):
    """A concept. top, least: the highest (lowest) scores first. metrics: of labelled data. search:
    how an index found them, where one did.
    """

    model_config = ConfigDict(extra="forbid")
    concept: str
    negative_prompt: str
    top: list[ImageResponse]
    least: list[ImageResponse]
    metrics: dict[str, float] | None
    chance: dict[str, float] | None
    search: str | None = None
    files: dict[str, str]


class AnswerResponse(BaseModel):
    """An answer. unseen: true if the prompt is a held-out caption, false if a training one."""

    model_config = ConfigDict(extra="forbid")
    id: str
    status: Literal["answered"]
    prompt: str
    unseen: bool | None
    warnings: list[str]
    num_images: int
    score_sign: str
    damping: float
    concepts: list[ConceptResponse]
    picture: str
    report: str
    settings: dict[str, Any]
    provenance: dict[str, Any]


class StatusResponse(BaseModel):
    """A question that is not answered yet. before: questions that are answered first."""

    model_config = ConfigDict(extra="forbid")
    id: str
    status: Literal["queued", "being answered"]
    before: int
    seconds: float
    answer: str


class ErrorResponse(BaseModel):
    """What is wrong, in one sentence."""

    error: str


@dataclass(frozen=True)
class StoredScores:
    """The scores [M] that an answer knows, the pictures [M] they are of, and their file's name."""

    rows: np.ndarray
    scores: np.ndarray
    file: str


class AnswerSerializer:
    """Tells answers about the train pictures of a task."""

    def __init__(self, task: AttributionTask, store: Store) -> None:
        self.data: ImageCaptionDataset = task.train
        self.fit = caption_fits(task, store)
        self.digest = pictures_digest(self.data)

    def told(self, folder: Path, thumbnails: str = "links") -> dict[str, Any]:
        """The answer in `folder`.

        thumbnails: links, data (data URLs) or none. UserError for a folder that is not whole.
        """
        mend = remove_hint(folder, "ask again")
        asked = read_asked(folder)
        settings, base = asked["settings"], f"/answers/{folder.name}"
        if asked["pictures"]["digest"] != self.digest:
            raise UserError(
                f"{folder.name} is about other pictures than this service's; its page is "
                f"{base}/{PAGE}, and the question is asked again with POST /answers"
            )
        records = [read_json(folder / f / METRICS, mend) for f in asked["folders"]]
        row = int(np.argmin(np.abs(np.log(np.array(asked["dampings"]) / settings["damping"]))))
        concepts = []
        for name, record in zip(asked["folders"], records, strict=True):
            by_index = asked.get("search") == "index"
            file = safe_join(folder, f"{name}/{CANDIDATES if by_index else NPY}", "the file")
            values = read_npy(file, mend, dims=2)[row]
            rows = np.arange(len(values))
            if by_index:
                rows = read_npy(file.with_name(CANDIDATE_ROWS), mend, dims=1).astype(np.int64)
            known = StoredScores(rows, values, file.name)
            concepts.append(self._concept(record, known, f"{base}/{name}", settings["top_k"]))
        if thumbnails == "data":
            self._embed(concepts)
        elif thumbnails == "none":
            for card in _cards(concepts):
                del card["thumbnail"]
        return {
            "id": folder.name,
            "status": "answered",
            "prompt": asked["prompt"],
            "unseen": asked["unseen"],
            "warnings": asked["warnings"],
            "num_images": len(self.data),
            "score_sign": records[0]["score_sign"],
            "damping": settings["damping"],
            "concepts": concepts,
            "picture": f"{base}/{asked['folders'][0]}/query.png",
            "report": f"{base}/{PAGE}",
            "settings": records[0]["settings"],
            "provenance": records[0]["provenance"],
        }

    def _concept(
        self, record: dict[str, Any], known: StoredScores, base: str, top_k: int
    ) -> dict[str, Any]:
        truth = labels.relevance_or_none(self.data, record["target"])
        ends = {
            end: [
                self._card(rank, int(known.rows[i]), float(known.scores[i]), truth)
                for rank, i in enumerate(ranking(known.scores, largest, top_k), 1)
            ]
            for end, largest in (("top", True), ("least", False))
        }
        quality = {k: v for k, v in record["fixed"].items() if k not in ("damping", "lambda")}
        files = {
            "csv": f"{base}/{CSV}",
            "npy": f"{base}/{known.file}",
            METRICS: f"{base}/{METRICS}",
        }
        return {
            "concept": record["target"],
            "negative_prompt": record["negative_prompt"],
            **ends,
            "metrics": quality or None,
            "chance": record.get("chance"),
            "search": record.get("search"),
            "files": files,
        }

    def _card(
        self, rank: int, index: int, score: float, truth: np.ndarray | None
    ) -> dict[str, Any]:
        card: dict[str, Any] = {
            "rank": rank,
            "index": index,
            "score": score,
            "file_name": self.data.records[index].get("file_name", ""),
            "caption": self.data.captions[index],
        }
        if truth is not None:
            card["match"] = bool(truth[index])
        if self.fit is not None:
            card["fit"] = round(float(self.fit[index]), 3)
        return card | {"picture": f"/pictures/{index}", "thumbnail": f"/thumbnails/{index}"}

    def _embed(self, concepts: Sequence[dict[str, Any]]) -> None:
        cards = _cards(concepts)
        shown = load_pictures(self.data, [card["index"] for card in cards])
        urls = {index: data_uri(picture) for index, picture in shown.items()}
        for card in cards:
            card["thumbnail"] = urls[card["index"]]


def _cards(concepts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [card for c in concepts for end in ("top", "least") for card in c[end]]
