"""The results folder of one target concept, under the file names of the Concept-TRAK reference.

    query.png                           the picture that is explained
    topk-lambda_{l}.jpg                 picture grid with rank, score and caption
    topk-prompts-lambda_{l}.txt         TSV with header: rank, train|exemplar, idx, caption, score
    leastk-lambda_{l}.jpg, leastk-prompts-lambda_{l}.txt    the same of the other end
    metrics.json                        settings, provenance, and at each damping the metrics that
                                        truth allows

{l} is the damping relative to 0.1 x mean eigenvalue, 1.0e-04 ... 1.0e+04.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .. import atomic_io
from ..scoring.result import ConceptResult, lambda_label
from .context import ReportContext
from .pictures import load_pictures, picture_grid

HEADER = "rank\ttrain|exemplar\tidx\tcaption\tscore"


def image_bytes(picture: Image.Image, kind: str) -> bytes:
    """A picture as a file of `kind`, "PNG" or "JPEG"."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _table(
    indices: list[int], captions: list[str], scores: Sequence[float], num_train: int
) -> bytes:
    """TSV of a ranking; rows of the store from `num_train` on are exemplars, counted from 0."""
    lines, rows = [HEADER], zip(indices, captions, scores, strict=True)
    for rank, (i, caption, score) in enumerate(rows, start=1):
        place = f"train\t{i}" if i < num_train else f"exemplar\t{i - num_train}"
        lines.append(f"{rank}\t{place}\t{caption}\t{score:.6e}")
    return ("\n".join(lines) + "\n").encode()


def metrics_record(concept: ConceptResult, shown: ReportContext) -> dict:
    """The content of metrics.json. Metrics stand in it only where truth is known."""
    quality, fixed = concept.quality(), concept.damping_index(shown.fixed_damping)
    sweep = [
        {"damping": damping, "lambda": lambda_label(damping), **(quality[d] if quality else {})}
        for d, damping in enumerate(concept.dampings)
    ]
    record = {
        "target": concept.target,
        "negative_prompt": concept.negative_prompt,
        "num_train": concept.num_images,
        "top_k": shown.top_k,
        "score_sign": "high: removing this image would weaken the concept",
        "damping_unit": "mean eigenvalue of the Gram matrix; lambda: 0.1 x mean eigenvalue",
        "fixed": sweep[fixed],
        "dampings": sweep,
    }
    if concept.told:
        record["search"] = concept.told
    if quality:
        record["num_relevant"] = int(concept.relevant.sum())
        record["chance"] = concept.chance()
        record["oracle"] = sweep[concept.oracle_index()]
    return {**record, "settings": shown.settings, "provenance": shown.provenance}


def write_results(
    folder: Path,
    concept: ConceptResult,
    shown: ReportContext,
    *,
    render_leastk: bool,
    num_train: int | None = None,
) -> None:
    """Write the results folder of one target (see the module's docstring); `folder` is made if
    missing.

    num_train: rows from there on are exemplars (default: none are). metrics.json is written last:
    where it stands, the folder is complete. Raises UserError on scores for other rows or a fixed
    damping outside the sweep.
    """
    shown.check(concept)
    record = metrics_record(concept, shown)
    num_train = concept.num_images if num_train is None else num_train
    listings = {
        (end, d): concept.ranked(d, shown.top_k, largest=end == "topk")
        for end in (("topk", "leastk") if render_leastk else ("topk",))
        for d in range(len(concept.dampings))
    }
    pictures = load_pictures(shown.dataset, [i for ranked in listings.values() for i in ranked])
    folder = atomic_io.make_folder(Path(folder))
    atomic_io.write_bytes(folder / "query.png", image_bytes(shown.picture, "PNG"))
    for (end, d), indices in listings.items():
        label, scores = lambda_label(concept.dampings[d]), concept.scores_of(d, indices)
        # A tab or newline would break the table.
        captions = [" ".join(shown.dataset.captions[i].split()) for i in indices]
        notes = [f"{rank}   {score:+.3e}" for rank, score in enumerate(scores, start=1)]
        grid = picture_grid([pictures[i] for i in indices], captions, notes)
        table = _table(indices, captions, scores, num_train)
        atomic_io.write_bytes(folder / f"{end}-lambda_{label}.jpg", image_bytes(grid, "JPEG"))
        atomic_io.write_bytes(folder / f"{end}-prompts-lambda_{label}.txt", table)
    content = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    atomic_io.write_bytes(folder / "metrics.json", content.encode())
