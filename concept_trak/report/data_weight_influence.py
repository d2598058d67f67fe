"""Which training pictures put a concept into which weights, on disk.

RESULTS_DIR/cad/images-{name}-{hash}/
influence.npy     [N, groups] float32, see `components.data_influence`
influence.csv     rank, score, file_name, caption, the three groups that it went through most
influence.png     heat map of the highest pictures, and of what shows the concept and what does not
influence.json    groups, totals, settings and versions
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..atomic_io import atomic_folder, link, write_bytes, write_json
from ..attribution.naming import train_timesteps
from ..attribution.prompts import slug
from ..attribution.task import AttributionTask
from ..components.concept_plan import ComponentQuery
from ..components.data_influence import (
    ComponentSplitter,
    ImageComponentInfluence,
    gradient_of,
    group_names,
)
from ..components.objective import COMPONENT_OBJECTIVES
from ..components.parameter_groups import select
from ..components.states import Sampling
from ..datasets.image_folder import ImageCaptionDataset
from ..datasets.labels import relevance_or_none
from ..errors import UserError
from ..gradients.states import train_states_of
from ..registry import OBJECTIVES
from ..settings import as_dict, provenance, results_folder, short_hash
from .component_report import concept_prompts
from .tables import csv_bytes

SHOWN, NAMED = 24, 3  # pictures of the map and the table's beginning; groups named for each
HEADER = ("rank", "score", "file_name", "caption", "through")


def influence_of(task: AttributionTask, prompt: str) -> ImageComponentInfluence:
    """Of all training pictures on J_erase of a prompt, through the weights of SELECTION."""
    s, model = task.settings, task.model
    if s.granularity not in ("module", "head"):
        raise UserError(
            f"GRANULARITY={s.granularity} is too fine for this; set GRANULARITY to module or head"
        )
    chosen, aim = select(model.network, s.selection), COMPONENT_OBJECTIVES["erase"]
    asked = ComponentQuery(
        prompt, s.base_prompt, s.score_seeds, Sampling(s.gen_guidance_scale, 20, 10)
    )
    states = [x for seed in range(s.score_seeds) for x in asked.states(model, aim, seed)]
    gradient = gradient_of(model, aim, chosen, states)
    through = ComponentSplitter(chosen, gradient, s.granularity, s.normalize)
    cotangent, parts = OBJECTIVES.get(s.f).cotangent, []
    for start in tqdm(range(0, len(task.data), s.batch_size), desc="images x weights"):
        x0, cond = task.data.batch(range(start, min(start + s.batch_size, len(task.data))))
        seen = train_states_of(model, x0, cond, task.cond_null, train_timesteps(s))
        parts.append(through.of(model, seen, cotangent, len(x0)))
    return ImageComponentInfluence(torch.cat(parts).numpy(), group_names(chosen, s.granularity))


def write_influence(task: AttributionTask) -> Path:
    """Compute and write everything, print the first pictures; returns the folder."""
    s = task.settings
    words = concept_prompts(s)
    found, data = influence_of(task, words.prompt), task.train
    order = np.argsort(-found.scores, kind="stable")
    rows = [_row(found, data, rank, int(i)) for rank, i in enumerate(order, 1)]
    decides = [as_dict(s), task.model.identity(), data.content_hash()]
    name = f"images-{slug(words.name, 32)}-{short_hash(decides)}"
    folder = results_folder(s, "cad") / name
    shows = relevance_or_none(data, words.name) if words.others else None
    total = dict(zip(found.groups, found.values.sum(0).tolist(), strict=True))
    told = {"prompt": words.prompt, "groups": total, "pictures": len(found.values)}
    if shows is not None:
        told["recall_at_10"] = float(shows[order[:10]].sum() / min(10, shows.sum()))
    with atomic_folder(folder) as made:
        npy = io.BytesIO()
        np.save(npy, found.values)
        write_bytes(made / "influence.npy", npy.getvalue())
        write_bytes(made / "influence.csv", csv_bytes(HEADER, rows))
        write_bytes(made / "influence.png", heat_map(found, data.captions, order, shows))
        write_json(made / "influence.json", told | _made_by(task))
    link(folder.parent / "latest", folder)
    for row in rows[:10]:
        print("\t".join(map(str, row)))
    return folder


def _made_by(task: AttributionTask) -> dict:
    return {"settings": as_dict(task.settings), "provenance": provenance()}


def _row(found: ImageComponentInfluence, data: ImageCaptionDataset, rank: int, i: int) -> tuple:
    most = np.argsort(-found.values[i])[:NAMED]
    caption = " ".join(data.captions[i].split())
    name = str(data.records[i].get("file_name", i))
    return rank, f"{found.scores[i]:+.4g}", name, caption, " ".join(found.groups[g] for g in most)


def heat_map(
    found: ImageComponentInfluence,
    captions: list[str],
    order: np.ndarray,
    shows: np.ndarray | None,
    label: str = "influence on J through these weights",
) -> bytes:
    """PNG: rows are the highest pictures and, where labels say which, the means of those that show
    the concept and of those that do not; columns are groups of weights.
    """
    from matplotlib.figure import Figure

    top = order[:SHOWN]
    values, names = found.values[top], [captions[i] for i in top]
    if shows is not None:
        means = [found.values[mask].mean(0) for mask in (shows, ~shows)]
        values = np.concatenate([values, np.full((1, values.shape[1]), np.nan), means])
        names = [*names, "", "mean of pictures that show it", "mean of all others"]
    figure = Figure(figsize=(4 + 0.2 * len(found.groups), 2.5 + 0.2 * len(names)))
    axes = figure.subplots()
    largest = float(np.nanmax(np.abs(values))) or 1.0
    shown = axes.imshow(values, cmap="BrBG", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    short = [g.replace("transformer_blocks.0.", "").replace(".weight", "") for g in found.groups]
    axes.set_xticks(range(len(short)), short, fontsize=6, rotation=90)
    figure.colorbar(shown, label=label)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    return png.getvalue()
