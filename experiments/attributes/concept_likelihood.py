"""The bench of truth for class-conditional models: what `trainer`, `presence` and `asked` are to
the embedded model. Plans, fleet, LDS, counterfactual and their statistics are the same.

    J_c(theta) = mean of || eps - eps_theta(x_t, t, labels without that of c) ||^2
                       - || eps - eps_theta(x_t, t, all labels) ||^2

over held-out pictures that show c, levels and noises that all models share. Beside it the
classifier's probability of c in pictures drawn for the labels of these pictures.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_trak.atomic_io import make_folder, write_bytes
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.gradients.states import draw_noise
from concept_trak.models.class_conditional import Architecture, ClassConditional
from concept_trak.models.ddim import q_sample
from concept_trak.models.sample import SamplingSettings, sample
from concept_trak.settings import provenance
from concept_trak.validated_io import read_json, read_numbers
from experiments.truth.concept_likelihood import by_concept, refuse_other_pictures
from experiments.truth.subsets import RetrainingPlan, Subset, kinds_of, restore_hint
from experiments.truth.train_many import setup_digest, subset_digest

from .model.classifier import Classifier, ClassifierSettings, train_classifier
from .model.train import TrainingJob, TrainSettings, train
from .schemes import AttributeScheme, Labels, labels_of, load_labelled

LEVELS = (300, 500, 700, 900)


@dataclass(frozen=True)
class LabelledMeasure:
    """noises: a level. drawn: pictures for each held-out one."""

    noises: int = 2
    noise_seed: int = 3
    drawn: int = 1
    guidance_scale: float = 2.0
    num_steps: int = 10
    batch: int = 128


@dataclass(frozen=True)
class ClassConditionalSetup:
    """Where models come from and go to; see `fleet.Bench`. classifier: folder of the finished
    classifier's checkpoint.
    """

    data: str
    work: Path
    kept: Path
    classifier: Path
    architecture: Architecture
    settings: TrainSettings = TrainSettings()
    measure: LabelledMeasure = LabelledMeasure()
    checks: ClassifierSettings = ClassifierSettings()

    def presences(self, plan: str, subset: Subset) -> Path:
        """File of one model's presences."""
        return self.kept / plan / f"{subset.name}.json"

    def job(self, subset: Subset) -> TrainingJob:
        """The training of a subset's model."""
        data, scheme = loaded(self.data)
        part = data.split("train")
        kept = subset.kept(len(part))
        architecture, settings = self.architecture, self.settings
        return TrainingJob(subset.name, scheme, part, kept, architecture, settings, subset.seed)


@functools.lru_cache(1)
def loaded(root: str) -> tuple[ImageCaptionDataset, AttributeScheme]:
    """The pictures, read once a process."""
    return load_labelled(root)


@functools.lru_cache(1)
def judge(bench: ClassConditionalSetup, size: int) -> Classifier:
    """The classifier of a bench."""
    data, scheme = loaded(bench.data)
    return train_classifier(data.split("classifier"), scheme, size, bench.checks, bench.classifier)


@dataclass(frozen=True)
class LabelledPresences:
    """Of one model: {kind: [P]} of P held-out pictures. gains: log-likelihood ratios of their
    concepts. judged: the classifier's probability of them in pictures drawn.
    """

    gains: Mapping[str, np.ndarray]
    judged: Mapping[str, np.ndarray]

    def of_concepts(self, kind: str, held_out: ImageCaptionDataset, names: list[str]) -> np.ndarray:
        """J_c [len(names)]."""
        return by_concept(self.gains[kind], held_out.column(kind), names)

    def judged_of(self, kind: str, held_out: ImageCaptionDataset, names: list[str]) -> np.ndarray:
        """The classifier's rate of each concept [len(names)]."""
        return by_concept(self.judged[kind], held_out.column(kind), names)


@torch.no_grad()
def concept_llr(
    model: ClassConditional,
    held_out: ImageCaptionDataset,
    labels: list[Labels],
    measure: LabelledMeasure,
) -> dict[str, np.ndarray]:
    """{kind: [P]}; every picture meets the same noises, whatever the batch."""
    x0 = model.encode_images(held_out.images(range(len(held_out)), model.image_size))
    kinds = kinds_of(held_out)
    total = {kind: np.zeros(len(x0)) for kind in kinds}
    for level in LEVELS:
        for noise in draw_noise(measure.noise_seed, range(measure.noises), level, x0.shape[1:]):
            for start in range(0, len(x0), measure.batch):
                rows = slice(start, start + measure.batch)
                part, eps = labels[rows], noise.to(x0).expand_as(x0[rows])
                x_t = q_sample(x0[rows], eps, model.schedule.level(level))

                def loss(told: list[Labels], x_t: Any = x_t, eps: Any = eps, t: int = level) -> Any:
                    error = model.eps(x_t, t, model.encode_labels(told)) - eps
                    return error.square().flatten(1).mean(1).double().cpu().numpy()

                full = loss(part)
                for kind in kinds:
                    without = [{k: v for k, v in one.items() if k != kind} for one in part]
                    total[kind][rows] += loss(without) - full
    return {k: v / (len(LEVELS) * measure.noises) for k, v in total.items()}


def judged_of(
    model: ClassConditional, held_out: ImageCaptionDataset, bench: ClassConditionalSetup
) -> dict[str, np.ndarray]:
    """{kind: [P]}: the classifier's probability of each label in pictures drawn for them."""
    _, scheme = loaded(bench.data)
    net = judge(bench, model.image_size)
    m, captions, rows = bench.measure, held_out.captions, np.arange(len(held_out))
    indices = model.vocabulary.indices(labels_of(scheme, held_out)).numpy()
    total = {kind: np.zeros(len(rows)) for kind in scheme.vocabulary.names}
    generation = SamplingSettings(m.guidance_scale, m.num_steps)
    for seed in range(m.drawn):
        x_T = draw_noise(seed, range(len(rows)), 1000, model.latent_shape)
        drawn = sample(model, captions, x_T, generation, len(rows))
        found = net.probabilities(np.stack([np.asarray(p) for p in model.decode(drawn)]))
        for place, kind in enumerate(total):
            total[kind] += found[place][rows, indices[:, place]]
    return {kind: values / m.drawn for kind, values in total.items()}


def train_and_measure(bench: ClassConditionalSetup, plan: RetrainingPlan, subset: Subset) -> None:
    """One model from scratch to its presences, in this process, on one thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data, scheme = loaded(bench.data)
    held_out, begun = data.split("held_out"), time.time()
    job = bench.job(subset)
    model = train(job, bench.work)
    trained = time.time()
    gains = concept_llr(model, held_out, labels_of(scheme, held_out), bench.measure)
    found = LabelledPresences(gains, judged_of(model, held_out, bench))
    made_from: dict[str, Any] = {
        "subset": subset_digest(subset),
        "bench": setup_digest(bench),
        "data": job.data.content_hash(),
        "held_out": held_out.content_hash(),
        "weights": model.identity(),
        "settings": asdict(bench.settings),
        "architecture": asdict(bench.architecture),
        "measure": asdict(bench.measure),
        "seconds": {"training": round(trained - begun), "measuring": round(time.time() - trained)},
        "provenance": provenance(),
    }
    write_presences(bench.presences(plan.name, subset), found, made_from)


def write_presences(path: Path, found: LabelledPresences, made_from: dict[str, Any]) -> None:
    """As JSON of four significant digits; made_from: what identifies the model."""
    content = {
        part: {kind: [float(f"{v:.4g}") for v in values] for kind, values in whole.items()}
        for part, whole in (("gains", found.gains), ("judged", found.judged))
    }
    make_folder(path.parent)
    text = json.dumps({**content, "made_from": made_from}, sort_keys=True)
    write_bytes(path, (text + "\n").encode())


def read_presences(path: Path, held_out: ImageCaptionDataset, data: str) -> LabelledPresences:
    """What `write_presences` wrote. UserError for a file that is none, or of other pictures.

    data: content hash of the train pictures that the model must have learned from.
    """
    found, shape, remedy = read_json(path, restore_hint(path)), (len(held_out),), restore_hint(path)
    what = f"{path} holds no presences"
    parts = [
        {
            kind: read_numbers(found.get(part), kind, shape, what, remedy).astype(float)
            for kind in kinds_of(held_out)
        }
        for part in ("gains", "judged")
    ]
    refuse_other_pictures(path, found, held_out, data)
    return LabelledPresences(*parts)
