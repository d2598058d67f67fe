"""What is asked of labelled pictures: each attribute of each picture that the model draws.

Concept-TRAK's protocol (appendix; `toy/` of its repository): for every combination, drawings that
the classifier reads as asked; for every attribute of one, the train pictures of its class are
relevant. "ood" are the combinations that no train picture shows. Dampings are chosen on drawings
from other noises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from concept_trak.attribution.prompts import contrast_prompts
from concept_trak.attribution.question import Query, QueryImage, generate, sample_settings
from concept_trak.attribution.task import AttributionTask
from concept_trak.errors import UserError, script_hint
from concept_trak.models.sample import initial_noise
from concept_trak.models.vocabulary import Vocabulary
from concept_trak.settings import short_hash
from concept_trak.store.array_cache import read_npz, write_npz
from experiments.benchmark.protocol import TUNE

from .schemes import AttributeScheme, Labels, read_scheme

TUNE_SEED = 100_000  # where the noises of drawings that choose dampings begin
SPLITS = ("ood", "id")
MOST_TRIES = 3  # drawings of a combination for each one asked about, until the classifier agrees
DEFAULT_SAMPLES = 16  # of a combination


@dataclass(frozen=True)
class QuerySettings:
    """combinations: those asked about. samples: drawings of each. tune: those of each that choose
    dampings. classifier: whether it decides which drawings are asked about; None: any will do.
    """

    combinations: Sequence[Labels]
    samples: int = DEFAULT_SAMPLES
    tune: int = 4
    classifier: Any = None
    keep: Path | None = None


def questions_of(form: str, vocabulary: Vocabulary, picture: QueryImage) -> Iterator[Query]:
    """One for each attribute. With form "slider" c- is the caption with the other class in place of
    the target, as in the paper's code, or without it where there are more than two.
    """
    labels = vocabulary.parse(picture.prompt)
    for name, word in labels.items():
        (plus, minus), *_ = contrast_prompts(form, picture.prompt, [word])
        if form == "slider":
            others = vocabulary.others(word)
            flipped = {**labels, name: others[0]} if len(others) == 1 else labels
            kept = {k: v for k, v in flipped.items() if k != name or v != word}
            minus = vocabulary.caption(kept)
        yield Query(picture, word, plus, minus, name)


class LabelledBenchmark:
    """See the module docstring and `experiments.benchmark.protocol.Benchmark`.

    asked: which combinations, and how many drawings; by default all, and `DEFAULT_SAMPLES`
    (NUM_QUERIES bounds it). drawn {split: share of all drawings tried that the classifier reads as
    asked}.
    """

    kinds: ClassVar[tuple[str, ...]] = ("generated",)
    splits: ClassVar[tuple[str, ...]] = SPLITS
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, task: AttributionTask, asked: QuerySettings | None = None) -> None:
        self.task = task
        vocabulary = getattr(task.model, "vocabulary", None)
        if vocabulary is None:
            raise UserError(
                f"{task.settings.sd_model_path} is no class-conditional model; "
                f"train one (about an hour): {script_hint('synthetic/run_all.sh', STAGE='train')}"
            )
        self.vocabulary: Vocabulary = vocabulary
        self.concepts = self.vocabulary.names
        self.scheme: AttributeScheme = read_scheme(task.settings.data_dir)
        few = task.settings.num_queries or DEFAULT_SAMPLES
        self.asked = asked or QuerySettings(self.scheme.combinations(), few)
        self.drawn: dict[str, float] = {}
        self._relevant: dict[str, np.ndarray] = {}

    def questions(self, kind: str = "generated") -> dict[str, list[Query]]:
        """See `Benchmark.questions`; TUNE asks about all combinations."""
        form = self.task.settings.query_form
        return {
            split: [q for p in pictures for q in questions_of(form, self.vocabulary, p)]
            for split, pictures in self.pictures.items()
        }

    def relevant(self, question: Query) -> np.ndarray:
        """See `Benchmark.relevant`. UserError for a concept that no train picture shows."""
        if question.words not in self._relevant:
            name, word = self.vocabulary.attribute_of(question.words)
            found = np.array(self.task.train.column(name)) == word
            if not found.any():
                raise UserError(
                    f"no train picture shows {word}; ask without it: set HELD_OUT or "
                    "TARGET_CONCEPTS"
                )
            self._relevant[question.words] = found
        return self._relevant[question.words]

    @cached_property
    def pictures(self) -> dict[str, list[QueryImage]]:
        """{split: drawings}, those of a combination side by side; from `keep` if they are there."""
        groups: dict[str, list[Labels]] = {split: [] for split in SPLITS}
        for labels in self.asked.combinations:
            groups["ood" if self.scheme.is_held_out(labels) else "id"].append(labels)
        wanted = {s: (groups[s], self.asked.samples, 0) for s in SPLITS if groups[s]}
        wanted[TUNE] = self.asked.combinations, self.asked.tune, TUNE_SEED
        drawings = QueryImages(self.task, self.asked.classifier, self.vocabulary)
        found = {s: drawings.of(self.asked.keep, *what) for s, what in wanted.items()}
        self.drawn = {split: share for split, (_, share) in found.items()}
        return {split: pictures for split, (pictures, _) in found.items()}


@dataclass(frozen=True)
class QueryImages:
    """Draws what is asked about, and keeps it. classifier: see `QuerySettings`."""

    task: AttributionTask
    classifier: Any
    vocabulary: Vocabulary

    def of(
        self, keep: Path | None, combinations: Sequence[Labels], samples: int, seed: int
    ) -> tuple[list[QueryImage], float]:
        """(`samples` drawings of each combination, share of all tried that the classifier reads as
        asked); noises count from `seed`.
        """
        captions = [self.vocabulary.caption(labels) for labels in combinations]
        if keep is None:
            return self._chosen(*self._tried(captions, samples, seed), captions, samples)
        model = [self.task.model.identity(), sample_settings(self.task.settings, seed)]
        path = keep / f"{short_hash([model, captions, samples, self.classifier is not None])}.npz"
        if kept := read_npz(path):
            return self._pictures(kept)
        pictures, share = self._chosen(*self._tried(captions, samples, seed), captions, samples)
        x0 = torch.cat([p.x0 for p in pictures]).float().cpu().numpy()
        seeds = [p.source["generated"]["seed"] for p in pictures]
        prompts = np.array([p.prompt for p in pictures])
        write_npz(path, {"x0": x0, "seeds": seeds, "prompts": prompts, "share": share})
        return pictures, share

    def _pictures(self, kept: dict[str, np.ndarray]) -> tuple[list[QueryImage], float]:
        """What `of` kept."""
        model, settings = self.task.model, self.task.settings
        latents = torch.from_numpy(kept["x0"]).to(model.device, model.dtype)
        seeds, prompts, share = kept["seeds"], kept["prompts"], float(kept["share"])
        pictures = []
        for x0, number, prompt, shown in zip(
            latents.split(1), seeds.tolist(), prompts.tolist(), model.decode(latents), strict=True
        ):
            x_T = initial_noise(model.latent_shape, number).to(model.device, model.dtype)
            source = sample_settings(settings, number)
            pictures.append(QueryImage(prompt, x0, x_T, np.asarray(shown), source))
        return pictures, share

    def _tried(
        self, captions: Sequence[str], samples: int, seed: int
    ) -> tuple[dict[str, list[QueryImage]], dict[str, list[QueryImage]]]:
        """(drawings of each caption that the classifier reads as asked, the others)."""
        right: dict[str, list[QueryImage]] = {c: [] for c in captions}
        wrong: dict[str, list[QueryImage]] = {c: [] for c in captions}
        for number in range(samples * MOST_TRIES):
            todo = [c for c in captions if len(right[c]) < samples]
            if not todo:
                break
            pictures = generate(self.task.model, self.task.settings, todo, seed + number)
            for picture, good in zip(pictures, self._agrees(pictures), strict=True):
                (right if good else wrong)[picture.prompt].append(picture)
        return right, wrong

    def _chosen(
        self,
        right: dict[str, list[QueryImage]],
        wrong: dict[str, list[QueryImage]],
        captions: Sequence[str],
        samples: int,
    ) -> tuple[list[QueryImage], float]:
        """Where the classifier agrees with too few, the first others fill up."""
        tried = sum(len(right[c]) + len(wrong[c]) for c in captions)
        share = sum(len(right[c]) for c in captions) / max(tried, 1)
        return [p for c in captions for p in (right[c] + wrong[c])[:samples]], share

    def _agrees(self, pictures: list[QueryImage]) -> np.ndarray:
        """bool [n]: whether the classifier reads every attribute as asked."""
        if self.classifier is None:
            return np.ones(len(pictures), dtype=bool)
        told = [self.vocabulary.parse(p.prompt) for p in pictures]
        indices = self.vocabulary.indices(told).numpy()
        return self.classifier.right(np.stack([p.pixels for p in pictures]), indices).all(1)
