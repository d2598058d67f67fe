"""Who put a concept's score into the weights? The small model's training is replayed, and alpha = w
dJ/dw of the concept's erasing objective split exactly over its pictures (`truth.replay`):

    sum_p alpha_p = part of the initial weights + sum_i part of picture i + rounding

over all weights of SELECTION, and over those that an edit of RATIO takes. An accounting identity of
this one training, no counterfactual: what the model would be without a picture it does not say.

RESULTS_DIR/cad/replay-{name}-{hash}/
replay.npy    [2, N, components] float64: selected weights, edited ones
replay.csv    all pictures by their part in the edited weights, beside their ranks by METHODS
replay.png    heat map pictures x weights
replay.json   sums, completeness, agreement with METHODS and labels, settings and versions
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from concept_trak.atomic_io import atomic_folder, link, write_bytes, write_json
from concept_trak.attribution.prompts import slug
from concept_trak.attribution.task import AttributionTask
from concept_trak.components.concept_plan import attribute_components, plan_of
from concept_trak.components.data_influence import ImageComponentInfluence, gradient_of
from concept_trak.components.edit_operators import Operator
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import Component, select
from concept_trak.components.selection import Picked, choose
from concept_trak.datasets.labels import relevance_or_none
from concept_trak.models.text_to_image import TextToImage
from concept_trak.parsing import parse_methods
from concept_trak.process import log
from concept_trak.registry import RANKERS
from concept_trak.report.component_report import ConceptPrompts, component_query, concept_prompts
from concept_trak.report.data_weight_influence import heat_map
from concept_trak.report.tables import csv_bytes
from concept_trak.scoring.metrics import recall_at_k
from concept_trak.scoring.ranking import ranking
from concept_trak.settings import Settings, as_dict, provenance, results_folder, short_hash
from experiments.truth import small_model, train
from experiments.truth.queries import make_queries, task_of
from experiments.truth.replay import Decomposition, Direction, Replay, Training, TrainingCopy
from experiments.truth.setup import OURS, damping_of
from experiments.truth.subsets import Subset, base_plan

PARTS = ("selected", "edited")  # weights of SELECTION, and those of them that RATIO picks
THROUGH = 3  # components named for each picture


def small_settings(settings: Settings) -> small_model.SmallSettings:
    """Of the small model; REPLAY_STEPS makes its training shorter."""
    usual = small_model.SmallSettings()
    return replace(usual, steps=settings.replay_steps) if settings.replay_steps else usual


@contextlib.contextmanager
def as_trained() -> Iterator[None]:
    """Arithmetic of the processes that train small models, without which bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


@dataclass(frozen=True)
class SmallModelRun:
    """A finished small model of all pictures, and what its training can be run again from."""

    task: AttributionTask
    subset: Subset
    settings: small_model.SmallSettings
    model: TextToImage

    @classmethod
    def of(cls, task: AttributionTask) -> SmallModelRun:
        """The one of SEED in TRUTH_DIR; trained, or trained on, where it is not finished."""
        s, settings = task.settings, small_settings(task.settings)
        (subset,) = base_plan(task.train, [s.seed]).subsets
        taught = (task.model, task.train, task.latents.to(task.device), subset, settings)
        return cls(task, subset, settings, train.train_subset(*taught, Path(s.truth_dir)))

    def training(self, selection: str) -> Training:
        """The same training, to run again."""
        c, like, settings, subset = self.task, self.task.model, self.settings, self.subset
        latents = c.latents.to(c.device)
        examples = train.examples_of(like, c.train, latents, subset)

        def make() -> TrainingCopy:
            model = small_model.build(like, settings, subset.seed)
            loss = functools.partial(train.loss_of_step, model, examples, settings, subset.seed)
            chosen = select(model.network, selection)
            return TrainingCopy(model.network, chosen, small_model.parameters(model), loss)

        taken = functools.partial(train.taken, examples, settings, subset.seed)
        run = train.run_of(like, c.train, subset, settings, Path(c.settings.truth_dir))
        return Training(make, taken, run, len(c.train))


def replay(task: AttributionTask) -> dict[str, Any]:
    """Train what is missing, replay, write the folder; returns what replay.json holds.

    UserError for a concept that the data do not know, or a selection that matches nothing.
    """
    s, words = task.settings, concept_prompts(task.settings)
    with as_trained():
        known = SmallModelRun.of(task)
        direction, picked = _asked(known.model, s, words)
        masks = _mask(select(known.model.network, s.selection), picked)
        training = known.training(s.selection)
        decides = [training.run.made_from, words.prompt, _deciding(s)]
        state = Path(s.truth_dir) / f"replay-{slug(words.name, 32)}-{short_hash(decides)}"
        run = Replay(training, direction, state, [masks])
        count = sum(len(index) for index in picked.values())
        log(
            f"replay of {run.run.steps} steps, twice through: {len(task.train)} pictures, "
            f"{sum(a.numel() for a in direction.values()):,} weights, {count:,} of them edited; "
            f"{run.memory / 2**30:.1f} GB beside two copies of the training"
        )
        found = run.split()
    told = _told(known, found, words) | {"edited_weights": count}
    return _written(known, found, words, told)


def _deciding(s: Settings) -> list[Any]:
    how = (s.base_prompt, s.gen_guidance_scale, s.gen_num_inference_steps, s.score_seeds)
    return [*how, s.selection, s.ratio, s.granularity]


def _asked(model: TextToImage, s: Settings, words: ConceptPrompts) -> tuple[Direction, Picked]:
    """dJ/dw of the concept, and the weights that an erasing edit would take."""
    aim, chosen = COMPONENT_OBJECTIVES["erase"], select(model.network, s.selection)
    asked = component_query(s, words.prompt)
    plan = plan_of(s.selection, s.ratio, s.granularity, Operator())
    picked = choose(attribute_components(model, asked, aim, chosen), chosen, plan.rule).picked
    states = [x for seed in range(s.score_seeds) for x in asked.states(model, aim, seed)]
    return gradient_of(model, aim, chosen, states), picked


def _mask(chosen: list[Component], picked: Picked) -> Direction:
    masks = {c.name: torch.zeros_like(c.weight) for c in chosen}
    for name, index in picked.items():
        masks[name].view(-1)[index.to(masks[name].device)] = 1
    return masks


def _told(known: SmallModelRun, found: Decomposition, words: ConceptPrompts) -> dict[str, Any]:
    """Sums and agreements, JSON."""
    own = small_model.parameters(known.model)
    same = all(torch.equal(value, own[name]) for name, value in found.ema.items())
    by_picture = found.pictures.sum(2)
    told: dict[str, Any] = {
        "concept": words.name,
        "prompt": words.prompt,
        "steps": known.settings.steps,
        "pictures": by_picture.shape[1],
        "replay_is_the_training": same,
    }
    shows = relevance_or_none(known.task.train, words.name)
    beside = _beside(known, words) if shows is not None else {}
    for k, part in enumerate(PARTS):
        total = float(found.total[k].sum())
        sums = {
            "alpha": total,
            "start": float(found.start[k].sum()),
            "pictures": float(by_picture[k].sum()),
            "rounding": float(found.rounding[k].sum()),
            "gap": float(found.gap()[k]),
        }
        told[part] = sums | _agreement(by_picture[k], shows, beside)
    return told


def _agreement(
    parts: np.ndarray, shows: np.ndarray | None, beside: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Of the parts [N] of pictures with labels, and with other rankings [N]."""
    if shows is None:
        return {}
    told: dict[str, Any] = {"recall_at_10": _recall(parts, shows)}
    told["of_pictures_that_show_it"] = float(parts[shows].sum())
    for name, scores in beside.items():
        correlation = float(np.nan_to_num(spearmanr(parts, scores).statistic))
        told[name] = {"spearman": correlation, "recall_at_10": _recall(scores, shows)}
    return told


def _recall(scores: np.ndarray, shows: np.ndarray) -> float:
    return float(recall_at_k(scores[None], shows[None]).mean())


def _beside(known: SmallModelRun, words: ConceptPrompts) -> dict[str, np.ndarray]:
    """{method of METHODS, by default ours: its scores [N] of the concept on the small model}."""
    from concept_trak.datasets.labels import parse_concept

    s = known.task.settings
    places = {"grad_dir": str(Path(s.truth_dir) / "grads")}
    asking = task_of(known.task, known.model, known.subset)
    asking.settings = s.but(**places)
    kind, name = parse_concept(known.task.train, words.name)
    asked = make_queries(asking, known.task.everything.split("held_out"))
    places_of = asked.of[kind].get(name, [])
    questions = [asked.questions[i] for i in places_of]
    if not questions:
        return {}
    found = {}
    for method in parse_methods(s.methods) or [OURS]:
        log(f"ranking by {method} ...")
        values = RANKERS.get(method)(asking).rank(questions)
        at = damping_of(OURS, asking, values, lambda: 0)
        found[method] = values[at].mean(0)
    return found


def _written(
    known: SmallModelRun, found: Decomposition, words: ConceptPrompts, told: dict[str, Any]
) -> dict[str, Any]:
    """The folder of the module docstring; prints the first pictures."""
    s, data = known.task.settings, known.task.train
    groups = tuple(c.name for c in select(known.model.network, s.selection))
    edited = ImageComponentInfluence(found.pictures[1], groups)
    order = np.array(ranking(edited.scores))
    decides = [as_dict(s), known.model.identity(), data.content_hash()]
    folder = results_folder(s, "cad") / f"replay-{slug(words.name, 32)}-{short_hash(decides)}"
    shows = relevance_or_none(data, words.name)
    rows = [_row(found, groups, data, shows, rank, int(i)) for rank, i in enumerate(order, 1)]
    with atomic_folder(folder) as made:
        npy = io.BytesIO()
        np.save(npy, found.pictures)
        write_bytes(made / "replay.npy", npy.getvalue())
        write_bytes(made / "replay.csv", csv_bytes(HEADER, rows))
        label = "part of the concept's score in these weights"
        write_bytes(made / "replay.png", heat_map(edited, data.captions, order, shows, label))
        made_by = {"groups": groups, "settings": as_dict(s), "provenance": provenance()}
        write_json(made / "replay.json", told | made_by)
    link(folder.parent / "latest", folder)
    for row in rows[:10]:
        print("\t".join(map(str, row)))
    return told


HEADER = ("rank", "edited", "selected", "shows", "file_name", "caption", "through")


def _row(
    found: Decomposition,
    groups: tuple[str, ...],
    data: Any,
    shows: np.ndarray | None,
    rank: int,
    i: int,
) -> tuple:
    most = np.argsort(-found.pictures[1, i])[:THROUGH]
    caption = " ".join(data.captions[i].split())
    parts = (f"{found.pictures[k, i].sum():+.4g}" for k in (1, 0))
    known = "" if shows is None else int(shows[i])
    name = str(data.records[i].get("file_name", i))
    return rank, *parts, known, name, caption, " ".join(groups[g] for g in most)
