"""Does amplifying raise what a model learned too little of?

A small model (`truth.small_model`) learns all pictures but most of those of 16 objects, of which
KEPT of seven stay: 8 choose the plan, 8 others are reported, split as in `testbed`. Scores of
J_amplify are read on the pictures that stayed, as a user would who has no more of them; judged are
pictures drawn for all seven captions. Beside the plan that is best for the eight that choose:

    published   the published rule: feed-forward matrices, by row, at the ratio best for those eight
    random      as many random weights of the same tensors: what removing weights does by itself
    random, published    the same for the published rule's, which are several times as many
    gradient    normed ascents of J on the chosen weights alone: what is to be had at this place
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from concept_trak.atomic_io import write_bytes
from concept_trak.attribution.task import AttributionTask
from concept_trak.components.concept_plan import (
    ComponentQuery,
    attribute_components,
    edit_from_scores,
)
from concept_trak.components.edits import Edit, make_edit
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import components
from concept_trak.components.scores import Scores
from concept_trak.models.text_to_image import TextToImage
from concept_trak.settings import short_hash
from experiments.benchmark.results import result_folder, write_metrics
from experiments.truth.queries import task_of
from experiments.truth.subsets import Subset

from .amplify import mean_gain
from .baselines import ranked_by, same_counts
from .counterfactual import models_of
from .model_selection import SKIPPED, Key, paper
from .result_cache import MeasurementCache
from .testbed import SPLIT_SEED, EraseSetup, Target

KEPT, REPORTED = 2, 8  # pictures of a thinned object; objects that are reported
SELECTIONS = ("cross_attention", "feed_forward", "cross_attention|feed_forward")
RATIOS = (1e-5, 1e-4, 1e-3, 5e-3)
PAPER_RATIOS = (0.005, 0.01, 0.02)
COUNTS, FINAL = (28, 28), (112, 112)  # pictures of the target, and of what is to be kept
NOISINGS = 8  # pictures that stayed, each again and again
RANDOM = ("random", "random, published")
ARMS = ("chosen", "published", *RANDOM, "gradient")


def undersample(task: AttributionTask) -> tuple[Subset, dict[str, list[Target]]]:
    """What the model learns, and the targets: {"tune", "report"}."""
    of = EraseSetup.targets_of(task.train)
    targets = {"tune": of["tune"], "report": of["object"][:REPORTED]}
    shown, rng = np.array(task.train.column("object")), np.random.default_rng(SPLIT_SEED + 2)
    removed: list[int] = []
    for target in (*targets["tune"], *targets["report"]):
        removed += rng.permutation(np.flatnonzero(shown == target.name))[KEPT:].tolist()
    return Subset("thinned-0", 0, tuple(sorted(removed))), targets


class Rare:
    """The model of thinned data, and what the judge sees of it under edits; cells in TRUTH_DIR."""

    def __init__(self, task: AttributionTask, subset: Subset, model: TextToImage) -> None:
        self.subset = subset
        self.setup = EraseSetup(task_of(task, model, subset), drawer=model)
        self.cells = MeasurementCache(self.setup, Path(task.settings.truth_dir) / "cad-rare")
        self._scores: tuple[str, Scores] | None = None

    def asked(self, target: Target) -> ComponentQuery:
        """About the pictures that stayed."""
        task, stayed = self.setup.task, self.subset.kept(len(self.setup.task.train))
        shown = np.array(task.train.column("object")) == target.name
        real = task.latents[np.flatnonzero(shown & stayed)]
        return replace(self.setup.asked(target), real=real, num_seeds=NOISINGS)

    def scores(self, target: Target) -> Scores:
        """J_amplify of the transformers' weights; those of the last target are kept."""
        if self._scores is None or self._scores[0] != target.name:
            among = [c for c in components(self.setup.model.network) if c.role not in SKIPPED]
            found = attribute_components(
                self.setup.model, self.asked(target), COMPONENT_OBJECTIVES["amplify"], among
            )
            self._scores = target.name, found
        return self._scores[1]

    def edit(self, target: Target, key: Key, control: bool = False) -> Edit:
        """The amplifying edit of a plan; control: of as many random weights of its tensors."""
        model, asked = self.setup.model, self.asked(target)
        edit, chosen = edit_from_scores(model, self.scores(target), key.plan, asked)
        if not control:
            return edit
        among = [c for c in components(model.network) if c.name in chosen.picked]
        drawn = ranked_by("random", model, among, self.scores(target), (asked, None))
        picked = same_counts(drawn, chosen.picked)
        return make_edit(model.network, {k: edit.changes[k][2] for k in picked}, picked)

    def pair(
        self, target: Target, key: Key, counts: tuple[int, int], control: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cells of the model as it is and under the edit."""
        cell = self.cells.cell
        before = cell(target, ["as it is"], lambda: self.setup.measure(target, None, FINAL))
        before = {k: before[k][:n] for k, n in zip(("shown", "object"), counts, strict=True)}

        def make() -> dict[str, Any]:
            edit = self.edit(target, key, control)
            return self.setup.measure(target, edit, counts) | {"weights": edit.count}

        return before, cell(target, ["amplify", *key, control, *counts], make)


def plans() -> dict[str, list[Key]]:
    """What is tried: plans of single weights, and the published rule."""
    bare = {"spared": 0.0, "others": ""}
    own = [Key(selection, ratio, **bare) for selection in SELECTIONS for ratio in RATIOS]
    return {"chosen": own, "published": [paper(ratio) for ratio in PAPER_RATIOS]}


def rare(task: AttributionTask) -> dict[str, Any]:
    """Train what is missing, choose, measure, print the table, and return it as JSON."""
    subset, targets = undersample(task)
    bench = Rare(task, subset, models_of(task, {"thinned": subset})["thinned"])
    arms, tried = choose(bench, targets["tune"])
    best, published = arms["chosen"], arms["published"]
    keys = arms | dict(zip(RANDOM, (best, published), strict=True)) | {"gradient": _ascent(best)}
    told: dict[str, Any] = {"tried": tried, "arms": {}, "objects": {}}
    for arm in ARMS:
        pairs = [
            bench.pair(target, keys[arm], FINAL, arm in RANDOM)
            for target in tqdm(targets["report"], desc=f"amplified, {arm}")
        ]
        rates = [[float(np.mean(cell["shown"])) for cell in pair] for pair in pairs]
        told["arms"][arm] = {"plan": list(keys[arm]), **mean_gain(pairs), "rates": rates}
    names = [target.name for target in targets["report"]]
    told |= {"objects": names, "removed": len(subset.removed), "pictures": list(FINAL)}
    table = markdown(told)
    print(table)
    with result_folder(task.settings, "cad", "rare", short_hash(told)) as folder:
        write_metrics(folder, "metrics", told, task.settings)
        write_bytes(folder / "table.md", f"{table}\n".encode())
    return told


def _ascent(key: Key) -> Key:
    return key._replace(operator="gradient")


def choose(bench: Rare, tune: list[Target]) -> tuple[dict[str, Key], list[dict[str, Any]]]:
    """({arm: the plan with the highest gain on the objects that choose}, everything tried)."""
    found: dict[str, tuple[float, Key]] = {}
    tried = []
    each = {target.name: {} for target in tune}
    for target in tqdm(tune, desc="plans on the objects that choose"):
        for keys in plans().values():  # target by target, whose scores are made once
            each[target.name] |= {key: bench.pair(target, key, COUNTS) for key in keys}
    for arm, keys in plans().items():
        for key in keys:
            told = mean_gain([of[key] for of in each.values()])
            tried.append({"arm": arm, "plan": list(key), **told})
            if arm not in found or told["gain"] > found[arm][0]:
                found[arm] = told["gain"], key
    return {arm: key for arm, (_, key) in found.items()}, tried


def markdown(told: dict[str, Any]) -> str:
    """What was tried, and the arms on the reported objects."""
    lines = ["| plan on the objects that choose | gain | other objects kept |", "|---|---|---|"]
    for one in told["tried"]:
        selection, ratio = one["plan"][:2]
        name = selection.replace("|", "\\|")
        lines.append(f"| {name}, {ratio:g} | {_gain(one)} | {one['kept']:.2f} |")
    head = " | ".join(told["objects"])
    lines += ["", f"| reported objects | gain | kept | {head} |"]
    lines += ["|---" * (3 + len(told["objects"])) + "|"]
    first = told["arms"][ARMS[0]]["rates"]
    lines.append(f"| as it is | | | {' | '.join(f'{before:.2f}' for before, _ in first)} |")
    for arm, of in told["arms"].items():
        rates = " | ".join(f"{after:.2f}" for _, after in of["rates"])
        lines.append(f"| {arm}, {of['plan'][1]:g} | {_gain(of)} | {of['kept']:.2f} | {rates} |")
    return "\n".join(lines)


def _gain(told: dict[str, Any]) -> str:
    low, high = told["gain_ci95"]
    return f"{told['gain']:+.2f} [{low:+.2f}, {high:+.2f}]"
