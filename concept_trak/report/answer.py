"""An answer on disk: a folder of its own, which appears when it is whole. In it report.html, one
page on all targets, question.json, and a folder a target with the files of the reference:

query_noise.safetensors, query_xT.safetensors, query_meta.json    the picture's noise and latents
concept_grad.npy, concept_grad.json                               the kept query row
and what `results` and `page` write
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save

from ..attribution.answer import Answer, answer
from ..attribution.corpus import Corpus
from ..attribution.plan import question_folder
from ..attribution.prompts import target_slug
from ..attribution.question import Picture, Question
from ..attribution.rankers import GradientRanker
from ..files import atomic_folder, make_folder, write_bytes, write_json
from ..settings import Settings, as_dict, digest
from ..store.cached import cached_array
from .index import PAGE, QUESTION, write_index
from .page import write_report
from .results import write_results
from .shown import Shown

ROWS = ".rows"  # folder of the query rows, beside the answers


def attribute(corpus: Corpus) -> Path:
    """Answer the settings of `corpus` and write it; returns the path of report.html.

    Query rows are kept beside the answers by what they were made from, so that another damping, or
    another number of pictures, does not make them again.
    """
    s, kept = corpus.settings, []

    def kept_rows(ranker: GradientRanker, questions: list[Question]) -> np.ndarray:
        rows = []
        for question in questions:
            identity = ranker.identity(question)
            name = f"{target_slug(question.words)}-{digest(json.loads(json.dumps(identity)))}.npy"
            kept.append(Path(s.results_dir) / "free_query" / ROWS / name)
            make = functools.partial(ranker.row, question)
            row = cached_array(kept[-1], identity, make, s.force_recompute_concept_grad)
            if row.shape != (1, corpus.projection.proj_dim):  # a file that lies about itself
                row = cached_array(kept[-1], identity, make, force=True)
            rows.append(row)
        return np.concatenate(rows)

    return write_answer(answer(corpus, kept_rows), s, kept)


def write_answer(found: Answer, settings: Settings, rows: Sequence[Path] = ()) -> Path:
    """Write an answer into a folder of its own, which appears when it is whole; returns the path of
    its page.

    rows: files of the query rows, one a question, of which copies are kept with it.
    """
    s = settings
    shown = Shown(
        Image.fromarray(found.picture.pixels),
        found.dataset,
        s.top_k,
        s.damping,
        found.settings,
        found.provenance,
        found.fit,
    )
    folder = question_folder(s, found.settings["store_checksum"])
    with atomic_folder(folder) as made:
        for i, (question, concept) in enumerate(zip(found.questions, found.concepts, strict=True)):
            target = make_folder(made / f"target_{target_slug(question.words)}")
            meta = {"prompt": s.prompt, "target": question.words, "plus": question.plus}
            meta |= {"negative": question.minus, "settings": as_dict(s)}
            save_query(target, found.picture, meta | {"provenance": found.provenance})
            for path in (rows[i], rows[i].with_suffix(".json")) if rows else ():
                write_bytes(target / f"concept_grad{path.suffix}", path.read_bytes())
            write_results(target, concept, shown, render_leastk=s.render_leastk)
        about = {"unseen": found.unseen, "warnings": found.warnings}
        write_report(made / PAGE, s.prompt, found.concepts, shown, **about)
        asked = {"prompt": s.prompt, "targets": [q.words for q in found.questions]}
        write_json(made / QUESTION, asked | {"settings": as_dict(s)})
    write_index(folder)
    return folder / PAGE


def save_query(folder: Path, asked: Picture, meta: dict) -> None:
    """Noise and latents as safetensors (no pickles); the picture itself comes with the results."""
    x_T, x0 = asked.x_T.cpu().contiguous(), asked.x0.cpu().contiguous()
    write_bytes(folder / "query_noise.safetensors", save({"noise": x_T}))
    write_bytes(folder / "query_xT.safetensors", save({"x_T": x_T, "x0": x0}))
    write_json(folder / "query_meta.json", meta)
