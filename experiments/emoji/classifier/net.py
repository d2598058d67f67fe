"""The judge's network: a small CNN that names the object and the art style of a picture.

    object = argmax softmax(W_o dropout(h_4))
    style  = argmax softmax(MLP([p, m_1, s_1, u_1, m_2, s_2, u_2, m_3, s_3, u_3]))

h_4 is the last stage's map with its 3 x 3 places kept: what a drawing shows is a matter of where
things are. Style is not: its head sees only place-free statistics, mean m_l, standard deviation s_l
(as in AdaIN, Huang & Belongie 2017) and maximum u_l of the channels of stage l, and p, the mean of
a per-pixel network: a learned soft palette. With h_4 in its sight it learns the drawings by heart
and names the style of new ones worse (0.61 against 0.71 in one fold of cross-validation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from concept_trak.errors import UserError, script_hint
from concept_trak.scoring.metrics import bootstrap_interval


@dataclass(frozen=True)
class EmojiClassifierSettings:
    """Hyper-parameters; written next to the weights."""

    seed: int = 0
    size: int = 64  # side of the pictures it takes, pixels
    inner_size: int = 48  # side at which it looks at them; a multiple of 16
    width: int = 32  # channels of the first of four stages; each has twice those of the one before
    hidden: int = 256  # units of the style head's hidden layer
    dropout: float = 0.1
    epochs: int = 120
    fold_epochs: int = 40  # of each fold of the cross-validation
    batch: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    # of the style's cross-entropy against the object's: style is the slower to learn
    style_weight: float = 2.0
    # share of a batch under full damage; the rest is only shifted, zoomed, turned and mirrored
    damage_share: float = 0.5


class Residual(nn.Module):
    """x -> relu(x + batchnorm(conv(x))), [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class EmojiClassifier(nn.Module):
    """Two-headed classifier. objects, styles: class names in the order of the heads' outputs."""

    def __init__(
        self,
        objects: Sequence[str],
        styles: Sequence[str],
        settings: EmojiClassifierSettings | None = None,
    ) -> None:
        super().__init__()
        self.objects, self.styles = list(objects), list(styles)
        self.settings = settings or EmojiClassifierSettings()
        c = [self.settings.width * 2**k for k in range(4)]
        self.palette = nn.Sequential(_conv(3, 64, 1, 1), _conv(64, 64, 1, 1))
        # The first stage holds half of all pixels but no shapes: one convolution is enough there.
        deeper = [nn.Sequential(_conv(a, b, 3, 2), Residual(b)) for a, b in pairwise(c)]
        self.stages = nn.ModuleList([_conv(3, c[0], 5, 2), *deeper])
        pooled, hidden, drop = 64 + 3 * sum(c[:3]), self.settings.hidden, self.settings.dropout
        self.object_head = nn.Sequential(nn.Dropout(drop), nn.Linear(9 * c[3], len(self.objects)))
        self.style_head = nn.Sequential(
            nn.BatchNorm1d(pooled),
            nn.Dropout(drop),
            nn.Linear(pooled, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(hidden, len(self.styles)),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, 3, inner_size, inner_size] in [0, 1]. Returns logits [B, objects], [B, styles]."""
        x = 2 * x - 1
        # Every other pixel: a palette needs no neighbours, and a quarter of them has all colours.
        statistics = [self.palette(x[:, :, ::2, ::2]).mean((2, 3))]
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < 3:
                statistics += [x.mean((2, 3)), x.std((2, 3)), x.amax((2, 3))]
        places = F.adaptive_avg_pool2d(x, 3).flatten(1)
        return self.object_head(places), self.style_head(torch.cat(statistics, 1))

    @torch.no_grad()
    def predict(
        self, images: np.ndarray, batch: int = 256
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Name the pictures. images: uint8 [n, size, size, 3], RGB.

        Returns object indices [n] and style indices [n] into `objects` and `styles`, and {"object":
        float32 [n, objects], "style": float32 [n, styles]}, rows summing to 1. Raises UserError on
        another shape or dtype.
        """
        training = self.training
        self.eval()
        x = to_input(images, self.settings)
        outputs = [self(chunk) for chunk in x.split(batch)]
        self.train(training)
        both = [torch.cat(logits).softmax(1).numpy() for logits in zip(*outputs, strict=True)]
        return both[0].argmax(1), both[1].argmax(1), {"object": both[0], "style": both[1]}

    @torch.no_grad()
    def features(self, images: np.ndarray, batch: int = 256) -> np.ndarray:
        """float32 [n, objects + styles]: each head's logits, centred and of unit norm, side by
        side. images as in `predict`.
        """
        outputs = [self(chunk) for chunk in to_input(images, self.settings).split(batch)]
        both = [torch.cat(logits) for logits in zip(*outputs, strict=True)]
        return torch.cat([F.normalize(x - x.mean(1, True)) for x in both], 1).numpy()

    def measure(
        self, pictures: np.ndarray, true_objects: Sequence[str], true_styles: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Share of the pictures that show the object, and the style, that their captions name.

        pictures: uint8 [n, size, size, 3]; true_objects, true_styles: n class names. Returns what
        `cell_accuracy` does, for "object", "style" and "both". Raises UserError for a name outside
        the judge's classes.
        """
        n, objects, styles = len(pictures), len(true_objects), len(true_styles)
        if not n == objects == styles:
            told = f"{n} pictures, {objects} objects, {styles} styles"
            raise UserError(f"{told}; give pictures a true_objects and a true_styles each")
        wanted_objects = class_indices(true_objects, self.objects, "object")
        wanted = np.array([wanted_objects, class_indices(true_styles, self.styles, "style")])
        right = np.array(self.predict(pictures)[:2]) == wanted
        cells, seed = wanted[0] * len(self.styles) + wanted[1], self.settings.seed
        return {head: cell_accuracy(hits, cells, seed) for head, hits in heads(right).items()}


def heads(right: np.ndarray) -> dict[str, np.ndarray]:
    """bool [2, n], object and style right -> bool [n] of each head and of both at once."""
    return {"object": right[0], "style": right[1], "both": right.all(0)}


def cell_accuracy(right: np.ndarray, cells: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Accuracy as the mean over cells of the share of right pictures.

    right: bool [n]. cells: [n], equal for one (object, style).
    Returns {"accuracy", "ci95": [low, high], "cells", "pictures"}. The bootstrap draws cells,
    because the seeds of one cell succeed or fail together; with equally many pictures a cell the
    accuracy is that over pictures.
    """
    _, cell = np.unique(cells, return_inverse=True)
    shares = np.bincount(cell, weights=right) / np.bincount(cell)
    low, high = bootstrap_interval(shares, seed)
    found = {"accuracy": float(shares.mean()), "ci95": [low, high]}
    return found | {"cells": len(shares), "pictures": len(right)}


def class_indices(names: Sequence[str], classes: list[str], what: str) -> list[int]:
    """Positions of names in classes; UserError, which calls them `what`, for one not there."""
    if unknown := sorted({name for name in names if name not in classes}):
        raise UserError(
            f"the judge does not know the {what} {unknown[0]!r}; train it on data that has "
            "it (two hours on one core): "
            f"{script_hint('emoji/train_judge.sh', DATA_DIR='my_pictures')}"
        )
    return [classes.index(name) for name in names]


def to_input(images: np.ndarray, settings: EmojiClassifierSettings) -> torch.Tensor:
    """uint8 [n, size, size, 3] -> float32 [n, 3, inner_size, inner_size] in [0, 1].

    UserError on another shape or dtype, or no picture.
    """
    images, side = np.asarray(images), settings.size
    fits = images.shape[1:] == (side, side, 3) and images.dtype == np.uint8
    if not (fits and len(images)):
        got = f"{images.dtype} {list(images.shape)}"
        raise UserError(
            f"the judge takes uint8 pictures [n, {side}, {side}, 3], got {got}; give images so"
        )
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, size=settings.inner_size, mode="bilinear", antialias=True)


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, size, size, 3] (Lanczos): the judge has a size of its own."""
    side, lanczos = (size, size), Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(p).resize(side, lanczos)) for p in pictures])
