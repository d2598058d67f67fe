"""The results folder of one target concept, under the file names of the Concept-TRAK reference.

query.png                               the picture that is explained
topk-lambda_{l}.jpg, leastk-lambda_{l}.jpg              picture grid with rank, score and caption
topk-prompts-lambda_{l}.txt, leastk-prompts-lambda_{l}.txt   TSV with header: rank, train|exemplar, idx, caption
metrics.json                            settings, provenance, and at each damping the metrics that truth allows

{l} is the damping relative to 0.1 x mean eigenvalue, 1.0e-04 ... 1.0e+04.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..scoring.concept import ConceptResult, lambda_label
from .pictures import load_pictures, picture_grid

HEADER = "rank\ttrain|exemplar\tidx\tcaption"


def write_atomic(path: Path, content: bytes) -> None:
    """Write to `<name>.part`, then rename: the final name only ever holds complete content."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def check_arguments(concept: ConceptResult, dataset, top_k: int) -> None:
    """UserError unless the scores are for this dataset's rows and top_k can be shown."""
    if concept.num_images != len(dataset.captions):
        raise UserError(
            f"scores of {concept.target!r} are for {concept.num_images} images but the dataset "
            f"has {len(dataset.captions)}: "
            "pass the train split that was scored"
        )
    if top_k < 1:
        raise UserError(f"TOP_K is {top_k}: show at least 1 picture")


def _image_bytes(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _write_listing(
    folder: Path,
    end: str,
    concept: ConceptResult,
    d: int,
    indices: list[int],
    pictures,
    dataset,
    num_train: int,
) -> None:
    """The JPG grid and the TSV of one end ("topk" or "leastk") of the ranking at one damping."""
    label = lambda_label(concept.dampings[d])
    captions = [
        " ".join(dataset.captions[index].split()) for index in indices
    ]  # a tab or newline would break the TSV
    notes = [
        f"{rank}   {concept.scores[d, index]:+.3e}" for rank, index in enumerate(indices, start=1)
    ]
    grid = picture_grid([pictures[index] for index in indices], captions, notes)
    write_atomic(folder / f"{end}-lambda_{label}.jpg", _image_bytes(grid, "JPEG"))
    places = [
        f"train\t{index}" if index < num_train else f"exemplar\t{index - num_train}"
        for index in indices
    ]
    rows = [
        f"{rank}\t{place}\t{text}"
        for rank, (place, text) in enumerate(zip(places, captions), start=1)
    ]
    write_atomic(
        folder / f"{end}-prompts-lambda_{label}.txt", ("\n".join([HEADER, *rows]) + "\n").encode()
    )


def metrics_record(
    concept: ConceptResult, top_k: int, settings: dict, provenance: dict, fixed_damping: float
) -> dict:
    """The content of metrics.json. Metrics stand in it only where truth is known."""
    quality, fixed = concept.quality(), concept.damping_index(fixed_damping)
    sweep = [
        {"damping": damping, "lambda": lambda_label(damping), **(quality[d] if quality else {})}
        for d, damping in enumerate(concept.dampings)
    ]
    record = {
        "target": concept.target,
        "negative_prompt": concept.negative_prompt,
        "num_train": concept.num_images,
        "top_k": top_k,
        "score_sign": "high: removing this image would weaken the concept",
        "damping_unit": "mean eigenvalue of the Gram matrix; lambda: 0.1 x mean eigenvalue",
        "fixed": sweep[fixed],
        "dampings": sweep,
    }
    if quality:
        record["num_relevant"] = int(concept.relevant.sum())
        record["chance"] = concept.chance()
        record["oracle"] = sweep[concept.oracle_index()]
    return {**record, "settings": settings, "provenance": provenance}


def write_results(
    folder: Path,
    *,
    query_image: Image.Image,
    concept: ConceptResult,
    dataset,
    top_k: int,
    settings: dict,
    provenance: dict,
    render_leastk: bool,
    fixed_damping: float,
    num_train: int | None = None,
) -> None:
    """Write the results folder of one target (see the module's docstring); `folder` is made if
    missing.

    dataset: ImageCaptionDataset of the N scored train rows. top_k: pictures a listing.
    fixed_damping: one of `concept.dampings`, the damping chosen without looking at this query.
    metrics.json is written last: where it stands, the folder is complete. num_train: rows from
    there on are exemplars (default: none are). Raises UserError on scores for other rows or a
    damping outside the sweep.
    """
    check_arguments(concept, dataset, top_k)
    record = metrics_record(concept, top_k, settings, provenance, fixed_damping)
    ends = {"topk": True, "leastk": False} if render_leastk else {"topk": True}
    listings = {
        (end, d): concept.ranked(d, top_k, largest)
        for end, largest in ends.items()
        for d in range(len(concept.dampings))
    }
    pictures = load_pictures(dataset, [index for indices in listings.values() for index in indices])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "query.png", _image_bytes(query_image, "PNG"))
    for (end, d), indices in listings.items():
        _write_listing(
            folder,
            end,
            concept,
            d,
            indices,
            pictures,
            dataset,
            concept.num_images if num_train is None else num_train,
        )
    content = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    write_atomic(folder / "metrics.json", content.encode())
