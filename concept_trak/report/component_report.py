"""What weights carry a concept, and an edit of them, on disk and as a page.

RESULTS_DIR/cad/{name}-{hash}/
scores.safetensors, scores.json     scores and layer statistics    (run_cad.sh and the edits)
layers.png                          positive and negative scores by layer, and by timestep
edit.safetensors, edit.json         positions, old and new values; what made it
pictures.png                        pictures before (above) and after, a column a prompt
report.html                         pictures before and after at equal noise, layers, settings
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..atomic_io import atomic_folder, link, write_bytes, write_json
from ..attribution.prompts import contains, slug, split_list
from ..components.concept_plan import (
    ComponentQuery,
    attribute_components,
    edit_from_scores,
    plan_of,
)
from ..components.edit_operators import Operator
from ..components.edits import Edit, EditedNetwork, load_edit, save_edit
from ..components.export import export, refuse_place
from ..components.objective import COMPONENT_OBJECTIVES
from ..components.parameter_groups import Component, select
from ..components.score_io import layer_statistics, save_scores
from ..components.scores import Scores
from ..components.selection import Selection, subtract_others
from ..components.states import Sampling
from ..datasets import labels
from ..datasets.image_folder import ImageCaptionDataset, load_folder
from ..datasets.picture import read_picture
from ..errors import UserError, remove_hint
from ..models.sample import SamplingSettings, initial_noise, sample
from ..models.text_to_image import TextToImage, load_pipeline
from ..settings import Settings, as_dict, provenance, results_folder, short_hash
from .page import environment, pairs

OF_TARGET, OF_OTHERS = 4, 8  # pictures shown before and after
SEED = 50_000  # of the first of them
PICTURES = "pictures.png"
CAPTIONS = "captions"  # SPARE


@dataclass(frozen=True)
class ConceptPrompts:
    """What is asked: the concept's prompt, prompts that show it, and others that do not."""

    name: str
    prompt: str
    showing: list[str]
    others: list[str]


def concept_prompts(settings: Settings) -> ConceptPrompts:
    """CONCEPT, or the first of TARGET_CONCEPTS that stands in PROMPT, or PROMPT.

    UserError for a concept that labelled data do not know, or an empty one.
    """
    s, data = settings, _labelled(settings.data_dir)
    name = s.concept.strip()
    if not name:
        named = [t for t in split_list(s.target_concepts) if t and contains(s.prompt, t)]
        name = named[0] if named else s.prompt.strip()
    if not name:
        raise UserError("CONCEPT and PROMPT are empty; set what to score, e.g. CONCEPT=rocket")
    if data is None or (not s.concept and not contains(s.prompt, name)):
        return ConceptPrompts(name, name, [name], [])
    if name == s.prompt.strip():
        return ConceptPrompts(name, name, [name], data.captions[:: max(1, len(data) // OF_OTHERS)])
    column, value = labels.parse_concept(data, name)
    record = next(r for r in data.records if r[column] == value)
    phrase = record.get(f"{column}_phrase") or value
    prompt = phrase if column == "object" else f"{labels.STYLE_PREFIX.strip()} {phrase}"
    has = [r[column] == value for r in data.records]
    captions = list(zip(data.captions, has, strict=True))
    others = [c for c, shows in captions if not shows]
    return ConceptPrompts(
        value, prompt, [c for c, shows in captions if shows], others[:: max(1, len(others) // 8)]
    )


def spared_prompts(settings: Settings, words: ConceptPrompts) -> list[str]:
    """The prompts that SPARE names. UserError for one that is neither concept nor caption."""
    names = [name for name in split_list(settings.spare) if name]
    data = _labelled(settings.data_dir) if names else None
    if names == [CAPTIONS]:
        if data is None:
            told = f"SPARE={CAPTIONS} needs labelled pictures, which {settings.data_dir} has not"
            raise UserError(f"{told}; set SPARE to captions or concepts themselves")
        return _of_every_style(data, words)
    captions = set(data.captions) if data is not None else ()
    return [n if n in captions else concept_prompts(settings.but(concept=n)).prompt for n in names]


def _of_every_style(data: ImageCaptionDataset, words: ConceptPrompts) -> list[str]:
    """Two captions of every style that do not show the concept: what whole prompts need is more
    than what their words need by themselves.
    """
    found = []
    for style in sorted({r["style"] for r in data.records}):
        each = [
            caption
            for caption, r in zip(data.captions, data.records, strict=True)
            if r["style"] == style and words.name not in (r["object"], style)
        ]
        found += each[len(each) // 3 :: max(1, len(each) // 3)][:2]
    return found


def component_query(settings: Settings, prompt: str) -> ComponentQuery:
    """How a prompt's components are scored; its trajectories have GEN_NUM_INFERENCE_STEPS."""
    s, steps = settings, settings.gen_num_inference_steps
    sampling = Sampling(s.gen_guidance_scale, steps, min(steps, 10 if steps < 50 else 25))
    return ComponentQuery(prompt, s.base_prompt, s.score_seeds, sampling)


def _labelled(root: str) -> ImageCaptionDataset | None:
    """The labelled pictures of a folder; None where there are none."""
    if not (Path(root) / "metadata.jsonl").exists():
        return None
    data = load_folder(root)
    return data if labels.has_labels(data) else None


class ComponentRun:
    """A model with the edits of EDITS on it, and what is asked of its weights.

    model: in float32, in place of SD_MODEL_PATH.
    """

    def __init__(self, settings: Settings, device: str, model: TextToImage | None = None) -> None:
        self.settings, self.words = settings, concept_prompts(settings)
        s = settings
        edits = [load_edit(path) for path in split_list(s.edits)] if s.edits else []
        self.model = model or load_pipeline(s.sd_model_path, device, "fp32", s.lora_path)
        self.among: list[Component] = select(self.model.network, s.selection)
        self.edited = EditedNetwork(self.model.network)
        for edit in edits:
            self.edited.apply(edit)

    def but(self, **changes: Any) -> ComponentRun:
        """The same model, asked under other settings."""
        other = copy.copy(self)
        other.settings = self.settings.but(**changes)
        other.words = concept_prompts(other.settings)
        other.among = select(self.model.network, other.settings.selection)
        return other

    def place(self, kind: str) -> Path:
        """Folder of these scores or edits, named by all that decides them."""
        s = self.settings
        decides = [as_dict(s.but(export="", weights=False)), kind, self.edited.base, self.prompts()]
        return (
            results_folder(s, "cad") / f"{kind}-{slug(self.words.name, 32)}-{short_hash(decides)}"
        )

    def asked(self, prompt: str) -> ComponentQuery:
        """See `component_query`."""
        return component_query(self.settings, prompt)

    def scores(self, aim: str) -> Scores:
        """Of the concept, less what SPARE needs, over one seed."""

        def of(asked: ComponentQuery) -> Scores:
            return attribute_components(self.model, asked, COMPONENT_OBJECTIVES[aim], self.among)

        spared = spared_prompts(self.settings, self.words)  # told before anything is computed
        found = of(self.asked(self.words.prompt))
        needs = [of(replace(self.asked(prompt), num_seeds=1)) for prompt in spared]
        found = subtract_others(found, needs, self.settings.spare_weight)
        found.about |= self.about()
        return found

    def about(self) -> dict[str, str]:
        """What stands beside scores."""
        return {"prompt": self.words.prompt, "model": self.edited.base}

    def edit(self, scores: Scores) -> tuple[Edit, Selection]:
        """Make the edit of these scores and apply it; (it, which weights). UserError as
        `selection.choose` raises it.
        """
        s, asked = self.settings, self.asked(self.words.prompt)
        plan = plan_of(s.selection, s.ratio, s.granularity, Operator(s.operator, s.strength))
        edit, chosen = edit_from_scores(self.model, scores, plan, asked, self.edited.base)
        edit.about.update(aim=scores.aim, prompt=self.words.prompt, model_path=s.sd_model_path)
        edit.about.update(plan=[s.selection, s.ratio, s.granularity, s.operator, s.strength])
        self.edited.apply(edit)
        return edit, chosen

    def export(self, folder: Path) -> None:
        """Write the pipeline with its edits; see `components.export`."""
        facts = {"model": self.edited.base, "edits": [e.digest() for e in self.edited.stack]}
        export(self.model.pipe, folder, facts | {"provenance": provenance()})

    def draw(self) -> list[Image.Image]:
        """Pictures of the concept, then of other prompts, at the same noise whenever called."""
        s, prompts = self.settings, self.prompts()
        noise = [initial_noise(self.model.latent_shape, SEED + i) for i in range(len(prompts))]
        how = SamplingSettings(s.gen_guidance_scale, s.gen_num_inference_steps, s.negative_prompt)
        x0 = sample(self.model, prompts, torch.cat(noise), how, min(s.batch_size, 16))
        return self.model.decode(x0)

    def prompts(self) -> list[str]:
        """OF_TARGET that show the concept, and up to OF_OTHERS that do not."""
        showing = self.words.showing
        return [showing[i % len(showing)] for i in range(OF_TARGET)] + self.words.others[:OF_OTHERS]


def score_weights(settings: Settings, device: str) -> Path:
    """Score the concept's components for erasing; returns the folder."""
    weights = ComponentRun(settings, device)
    return write_scores(weights, weights.scores("erase"))


def write_scores(weights: ComponentRun, scores: Scores) -> Path:
    """Write scores of components with their page; returns the folder."""
    with _folder(weights, "scores") as (made, folder):
        save_scores(made, scores, weights.among)
        write_bytes(made / "layers.png", picture(scores, weights.among))
        _page(made, weights, scores, None)
    return folder


def edit_weights(settings: Settings, device: str, aim: str) -> Path:
    """Make an erasing or amplifying edit and show it; returns the folder.

    UserError as `selection.choose` and `export.refuse_place` raise it.
    """
    s = settings
    if s.export:
        check_export(s, Path(s.export))
    weights = ComponentRun(s, device)
    folder = write_edit(weights, weights.scores(aim), weights.draw())
    if s.export:
        weights.export(Path(s.export))
        print(f"exported: {os.path.relpath(s.export)}")
    return folder


def check_export(settings: Settings, folder: Path) -> None:
    """UserError for a folder that `export.refuse_place` refuses for a run of these settings."""
    s = settings
    used = (s.data_dir, s.grad_dir, s.results_dir, s.lora_path, *split_list(s.edits), ".")
    refuse_place(folder, s.sd_model_path, filter(None, used))


def write_edit(weights: ComponentRun, scores: Scores, before: list[Image.Image]) -> Path:
    """Make the edit of these scores, apply it, and write it with its page; returns the folder.

    before: what `ComponentRun.draw` gave without it. UserError as `selection.choose` raises it.
    """
    edit, chosen = weights.edit(scores)
    after = weights.draw()
    print(selection_summary(chosen))
    with _folder(weights, scores.aim) as (made, folder):
        save_scores(made, scores, weights.among)
        save_edit(made / "edit.safetensors", edit)
        facts = {"digest": edit.digest(), "model": edit.model, "weights": edit.count, **edit.about}
        facts |= {"of": chosen.among, "prompts": weights.prompts()}
        made_by = {"settings": as_dict(weights.settings), "provenance": provenance()}
        write_json(made / "edit.json", facts | {"untouched": list(chosen.untouched)} | made_by)
        write_bytes(made / "layers.png", picture(scores, weights.among))
        write_bytes(made / PICTURES, sheet(before, after))
        _page(made, weights, scores, (before, after, chosen))
    return folder


def sheet(before: list[Image.Image], after: list[Image.Image]) -> bytes:
    """PNG of two rows of pictures of one size."""
    rows = [
        np.concatenate([np.asarray(p.convert("RGB")) for p in row], 1) for row in (before, after)
    ]
    png = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(png, format="png")
    return png.getvalue()


def selection_summary(chosen: Selection) -> str:
    """What was chosen, and what the published rounding left out."""
    said = f"{chosen.count:,} of {chosen.among:,} weights ({chosen.count / chosen.among:.3%})"
    if chosen.untouched:
        n = len(chosen.untouched)
        said += f"; the published rule rounds to none in every row of {n} of the layers"
    return said


def picture(scores: Scores, among: list[Component]) -> bytes:
    """PNG: positive and negative scores of each layer, and the sum by timestep."""
    from matplotlib.figure import Figure

    rows = layer_statistics(scores, among)
    figure = Figure(figsize=(10, 2.4 + 0.16 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    places = np.arange(len(rows))
    left.barh(places, [r["positive"] for r in rows], color="#0b6e69", label="positive")
    left.barh(places, [r["negative"] for r in rows], color="#b3471d", label="negative")
    short = [r["name"].removesuffix(".weight").replace("transformer_blocks.", "") for r in rows]
    left.set_yticks(places, short, fontsize=6)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("sum of alpha = w dJ/dw")
    left.legend(frameon=False)
    right.plot(scores.levels, scores.profile.sum(1), color="#0b6e69", marker="o", markersize=3)
    right.set_xlabel("timestep")
    right.set_ylabel("sum of alpha at this level")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


@contextlib.contextmanager
def _folder(weights: ComponentRun, kind: str) -> Iterator[tuple[Path, Path]]:
    """(a folder to fill, its final path); `latest` beside it is a link to the newest."""
    path = weights.place(kind)
    with atomic_folder(path) as made:
        yield made, path
    link(path.parent / "latest", path)


def _page(made: Path, weights: ComponentRun, scores: Scores, shown: Any) -> None:
    """report.html of scores or, with (pictures before, after, what was chosen), of an edit."""
    rows = sorted(layer_statistics(scores, weights.among), key=lambda r: -r["share"])
    prompts = weights.prompts() if shown else []
    both = list(zip(prompts, *shown[:2], strict=True)) if shown else []
    html = (
        environment()
        .get_template("weights.html.jinja")
        .render(
            words=weights.words,
            aim=scores.aim,
            settings=weights.settings,
            told=selection_summary(shown[2]) if shown else "",
            groups=[("The concept", both[:OF_TARGET]), ("Everything else", both[OF_TARGET:])],
            layers=rows[:24],
            largest=max((r["share"] for r in rows), default=1.0) or 1.0,
            plot=read_picture(made / "layers.png", remove_hint(made)),
            records={
                "Settings": pairs(as_dict(weights.settings)),
                "Provenance": pairs(provenance()),
            },
        )
    )
    write_bytes(made / "report.html", html.encode())
