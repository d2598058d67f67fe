"""An answer on disk: a folder of its own, which appears when it is whole. In it report.html, one
page on all targets, question.json, and a folder a target with the files of the reference:

query_noise.safetensors, query_xT.safetensors, query_meta.json    the picture's noise and latents
concept_grad.npy, concept_grad.json                               the kept query row
and what `results`, `scores` and `page` write
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from ..atomic_io import atomic_folder, make_folder, write_bytes, write_json
from ..attribution.answer import AttributionResult, answer, generate_query_image
from ..attribution.attributors import GradientAttributor
from ..attribution.naming import answer_folder
from ..attribution.prompts import target_folders, target_slug
from ..attribution.question import Query, QueryImage, picture_identity
from ..attribution.task import AttributionTask
from ..datasets import ImageCaptionDataset
from ..datasets.image_folder import looks
from ..flags import command
from ..settings import COMPONENT_FIELDS, ROOT, Settings, as_dict, short_hash
from ..store.array_cache import cached
from ..store.store import Store
from .answers_index import write_index
from .context import ConceptWeights, Links, ReportContext
from .page import write_report
from .results import write_results
from .saved_answer import PAGE, QUESTION, checksums
from .scores import CANDIDATE_ROWS, CANDIDATES, CSV, NPY, npy_of, write_scores

ROWS = ".rows"  # folder of the query rows, beside the answers
# stages and fields that an answer is asked with
QUERY_SETTINGS = (
    *("question", "generation", "query", "scoring", "report", "methods", "results_dir", "rows"),
    *("projection", "grad_dir", "batch_size", "num_train", "model", "data_dir", *COMPONENT_FIELDS),
)


def attribute(task: AttributionTask, store: Store | None = None) -> Path:
    """Answer the settings of `task` and write it; returns the path of report.html. See `ask`."""
    found, kept = ask(task, store)
    weights: list[ConceptWeights] = []
    if task.settings.weights:
        from .component_section import of_concepts  # diffusion, which a page does without

        weights = of_concepts(task)
    return write_answer(found, task.settings, kept, weights)


def ask(task: AttributionTask, store: Store | None = None) -> tuple[AttributionResult, list[Path]]:
    """(answer to the settings of `task`, files of its query rows). store: see `answer`.

    Query rows and the picture are kept beside the answers by what they were made from, so that
    another damping, or another number of pictures, does not make them again.
    """
    s, kept = task.settings, list[Path]()
    force = s.force_recompute_concept_grad

    def kept_rows(ranker: GradientAttributor, questions: list[Query]) -> np.ndarray:
        rows = []
        for question in questions:
            identity = ranker.identity(question)
            name = (
                f"{target_slug(question.words)}-{short_hash(json.loads(json.dumps(identity)))}.npy"
            )
            kept.append(Path(s.results_dir) / "free_query" / ROWS / name)
            make = functools.partial(ranker.row, question)
            shape = (1, task.projection.proj_dim)
            rows.append(cached(kept[-1], identity, make, force, shape))
        return np.concatenate(rows)

    def kept_picture(task: AttributionTask) -> QueryImage:
        made_from, drawings = picture_identity(task.model, s), []
        name = f"picture-{short_hash(json.loads(json.dumps(made_from)))}.npy"

        def draw() -> np.ndarray:
            drawings.append(generate_query_image(task))
            return drawings[0].x0.float().cpu().numpy()

        path = Path(s.results_dir) / "free_query" / ROWS / name
        x0 = cached(path, made_from, draw, force, (1, *task.model.latent_shape))
        return drawings[0] if drawings else generate_query_image(task, torch.from_numpy(x0))

    return answer(task, kept_rows, kept_picture, store), kept


def write_answer(
    found: AttributionResult,
    settings: Settings,
    rows: Sequence[Path] = (),
    weights: Sequence[ConceptWeights] = (),
) -> Path:
    """Write an answer into a folder of its own, which appears when it is whole; returns the path of
    its page.

    rows: files of the query rows, one a question, of which copies are kept with it. weights: what
    they have to do with each concept, where that was asked.
    """
    s = settings
    folder = answer_folder(s, found.settings["store_checksum"])
    names = target_folders([question.words for question in found.questions])
    shown = ReportContext(
        Image.fromarray(found.picture.pixels),
        found.dataset,
        s.top_k,
        s.damping,
        found.settings,
        found.provenance,
        found.fit,
        _links(found, folder, names),
        weights,
        command("attribute", s, QUERY_SETTINGS, weights="1"),
    )
    with atomic_folder(folder) as made:
        for i, (question, concept) in enumerate(zip(found.questions, found.concepts, strict=True)):
            target = make_folder(made / names[i])
            meta = {"prompt": s.prompt, "target": question.words, "plus": question.plus}
            meta |= {"negative": question.minus, "settings": as_dict(s)}
            save_query(target, found.picture, meta | {"provenance": found.provenance})
            for path in (rows[i], rows[i].with_suffix(".json")) if rows else ():
                write_bytes(target / f"concept_grad{path.suffix}", path.read_bytes())
            write_results(target, concept, shown, render_leastk=s.render_leastk)
            write_scores(target, concept, shown, {k: v[:, i] for k, v in found.others.items()})
        about = {"unseen": found.unseen, "warnings": found.warnings}
        write_report(made / PAGE, s.prompt, found.concepts, shown, **about)
        asked = {"prompt": s.prompt, "settings": as_dict(s), "files": checksums(made)}
        write_json(made / QUESTION, _asked(found, names) | asked)
    write_index(folder)
    return folder / PAGE


def _links(found: AttributionResult, folder: Path, names: Sequence[str]) -> Links:
    """From the page in `folder`. names: of the concepts' own folders."""
    named = {NPY: "scores.npy (every damping)", CSV: "scores.csv (the fixed damping)"}
    if any(concept.told for concept in found.concepts):
        named = {CANDIDATES: "candidates.npy (every damping)", CANDIDATE_ROWS: "their rows"}
        named[CSV] = "scores.csv (the fixed damping)"
    named |= {npy_of(name): f"{name}, every damping" for name in found.others}
    files = {
        q.words: {what: f"{quote(name)}/{quote(file)}" for file, what in named.items()}
        for q, name in zip(found.questions, names, strict=True)
    }

    def url(path: Path) -> str:
        return quote(os.path.relpath(path, folder))

    return Links(lambda i: url(found.dataset.path(i)), files, url)


def _asked(found: AttributionResult, names: Sequence[str]) -> dict[str, Any]:
    """What the explorer and the index read of an answer."""
    data = found.dataset
    return {
        "targets": [q.words for q in found.questions],
        "negatives": [q.minus for q in found.questions],
        "folders": list(names),
        "methods": list(found.others),
        "dampings": list(found.concepts[0].dampings),
        "search": found.settings["search"],
        "unseen": found.unseen,
        "warnings": found.warnings,
        "pictures": {
            "root": str(data.root.resolve()).removeprefix(f"{ROOT}/"),
            "digest": pictures_digest(data),
            "looks": looks(data),
        },
    }


def pictures_digest(data: ImageCaptionDataset) -> str:
    """Of the names and captions of pictures, in their order."""
    names = [str(record.get("file_name", i)) for i, record in enumerate(data.records)]
    return short_hash([names, data.captions])


def save_query(folder: Path, asked: QueryImage, meta: dict) -> None:
    """Noise and latents as safetensors (no pickles); the picture itself comes with the results."""
    x_T, x0 = asked.x_T.cpu().contiguous(), asked.x0.cpu().contiguous()
    write_bytes(folder / "query_noise.safetensors", save({"noise": x_T}))
    write_bytes(folder / "query_xT.safetensors", save({"x_T": x_T, "x0": x0}))
    write_json(folder / "query_meta.json", meta)
