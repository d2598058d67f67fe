"""The test bed: which concepts, which prompts, and what the judge says of the pictures drawn.

Concepts that choose a setting and concepts that are reported are disjoint, by a seed fixed here.
UA, IRA and CRA are those of UnlearnCanvas (Zhang et al. 2024): UA, the share of the target's
pictures that do not show it; IRA and CRA, the accuracy kept on other concepts of its kind and on
concepts of the other kind, here as a share of the unedited model's on the same noises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from concept_trak.attribution.task import AttributionTask
from concept_trak.components.concept_plan import ComponentQuery
from concept_trak.components.edit_operators import write_weights
from concept_trak.components.edits import Edit
from concept_trak.components.states import Sampling
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.datasets.labels import STYLE_PREFIX
from concept_trak.models.sample import SamplingSettings, initial_noise, sample
from concept_trak.models.text_to_image import TextToImage, load_pipeline
from concept_trak.settings import JUDGE
from experiments.emoji.classifier.io import load_judge
from experiments.emoji.classifier.net import EmojiClassifier, resized

SPLIT_SEED, TUNED, REPORTED = 13, 8, 16  # objects
DRAW_STEPS = 6  # DDIM steps of judged pictures; the judge names as many of them as of 20 steps
SAMPLING = Sampling(3.0, 20, 10)  # states of scores
BATCH = 32
FIRST_SEED = 90_000


@dataclass(frozen=True)
class Target:
    """A concept: its kind ("object" or "style"), name, and the words that ask for it."""

    kind: str
    name: str
    phrase: str

    @property
    def prompt(self) -> str:
        """The concept by itself."""
        return self.phrase if self.kind == "object" else f"{STYLE_PREFIX.strip()} {self.phrase}"


@dataclass(frozen=True)
class ClassifiedImages:
    """What the judge says of n pictures: probabilities of all objects and styles [n, classes], and
    the wanted class of each [n]; pictures uint8 [n, H, W, 3].
    """

    chances: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]
    pictures: np.ndarray

    def right(self, kind: str) -> np.ndarray:
        """bool [n]: the picture shows what its prompt names."""
        return self.chances[kind].argmax(1) == self.wanted[kind]


class EraseSetup:
    """A model, its judge, and what draws: by default a bf16 twin of the embedded model (see
    `mirror`).
    """

    def __init__(self, task: AttributionTask, drawer: TextToImage | None = None) -> None:
        self.task, self.model = task, task.model
        s = task.settings
        self.drawer = drawer or load_pipeline(s.sd_model_path, task.device, "bf16")
        self.judge: EmojiClassifier = load_judge(JUDGE)
        self.guidance = s.gen_guidance_scale
        self.num_seeds = s.score_seeds

    @cached_property
    def targets(self) -> dict[str, list[Target]]:
        """{"tune": 8 objects, "object": 16 others, "style": all styles}, in a fixed order."""
        return self.targets_of(self.task.train)

    @staticmethod
    def targets_of(train: ImageCaptionDataset) -> dict[str, list[Target]]:
        """`targets` of these pictures."""
        kinds: dict[str, dict[str, str]] = {"object": {}, "style": {}}
        for record in train.records:
            for kind, names in kinds.items():
                names[record[kind]] = record.get(f"{kind}_phrase") or record[kind]
        names = sorted(kinds["object"])
        order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
        objects = [Target("object", names[i], kinds["object"][names[i]]) for i in order]
        tuned = min(TUNED, len(objects) // 3)
        return {
            "tune": objects[:tuned],
            "object": objects[tuned : tuned + REPORTED],
            "style": [Target("style", n, kinds["style"][n]) for n in sorted(kinds["style"])],
        }

    def asked(self, target: Target) -> ComponentQuery:
        """How a target's components are scored here."""
        return ComponentQuery(target.prompt, "", self.num_seeds, SAMPLING)

    def prompts(self, target: Target, count: int) -> list[dict[str, Any]]:
        """Training records to draw the target from: its cells in turn."""
        cells = [r for r in self.task.train.records if r[target.kind] == target.name]
        order = np.random.default_rng(SPLIT_SEED).permutation(len(cells))
        return [cells[order[i % len(cells)]] for i in range(count)]

    @cached_property
    def pool(self) -> list[dict[str, Any]]:
        """Records of what is to be kept: one cell an object, none of the tuned ones, styles in
        turn; the noise of a place is the same for every edit.
        """
        tuned = {t.name for t in self.targets["tune"]}
        records = [r for r in self.task.train.records if r["object"] not in tuned]
        order = np.random.default_rng(SPLIT_SEED + 1).permutation(len(records))
        seen: set[str] = set()
        first, rest = [], []
        for record in (records[i] for i in order):
            (rest if record["object"] in seen else first).append(record)
            seen.add(record["object"])
        return first + rest

    def kept(self, target: Target, count: int) -> list[int]:
        """Places in the pool, the first `count` that do not show the target."""
        return [i for i, r in enumerate(self.pool) if r[target.kind] != target.name][:count]

    def draw(self, records: Sequence[dict[str, Any]], seeds: Sequence[int]) -> ClassifiedImages:
        """A picture a record by the twin, judged."""
        model = self.drawer
        x_T = torch.cat([initial_noise(model.latent_shape, FIRST_SEED + s) for s in seeds])
        captions = [f"{r['object_phrase']}{STYLE_PREFIX}{r['style_phrase']}" for r in records]
        parts = [
            sample(
                model,
                captions[i : i + BATCH],
                x_T[i : i + BATCH],
                SamplingSettings(self.guidance, DRAW_STEPS),
                BATCH,
            )
            for i in range(0, len(captions), BATCH)
        ]
        pictures = np.stack([np.asarray(p) for x0 in parts for p in model.decode(x0)])
        _, _, chances = self.judge.predict(resized(pictures, self.judge.settings.size))
        classes = {"object": self.judge.objects, "style": self.judge.styles}
        wanted = {k: np.array([classes[k].index(r[k]) for r in records]) for k in classes}
        return ClassifiedImages(chances, wanted, pictures)

    def mirror(self, edit: Edit, undo: bool = False) -> None:
        """Write an edit's new values, or the old ones again, into the twin that draws."""
        weights = dict(self.drawer.network.named_parameters())
        for name, (index, old, new) in edit.changes.items():
            write_weights(weights[name], index, old if undo else new)

    def measure(self, target: Target, edit: Edit | None, counts: tuple[int, int]) -> dict[str, Any]:
        """Judge pictures of the target and of what is to be kept, under an edit or without.

        counts: pictures of each. Returns hits, as lists of 0 and 1: "shown" (the target still is),
        "beside" (what else its prompts name is), and of the kept pictures "object" and "style";
        "became" {class: how often} of the target's.
        """
        if edit is not None:
            self.mirror(edit)
        try:
            asked = self.draw(self.prompts(target, counts[0]), range(10_000, 10_000 + counts[0]))
            kept = self.measure_kept(self.kept(target, counts[1]))
        finally:
            if edit is not None:
                self.mirror(edit, undo=True)
        other = "style" if target.kind == "object" else "object"
        classes = {"object": self.judge.objects, "style": self.judge.styles}[target.kind]
        names, times = np.unique(asked.chances[target.kind].argmax(1), return_counts=True)
        became = {classes[i]: int(n) for i, n in zip(names, times, strict=True)}
        return {
            "shown": asked.right(target.kind).astype(int).tolist(),
            "beside": asked.right(other).astype(int).tolist(),
            **kept,
            "became": dict(sorted(became.items(), key=lambda item: -item[1])[:5]),
        }

    def measure_kept(self, places: list[int]) -> dict[str, Any]:
        """Hits of the pool's pictures by the twin as it stands: {"object", "style"}."""
        kept = self.draw([self.pool[i] for i in places], places)
        return {kind: kept.right(kind).astype(int).tolist() for kind in ("object", "style")}
