"""An answer on disk: a folder a target, named as in the reference, and one page on all of them.

query_noise.safetensors, query_xT.safetensors, query_meta.json    the picture's noise and latents
concept_grad.npy, concept_grad.json                               the kept query row
and what `results` and `page` write
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save

from ..attribution.answer import Answer, answer
from ..attribution.corpus import Corpus
from ..attribution.plan import query_folders
from ..attribution.question import Picture, Question
from ..attribution.rankers import GradientRanker
from ..files import write_bytes, write_json
from ..settings import Settings, as_dict
from ..store.cached import cached_array
from .page import write_report
from .results import write_results
from .shown import Shown


def attribute(corpus: Corpus) -> Path:
    """Answer the settings of `corpus` and write it; returns the path of report.html."""
    s = corpus.settings

    def kept_rows(ranker: GradientRanker, questions: list[Question]) -> np.ndarray:
        _, folders = query_folders(s, [q.words for q in questions])
        rows = [
            cached_array(
                folder / "concept_grad.npy",
                ranker.identity(question),
                lambda question=question: ranker.row(question),
                s.force_recompute_concept_grad,
            )
            for folder, question in zip(folders, questions, strict=True)
        ]
        return np.concatenate(rows)

    return write_answer(answer(corpus, kept_rows), s)


def write_answer(found: Answer, settings: Settings) -> Path:
    """Write the folders of an answer and, last, its page; returns the path of that."""
    s = settings
    report, folders = query_folders(s, [q.words for q in found.questions])
    shown = Shown(
        Image.fromarray(found.picture.pixels),
        found.dataset,
        s.top_k,
        s.damping,
        found.settings,
        found.provenance,
    )
    for folder, question, concept in zip(folders, found.questions, found.concepts, strict=True):
        meta = {"prompt": s.prompt, "target": question.words, "plus": question.plus}
        meta |= {"negative": question.minus, "settings": as_dict(s)}
        save_query(folder, found.picture, meta | {"provenance": found.provenance})
        write_results(folder, concept, shown, render_leastk=s.render_leastk)
    report.mkdir(parents=True, exist_ok=True)
    page = report / "report.html"
    write_report(
        page, s.prompt, found.concepts, shown, unseen=found.unseen, warnings=found.warnings
    )
    return page


def save_query(folder: Path, asked: Picture, meta: dict) -> None:
    """Noise and latents as safetensors (no pickles); the picture itself comes with the results."""
    folder.mkdir(parents=True, exist_ok=True)
    x_T, x0 = asked.x_T.cpu().contiguous(), asked.x0.cpu().contiguous()
    write_bytes(folder / "query_noise.safetensors", save({"noise": x_T}))
    write_bytes(folder / "query_xT.safetensors", save({"x_T": x_T, "x0": x0}))
    write_json(folder / "query_meta.json", meta)
