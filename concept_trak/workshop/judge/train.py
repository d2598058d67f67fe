"""The judge: trained on real pictures, it measures whether a generated picture shows what its
caption says.

    L = CE(object head, object) + w CE(style head, style), with label smoothing, on pictures under
    `concept_trak.workshop.judge.augment.damage`,

since it must judge imperfect pictures, and on what the autoencoder makes of them, since every
picture it will judge has been through its decoder. Accuracy on art it was not trained on comes from
`cross_validate`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ...errors import UserError
from ...files import disk_errors, sha256_file, write_json
from ...settings import provenance
from .augment import damage, warp
from .net import Judge, JudgeSettings, cell_accuracy, class_indices, resized, to_input

__all__ = [
    "Judge",
    "JudgeSettings",
    "cell_accuracy",
    "cross_validate",
    "load_judge",
    "save_judge",
    "train_and_save",
    "train_judge",
]


def train_judge(
    versions: dict[str, np.ndarray],
    objects: Sequence[str],
    styles: Sequence[str],
    settings: JudgeSettings,
    desc: str = "judge",
) -> Judge:
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
        for names, known in zip((objects, styles), classes)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        judge = Judge(*classes, settings).to(
            memory_format=torch.channels_last
        )  # 20 % faster than channels first on a CPU
        decay = settings.weight_decay
        optimizer = torch.optim.AdamW(
            judge.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=decay, foreach=True
        )
        generator = torch.Generator().manual_seed(settings.seed)
        count = x.shape[1]
        per_epoch = math.ceil(count / settings.batch)
        with tqdm(total=settings.epochs * per_epoch, desc=desc, mininterval=5) as bar:
            for _ in range(settings.epochs):
                for rows in torch.randperm(count, generator=generator).tensor_split(per_epoch):
                    _set_rate(optimizer, settings.lr, bar.n / bar.total)
                    version = torch.randint(len(x), rows.shape, generator=generator)
                    loss = _step(
                        judge, optimizer, x[version, rows], [t[rows] for t in truth], generator
                    )
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
    return judge.eval()


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, done: float) -> None:
    """Learning rate at the fraction `done` of training: linear warm-up over a twentieth, then
    cosine to zero.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, done / 0.05 + 0.01) * 0.5 * (1 + math.cos(math.pi * done))


def _step(
    judge: Judge, optimizer, x: torch.Tensor, truth: list[torch.Tensor], generator: torch.Generator
) -> float:
    """One update on the batch x [B, 3, inner_size, inner_size]; truth: object and style indices
    [B]. Returns the loss.
    """
    cut = round(judge.settings.damage_share * len(x))
    parts = x.split([cut, len(x) - cut])
    x = torch.cat(
        [change(part, generator) for change, part in zip((damage, warp), parts) if len(part)]
    )
    logits = judge(x.contiguous(memory_format=torch.channels_last))
    entropies = [
        F.cross_entropy(z, y, label_smoothing=judge.settings.label_smoothing)
        for z, y in zip(logits, truth)
    ]
    loss = entropies[0] + judge.settings.style_weight * entropies[1]
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
    object_rank, style_rank = (
        np.unique(np.asarray(names), return_inverse=True)[1] for names in (objects, styles)
    )
    fold = (
        np.random.default_rng(seed).permutation(object_rank.max() + 1)[object_rank] + style_rank
    ) % folds
    for names in (np.asarray(objects), np.asarray(styles)):
        for name in np.unique(names):
            if len(np.unique(fold[names == name])) < 2:
                raise UserError(
                    f"all pictures of {name!r} fall in one of {folds} folds; it needs more, or "
                    "folds=0 to skip this"
                )
    return fold


def cross_validate(
    versions: dict[str, np.ndarray],
    objects: Sequence[str],
    styles: Sequence[str],
    settings: JudgeSettings,
    folds: int = 5,
) -> dict:
    """Accuracy on art that a judge was not trained on: each fold's cells are named by a judge
    fitted to the other folds.

    versions, objects, styles as in `train_judge`, for `settings.fold_epochs`. Returns for each
    version, for "object", "style" and "both", the pooled `cell_accuracy`, with "folds": list of the
    folds' accuracies, and "std" over them.
    """
    objects, styles = np.asarray(objects), np.asarray(styles)
    fold = fold_of_cells(objects, styles, folds, settings.seed)
    shorter = replace(settings, epochs=settings.fold_epochs)
    right = {name: np.zeros((2, len(objects)), bool) for name in versions}
    for k in range(folds):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = {name: images[train] for name, images in versions.items()}
        judge = train_judge(part, objects[train], styles[train], shorter, f"fold {k + 1}/{folds}")
        for name, images in versions.items():
            found = judge.predict(images[test])
            right[name][0, test] = np.array(judge.objects)[found[0]] == objects[test]
            right[name][1, test] = np.array(judge.styles)[found[1]] == styles[test]
            shares = right[name][:, test].mean(1)
            tqdm.write(
                f"fold {k + 1}/{folds}: object {shares[0]:.3f}, style {shares[1]:.3f} on unseen "
                f"art, {name}",
                file=sys.stderr,
            )
    cells = np.unique(np.stack([objects, styles]), axis=1, return_inverse=True)[1].ravel()
    return {name: _pooled(hits, cells, fold, settings.seed) for name, hits in right.items()}


def _pooled(right: np.ndarray, cells: np.ndarray, fold: np.ndarray, seed: int) -> dict:
    """The report of `cross_validate` for one version. right: bool [2, N], object and style; cells,
    fold: [N].
    """
    report = {}
    for head, hits in {"object": right[0], "style": right[1], "both": right.all(0)}.items():
        each = [float(hits[fold == k].mean()) for k in range(fold.max() + 1)]
        report[head] = cell_accuracy(hits, cells, seed) | {
            "folds": each,
            "std": float(np.std(each, ddof=1)),
        }
    return report


def save_judge(judge: Judge, folder: str | Path, facts: dict) -> None:
    """Write model.safetensors (float16) and judge.json: classes, settings, the weights' sha256 and
    `facts` (JSON).
    """
    folder = Path(folder)
    path, part = folder / "model.safetensors", folder / "model.safetensors.part"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        half = {
            k: (v.half() if v.is_floating_point() else v).contiguous()
            for k, v in judge.state_dict().items()
        }
        save_file(half, part)
        os.replace(part, path)
    classes = {"objects": judge.objects, "styles": judge.styles, "settings": asdict(judge.settings)}
    write_json(folder / "judge.json", classes | {"weights_sha256": sha256_file(path)} | facts)


def load_judge(folder: str | Path) -> Judge:
    """Read what `save_judge` wrote. Raises UserError if a file is missing, or the weights fit
    neither judge.json nor the code.
    """
    folder = Path(folder)
    for name in ("judge.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no judge at {folder}: {name} is missing; make it with train-judge")
    facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    if sha256_file(folder / "model.safetensors") != facts["weights_sha256"]:
        raise UserError(
            f"{folder / 'model.safetensors'} is not what judge.json describes; make the judge "
            "again with train-judge"
        )
    half = load_file(folder / "model.safetensors")
    try:
        judge = Judge(facts["objects"], facts["styles"], JudgeSettings(**facts["settings"]))
        judge.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
        )
    except (TypeError, RuntimeError):  # a setting or a layer that this code does not have
        raise UserError(
            f"the judge at {folder} was made by another version of the code; make it again with "
            "train-judge"
        ) from None
    return judge.eval()


def train_and_save(
    dataset,
    model,
    out_folder: str | Path,
    folds: int = 5,
    seed: int = 0,
    settings: JudgeSettings | None = None,
) -> dict:
    """Cross-validate (folds = 0: not), train on all pictures, save; print the metrics as one JSON
    line and return them.

    dataset: `concept_trak.datasets.folder.ImageCaptionDataset` whose rows have "object" and
    "style"; all splits are used, because the judge must know what a held-out cell ought to look
    like. model: `concept_trak.models.text_to_image.TextToImage`, whose autoencoder the judge must
    see through. Raises UserError if a row lacks an object or a style.
    """
    settings = replace(settings or JudgeSettings(), seed=seed)
    objects, styles = dataset.column("object"), dataset.column("style")
    if None in objects or None in styles:
        raise UserError(
            f"{dataset.root} has rows without an object or a style; the judge learns both, so "
            "every row needs both"
        )
    rows = range(len(dataset))
    decoded = model.reconstruct(dataset.images(rows, model.image_size))
    versions = {
        "real": dataset.images(rows, settings.size),
        "reconstructed": resized(decoded, settings.size),
    }
    metrics = (
        {"cross_validation": cross_validate(versions, objects, styles, settings, folds)}
        if folds
        else {}
    )
    judge = train_judge(versions, objects, styles, settings)
    facts = {
        "data_hash": dataset.content_hash(),
        "model": model.weight_hash(),
        "provenance": provenance(),
    }
    save_judge(judge, out_folder, facts)
    judge = load_judge(out_folder)  # measure what is on disk: float16 weights
    metrics["train"] = {
        name: judge.measure(images, objects, styles) for name, images in versions.items()
    }
    metrics["train_damaged"] = judge.measure(damaged(versions["real"], settings), objects, styles)
    save_judge(judge, out_folder, facts | {"metrics": metrics})
    print(json.dumps(metrics))
    return metrics


def damaged(images: np.ndarray, settings: JudgeSettings) -> np.ndarray:
    """uint8 [n, H, W, 3] after `concept_trak.workshop.judge.augment.damage` with the settings'
    seed; for measuring tolerance.
    """
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    x = damage(x, torch.Generator().manual_seed(settings.seed))
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
