"""The judge: trained on real pictures, it measures whether a generated one shows what its caption
says.

    L = CE(object head, object) + w CE(style head, style)      with label smoothing

on pictures under `augment.augment`, since it must judge imperfect pictures, and on what the
autoencoder makes of them, since every picture it will judge has been through its decoder. Accuracy
on art it was not trained on comes from `cross_validate`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from concept_trak.atomic_io import atomic_folder
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import TextToImage
from concept_trak.settings import provenance

from .augment import augment, warp
from .io import load_judge, save_judge
from .net import (
    EmojiClassifier,
    EmojiClassifierSettings,
    cell_accuracy,
    class_indices,
    heads,
    resized,
    to_input,
)


def train_judge(
    versions: dict[str, np.ndarray],
    objects: Sequence[str],
    styles: Sequence[str],
    settings: EmojiClassifierSettings,
    desc: str = "judge",
) -> EmojiClassifier:
    """Fit both heads by cross-entropy with AdamW, linear warm-up and cosine decay, over
    `settings.epochs`, on the CPU.

    versions: name -> uint8 [N, size, size, 3], the same N pictures in each; an epoch takes one of
    them of every picture, by chance. objects, styles: N names, whose sorted distinct values become
    the classes. The same arguments give the same judge; the caller's random state is left alone.
    Raises UserError if the pictures have another shape.
    """
    x = torch.stack([to_input(images, settings) for images in versions.values()])
    classes = sorted(set(objects)), sorted(set(styles))
    truth = [
        torch.tensor(class_indices(names, known, "class"))
        for names, known in zip((objects, styles), classes, strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        judge = EmojiClassifier(*classes, settings)
        judge.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        decay, betas = settings.weight_decay, (0.9, 0.99)
        optimizer = torch.optim.AdamW(
            judge.parameters(), settings.lr, betas, weight_decay=decay, foreach=True
        )
        g, count = torch.Generator().manual_seed(settings.seed), x.shape[1]
        per_epoch = math.ceil(count / settings.batch)
        bar = tqdm(total=settings.epochs * per_epoch, desc=desc, mininterval=5)
        for _ in range(settings.epochs):
            for rows in torch.randperm(count, generator=g).tensor_split(per_epoch):
                _set_rate(optimizer, settings.lr, bar.n / bar.total)
                version = torch.randint(len(x), rows.shape, generator=g)
                loss = _step(judge, optimizer, x[version, rows], [t[rows] for t in truth], g)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
        bar.close()
    return judge.eval()


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, done: float) -> None:
    """Learning rate at the fraction `done` of training: linear warm-up over a twentieth, then
    cosine to zero.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, done / 0.05 + 0.01) * 0.5 * (1 + math.cos(math.pi * done))


def _step(
    judge: EmojiClassifier,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    truth: list[torch.Tensor],
    g: torch.Generator,
) -> float:
    """One update on the batch x [B, 3, inner_size, inner_size]; truth: object and style indices
    [B]. Returns the loss.
    """
    settings = judge.settings
    cut = round(settings.damage_share * len(x))
    parts = zip((augment, warp), x.split([cut, len(x) - cut]), strict=True)
    x = torch.cat([change(part, g) for change, part in parts if len(part)])
    logits = judge(x.contiguous(memory_format=torch.channels_last))
    object_loss, style_loss = (
        F.cross_entropy(z, y, label_smoothing=settings.label_smoothing)
        for z, y in zip(logits, truth, strict=True)
    )
    loss = object_loss + settings.style_weight * style_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def fold_of_cells(
    objects: Sequence[str], styles: Sequence[str], folds: int, seed: int = 0
) -> np.ndarray:
    """Deal (object, style) cells to folds, int [N]: (shuffled rank of the object + rank of the
    style) mod folds.

    A Latin-square deal: every fold holds about as many cells of each style. Raises UserError if
    some fold would hold all pictures of a class.
    """
    columns = np.asarray(objects), np.asarray(styles)
    objects, styles = (np.unique(names, return_inverse=True)[1] for names in columns)
    fold = np.random.default_rng(seed).permutation(objects.max() + 1)[objects] + styles
    fold %= folds
    for names in columns:
        for name in np.unique(names):
            if len(np.unique(fold[names == name])) < 2:
                raise UserError(
                    f"all pictures of {name!r} fall in one of {folds} folds; give it more, or "
                    "leave this out with folds=0"
                )
    return fold


def cross_validate(
    versions: dict[str, np.ndarray],
    objects: Sequence[str],
    styles: Sequence[str],
    settings: EmojiClassifierSettings,
    folds: int = 5,
) -> dict[str, Any]:
    """Accuracy on art that a judge was not trained on: each fold's cells are named by a judge
    fitted to the other folds.

    versions, objects, styles as in `train_judge`, for `settings.fold_epochs`. Returns for each
    version, for "object", "style" and "both", the pooled `cell_accuracy`, with "folds": list of the
    folds' accuracies, and "std" over them.
    """
    names = np.array([objects, styles])
    fold = fold_of_cells(objects, styles, folds, settings.seed)
    shorter = replace(settings, epochs=settings.fold_epochs)
    right = {version: np.zeros(names.shape, bool) for version in versions}
    for k in range(folds):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part, desc = {v: images[train] for v, images in versions.items()}, f"fold {k + 1}/{folds}"
        judge = train_judge(part, *names[:, train].tolist(), shorter, desc)
        for version, images in versions.items():
            found = judge.predict(images[test])
            said = np.array(judge.objects)[found[0]], np.array(judge.styles)[found[1]]
            right[version][:, test] = said == names[:, test]
            shares = right[version][:, test].mean(1)
            line = f"{desc}: object {shares[0]:.3f}, style {shares[1]:.3f} on unseen art, {version}"
            tqdm.write(line, file=sys.stderr)
    cells = np.unique(names, axis=1, return_inverse=True)[1].ravel()
    return {version: _pooled(hits, cells, fold, settings.seed) for version, hits in right.items()}


def _pooled(right: np.ndarray, cells: np.ndarray, fold: np.ndarray, seed: int) -> dict[str, Any]:
    """The report of `cross_validate` for one version. right: bool [2, N], object and style; cells,
    fold: [N].
    """
    report = {}
    for head, hits in heads(right).items():
        each = [float(hits[fold == k].mean()) for k in range(fold.max() + 1)]
        spread = {"folds": each, "std": float(np.std(each, ddof=1))}
        report[head] = cell_accuracy(hits, cells, seed) | spread
    return report


def train_and_save(
    dataset: ImageCaptionDataset,
    model: TextToImage,
    out_folder: str | Path,
    folds: int = 5,
    seed: int = 0,
    settings: EmojiClassifierSettings | None = None,
) -> dict[str, Any]:
    """Cross-validate (folds = 0: not), train on all pictures, save; print the metrics as one JSON
    line and return them.

    dataset: its rows have "object" and "style"; all splits are used, because the judge must know
    what a held-out cell ought to look like. model: the judge must see through its autoencoder.
    Raises UserError if a row lacks an object or a style.
    """
    settings = replace(settings or EmojiClassifierSettings(), seed=seed)
    names = dataset.column("object"), dataset.column("style")
    if None in names[0] or None in names[1]:
        raise UserError(
            f"{dataset.root} has rows without an object or a style; the judge learns both, so "
            f"write them into each row of {dataset.root}/metadata.jsonl"
        )
    rows = range(len(dataset))
    decoded = model.reconstruct(dataset.images(rows, model.image_size))
    real, decoded = dataset.images(rows, settings.size), resized(decoded, settings.size)
    versions, metrics = {"real": real, "reconstructed": decoded}, {}
    if folds:
        metrics["cross_validation"] = cross_validate(versions, *names, settings, folds)
    judge = train_judge(versions, *names, settings)
    facts = {"data_hash": dataset.content_hash(), "model": model.identity()}
    facts["provenance"] = provenance()
    with atomic_folder(Path(out_folder)) as made:
        save_judge(judge, made, facts)
        judge = load_judge(made)  # measure what is on disk: float16 weights
        metrics["train"] = {v: judge.measure(images, *names) for v, images in versions.items()}
        metrics["train_damaged"] = judge.measure(damaged(real, settings), *names)
        save_judge(judge, made, facts | {"metrics": metrics})
    print(json.dumps(metrics))
    return metrics


def damaged(images: np.ndarray, settings: EmojiClassifierSettings) -> np.ndarray:
    """uint8 [n, H, W, 3] after `augment.augment` with the settings' seed: for tolerance."""
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    x = augment(x, torch.Generator().manual_seed(settings.seed))
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
