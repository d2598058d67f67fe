"""The classifier that checks what a class-conditional model draws: a small CNN, a head each.

    p(attribute) = softmax(W_a pool(h(x))),    sum of cross-entropies, Adam

The reference has a ResNet-18 and takes no part in attribution either. It is trained on pictures of
all combinations, those held out too, and measured on pictures that it was not trained on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from concept_trak.atomic_io import make_folder
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.models.vocabulary import Vocabulary
from experiments.training.loop import LrPhase, Run, run_training, step_generator

from ..schemes import AttributeScheme, labels_of


@dataclass(frozen=True)
class ClassifierSettings:
    """Part of its identity. width: channels of the first of three stages."""

    width: int = 24
    steps: int = 400
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0


class Classifier(nn.Module):
    """Three strided stages, then what is where on a 4 x 4 grid at most."""

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        widths = [3, width, 2 * width, 4 * width]
        stages: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            stages += [nn.Conv2d(a, b, 3, 1, 1), nn.GroupNorm(4, b), nn.ReLU()]
            stages += [nn.Conv2d(b, b, 3, 2, 1), nn.GroupNorm(4, b), nn.ReLU()]
        self.body = nn.Sequential(*stages, nn.AdaptiveMaxPool2d(4), nn.Flatten())
        hidden = 16 * widths[-1]
        classes = vocabulary.attributes.values()
        self.heads = nn.ModuleList(nn.Linear(hidden, len(c)) for c in classes)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits [B, classes] of each attribute; x [B, 3, H, W] in -1 to 1."""
        h = self.body(x)
        return [head(h) for head in self.heads]

    @torch.no_grad()
    def probabilities(self, pixels: np.ndarray) -> list[np.ndarray]:
        """[n, classes] of each attribute; pixels uint8 [n, H, W, 3]."""
        parts = [self(scaled(pixels[i : i + 256])) for i in range(0, len(pixels), 256)]
        return [torch.cat(p).softmax(1).numpy() for p in zip(*parts, strict=True)]

    def right(self, pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """bool [n, A]: whether each attribute is read as these numbers [n, A] say."""
        found = [p.argmax(1) for p in self.probabilities(pixels)]
        return np.stack(found, 1) == indices


def scaled(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, H, W] in -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(
    data: ImageCaptionDataset,
    scheme: AttributeScheme,
    size: int,
    settings: ClassifierSettings,
    work: Path,
) -> Classifier:
    """On the pictures of `data` at a side of `size` pixels; goes on from its checkpoint."""
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        net = Classifier(scheme.vocabulary, s.width)
    pixels = data.images(range(len(data)), size)
    indices = scheme.vocabulary.indices(labels_of(scheme, data))
    decides: dict[str, Any] = {"settings": asdict(s), "scheme": scheme.as_json()}
    decides |= {"data": data.content_hash(), "size": size}
    params = dict(net.named_parameters())
    run = Run(
        make_folder(work) / "classifier.safetensors",
        (LrPhase(s.steps, s.steps),),
        s.lr,
        20,
        0.9,
        100,
        desc="classifier",
        made_from=json.loads(json.dumps(decides)),
    )
    loss = functools.partial(_loss, net, scaled(pixels), indices, s)
    run_training(params, loss, run).copy_to(params)
    return net.eval().requires_grad_(False)


def _loss(
    net: Classifier, x: torch.Tensor, indices: torch.Tensor, s: ClassifierSettings, step: int
) -> torch.Tensor:
    g = step_generator(s.seed, step)
    index = torch.randint(len(x), (s.batch,), generator=g)
    noise = 0.1 * torch.randn(s.batch, *x.shape[1:], generator=g)  # as a drawn picture may have
    logits = net(x[index] + noise)
    targets = indices[index].T
    return sum(F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True))
