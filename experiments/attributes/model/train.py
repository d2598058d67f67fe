"""Train a class-conditional model: seeded, resumable, with condition drop-out.

    L = E || v - v_theta(x_t, t, labels) ||^2,      v = alpha_t eps - sigma_t x0

A share of the draws has all labels open, another one attribute open (Ho & Salimans 2022), so that
every caption, the empty one too, means something to the model. Chance is shared between models of
one seed that learn different parts of the pictures: step s gives every picture a key, and a draw
takes the picture with the largest key among those kept, with the same noise, level and drop-out.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_trak.atomic_io import make_folder
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.models.class_conditional import Architecture, ClassConditional, call_network
from concept_trak.models.condition import Condition
from concept_trak.models.vocabulary import Vocabulary
from concept_trak.settings import short_hash
from experiments.training.loop import LrPhase, Run, load_averages, run_training, step_generator

from ..schemes import AttributeScheme, labels_of


@dataclass(frozen=True)
class TrainSettings:
    """How; part of the identity of what is trained. Rates are per step."""

    steps: int = 800
    batch: int = 48
    lr: float = 2e-3
    warmup: int = 50  # steps
    weight_decay: float = 1e-3
    ema_decay: float = 0.99
    open_share: float = 0.1  # of the draws see no label
    partial_share: float = 0.25  # ... all but one
    save_every: int = 200  # steps


@dataclass(frozen=True)
class Examples:
    """latents [N, C, h, w]. indices: int [N, A] of the labels. kept: bool [N], what may be drawn.
    UserError when nothing is.
    """

    latents: torch.Tensor
    indices: torch.Tensor
    kept: torch.Tensor

    def __post_init__(self) -> None:
        if not self.kept.any():
            raise UserError("no picture is left to train on; give kept some")


def examples_of(
    model: ClassConditional, scheme: AttributeScheme, data: ImageCaptionDataset, kept: np.ndarray
) -> Examples:
    """Of a train split."""
    latents = model.encode_images(data.images(range(len(data)), model.image_size))
    indices = model.vocabulary.indices(labels_of(scheme, data))
    return Examples(latents, indices, torch.from_numpy(kept))


def draw(
    examples: Examples, vocabulary: Vocabulary, settings: TrainSettings, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch: (x0 [B, C, h, w], label numbers [B, A], t [B], eps [B, C, h, w])."""
    s, g = settings, step_generator(seed, step)
    keys = torch.rand(s.batch, len(examples.kept), generator=g)
    index = keys.masked_fill(~examples.kept, -1).argmax(1)
    x0, labels = examples.latents[index], examples.indices[index].clone()
    u, count = torch.rand(s.batch, generator=g), labels.shape[1]
    which = torch.randint(count, (s.batch,), generator=g)
    opened = torch.tensor([len(c) for c in vocabulary.attributes.values()]).expand_as(labels)
    one = (torch.arange(count) == which[:, None]) & (u < s.open_share + s.partial_share)[:, None]
    labels = torch.where(one | (u < s.open_share)[:, None], opened, labels)
    # stratified over the batch, to calm the loss
    t = ((torch.arange(s.batch) + torch.rand(s.batch, generator=g)) / s.batch * 1000).long()
    return x0, labels, t, torch.randn(x0.shape, generator=g)


def loss_of_step(
    model: ClassConditional, examples: Examples, settings: TrainSettings, seed: int, step: int
) -> torch.Tensor:
    """The module docstring's loss, a scalar; the network's products in bfloat16."""
    x0, labels, t, eps = draw(examples, model.vocabulary, settings, seed, step)
    a, device = model.schedule.alpha_bar[t].float().view(-1, 1, 1, 1), model.device
    x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).to(device)
    cond = Condition(model.vocabulary.tokens(labels).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        v_hat = call_network(model.network, x_t, t.to(device), cond)
    v = (a.sqrt() * eps - (1 - a).sqrt() * x0).to(device)
    return (v_hat.float() - v).square().mean()


def identity(
    scheme: AttributeScheme,
    data: ImageCaptionDataset,
    kept: np.ndarray,
    architecture: Architecture,
    settings: TrainSettings,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides a model, JSON."""
    decides = {
        "architecture": asdict(architecture),
        "settings": asdict(settings),
        "seed": seed,
        "scheme": scheme.as_json(),
        "data": data.content_hash(),
        "kept": short_hash(kept.tolist()),
    }
    return json.loads(json.dumps(decides))  # as a checkpoint gives it back


@dataclass(frozen=True)
class TrainingJob:
    """One model to train. kept: bool [N] of the train pictures."""

    name: str
    scheme: AttributeScheme
    data: ImageCaptionDataset
    kept: np.ndarray
    architecture: Architecture
    settings: TrainSettings
    seed: int

    def identity(self) -> dict[str, Any]:
        """See `identity`."""
        return identity(
            self.scheme, self.data, self.kept, self.architecture, self.settings, self.seed
        )

    def checkpoint(self, work: Path) -> Path:
        """Where its training is kept, below a folder of trainings."""
        return work / f"{self.name}-{short_hash(self.identity())}" / "model.safetensors"

    def run(self, work: Path) -> Run:
        """How it is trained."""
        s = self.settings
        return Run(
            self.checkpoint(work),
            (LrPhase(s.steps, s.steps),),
            s.lr,
            s.warmup,
            s.ema_decay,
            s.save_every,
            weight_decay=s.weight_decay,
            desc=self.name,
            made_from=self.identity(),
        )


def train(job: TrainingJob, work: Path, device: str = "cpu") -> ClassConditional:
    """The model of a job with its averaged weights, frozen; goes on from its checkpoint.

    UserError for a checkpoint of something else, a full disk; FloatingPointError on a loss that is
    not finite.
    """
    s, run = job.settings, job.run(work)
    model = build_untrained(job, device)
    params = dict(model.network.named_parameters())
    make_folder(run.checkpoint.parent)
    examples = examples_of(model, job.scheme, job.data, job.kept)
    loss = functools.partial(loss_of_step, model, examples, s, job.seed)
    run_training(params, loss, run).copy_to(params)
    return freeze(model)


def finished(job: TrainingJob, work: Path, device: str = "cpu") -> ClassConditional | None:
    """The model of a job if its training has ended, else None. UserError for a checkpoint of
    another job.
    """
    model = build_untrained(job, device)
    ended = load_averages(job.run(work), dict(model.network.named_parameters()))
    return freeze(model) if ended else None


def build_untrained(job: TrainingJob, device: str) -> ClassConditional:
    """Untrained, on a device."""
    network = job.architecture.build(job.scheme.vocabulary, job.seed).to(device)
    return ClassConditional(network, job.architecture, job.scheme.vocabulary)


def freeze(model: ClassConditional) -> ClassConditional:
    """The model, ready to be asked."""
    model.network.eval().requires_grad_(False)
    return model
