"""How much a model knows of a concept, measured on pictures that no model has learned.

    J_c(theta) = mean of || eps - eps_theta(x_t, t, without c) ||^2
                       - || eps - eps_theta(x_t, t, with c) ||^2

over held-out pictures x that show c, levels t and noises eps: the log-likelihood ratio of a
diffusion classifier (Li et al. 2023), up to its factor 1/2 and over D values. It is smooth, needs
no sampling, and meets the same noises in every model. High levels only: there the caption decides
what is drawn. "With c" is the full caption, "without c" what it leaves when c is taken out: the
style for an object, the object for a style. Beside it what a user sees: the judge's probability of
c in pictures drawn for these captions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_trak.atomic_io import make_folder, write_bytes
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.gradients.states import draw_noise
from concept_trak.models.ddim import q_sample
from concept_trak.models.sample import SamplingSettings, sample
from concept_trak.models.text_to_image import TextToImage
from concept_trak.validated_io import read_json, read_numbers
from experiments.emoji.classifier.net import EmojiClassifier, resized

from .subsets import KINDS, WITHOUT, restore_hint, texts

LEVELS = (500, 600, 700, 800, 900)
PROMPTS = ("full", "object", "style", "empty")


@dataclass(frozen=True)
class MeasureSettings:
    """noises: a level. seeds: pictures drawn for each caption. BATCH bounds the memory."""

    noises: int = 8
    noise_seed: int = 3
    drawn: int = 2
    guidance_scale: float = 3.0
    num_steps: int = 20
    batch: int = 64


@dataclass(frozen=True)
class ConceptMeasurements:
    """Of one model: losses [P, LEVELS, PROMPTS] of P held-out pictures, mean over the noises;
    judged {kind: [P]}, the judge's probability of the concept in the pictures drawn.
    """

    losses: np.ndarray
    judged: dict[str, np.ndarray]

    def of_pictures(self, kind: str) -> np.ndarray:
        """[P]: each picture's log-likelihood ratio of its concept of this kind."""
        at = PROMPTS.index
        gain = self.losses[:, :, at(WITHOUT[kind])] - self.losses[:, :, at("full")]
        return gain.mean(1)

    def of_concepts(self, kind: str, held_out: ImageCaptionDataset, names: list[str]) -> np.ndarray:
        """J_c [len(names)]."""
        return by_concept(self.of_pictures(kind), held_out.column(kind), names)

    def judged_of(self, kind: str, held_out: ImageCaptionDataset, names: list[str]) -> np.ndarray:
        """The judge's rate of each concept [len(names)]."""
        return by_concept(self.judged[kind], held_out.column(kind), names)


@dataclass(frozen=True)
class ClassifierRates:
    """Presences whose figure is the judge's rate in the pictures drawn: what a user sees."""

    of: Any

    def of_concepts(self, kind: str, held_out: ImageCaptionDataset, names: list[str]) -> np.ndarray:
        """See `ConceptMeasurements.judged_of`."""
        return np.asarray(self.of.judged_of(kind, held_out, names))


def by_concept(values: np.ndarray, shown: list[str], names: list[str]) -> np.ndarray:
    """Mean of the pictures' values [P] over those that show each concept."""
    column = np.array(shown)
    return np.array([values[column == name].mean() for name in names])


@torch.no_grad()
def losses_of(
    model: TextToImage, x0: torch.Tensor, held_out: ImageCaptionDataset, measure: MeasureSettings
) -> np.ndarray:
    """[P, LEVELS, PROMPTS]: ||eps - eps_hat||^2 / D, mean over the noises; x0 [P, C, h, w].

    Every picture meets the same noises, whatever the batch.
    """
    prompts = [[*texts(r["object_phrase"], r["style_phrase"]), ""] for r in held_out.records]
    out = np.zeros((len(x0), len(LEVELS), len(PROMPTS)))
    noises = range(measure.noises)
    for place, level in enumerate(LEVELS):
        eps = draw_noise(measure.noise_seed, noises, level, x0.shape[1:]).to(x0)
        for start in range(0, len(x0), measure.batch):
            rows = slice(start, start + measure.batch)
            conds = [
                model.encode_prompts([told[k] for told in prompts[rows]])
                for k in range(len(PROMPTS))
            ]
            for one in eps:
                same = one.expand_as(x0[rows])
                x_t = q_sample(x0[rows], same, model.schedule.level(level))
                for k, cond in enumerate(conds):
                    error = (model.eps(x_t, level, cond) - same).square().flatten(1).mean(1)
                    out[rows, place, k] += error.double().cpu().numpy()
    return out / measure.noises


def classifier_rates(
    model: TextToImage,
    held_out: ImageCaptionDataset,
    judge: EmojiClassifier,
    measure: MeasureSettings,
) -> dict[str, np.ndarray]:
    """{kind: [P]}: the judge's probability of each caption's concept, mean over pictures drawn."""
    captions, shape = held_out.captions, model.latent_shape
    generation = SamplingSettings(measure.guidance_scale, measure.num_steps)
    classes = {"object": judge.objects, "style": judge.styles}
    at = {kind: [classes[kind].index(c) for c in held_out.column(kind)] for kind in KINDS}
    rows, total = np.arange(len(captions)), {kind: np.zeros(len(captions)) for kind in KINDS}
    for seed in range(measure.drawn):
        x_T = draw_noise(seed, range(len(captions)), 1000, shape)
        parts = [slice(i, i + measure.batch) for i in range(0, len(captions), measure.batch)]
        drawn = [sample(model, captions[p], x_T[p], generation, measure.batch) for p in parts]
        pixels = np.stack([np.asarray(image) for x0 in drawn for image in model.decode(x0)])
        *_, found = judge.predict(resized(pixels, judge.settings.size))
        for kind in KINDS:
            total[kind] += found[kind][rows, at[kind]]
    return {kind: values / measure.drawn for kind, values in total.items()}


def measure_presences(
    model: TextToImage,
    held_out: ImageCaptionDataset,
    judge: EmojiClassifier,
    measure: MeasureSettings,
) -> ConceptMeasurements:
    """Both, for all held-out pictures; they do not depend on `measure.batch`."""
    pixels = held_out.images(range(len(held_out)), model.image_size)
    losses = losses_of(model, model.encode_images(pixels), held_out, measure)
    return ConceptMeasurements(losses, classifier_rates(model, held_out, judge, measure))


# ---- on the disk


def write_presences(path: Path, found: ConceptMeasurements, made_from: dict[str, Any]) -> None:
    """As JSON of five significant digits; made_from: what identifies the model."""
    content = {
        "losses": _rounded(found.losses).tolist(),
        "judged": {kind: _rounded(values).tolist() for kind, values in found.judged.items()},
        "made_from": made_from,
    }
    make_folder(path.parent)
    write_bytes(path, (json.dumps(content, sort_keys=True) + "\n").encode())


def read_presences(path: Path, held_out: ImageCaptionDataset, data: str) -> ConceptMeasurements:
    """What `write_presences` wrote. UserError for a file that is none, or of other pictures.

    data: content hash of the train pictures that the model must have learned from.
    """
    found, count, remedy = read_json(path, restore_hint(path)), len(held_out), restore_hint(path)
    shape, what = (count, len(LEVELS), len(PROMPTS)), f"{path} holds no presences"
    losses = read_numbers(found, "losses", shape, what, remedy).astype(float)
    shares = {k: read_numbers(found.get("judged"), k, (count,), what, remedy) for k in KINDS}
    refuse_other_pictures(path, found, held_out, data)
    return ConceptMeasurements(
        losses, {kind: values.astype(float) for kind, values in shares.items()}
    )


def refuse_other_pictures(
    path: Path, found: dict[str, Any], held_out: ImageCaptionDataset, data: str
) -> None:
    """UserError for presences, as JSON, of other pictures; see `read_presences`."""
    known = found.get("made_from")
    known = known if isinstance(known, dict) else {}
    if (known.get("held_out"), known.get("data")) != (held_out.content_hash(), data):
        raise UserError(
            f"{path} was measured on other pictures than {held_out.root}; {restore_hint(path)}"
        )


def weights_of(path: Path) -> str:
    """Hash of the weights that the presences of a file were measured on."""
    made_from = read_json(path, restore_hint(path)).get("made_from")
    return str(made_from.get("weights")) if isinstance(made_from, dict) else ""


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{v:.5g}") for v in values.ravel()]).reshape(values.shape)
