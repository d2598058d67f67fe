"""How good is the embedded model: the judge names what it drew, for seen and for held-out (object,
style) cells.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from concept_trak.attribution.question import generation
from concept_trak.attribution.task import AttributionTask
from concept_trak.models.sample import initial_noise, sample
from concept_trak.settings import JUDGE
from concept_trak.validated_io import read_json
from experiments.benchmark.results import result_folder, write_metrics

from .classifier.io import AGAIN, load_judge
from .classifier.net import EmojiClassifier, resized

SEEDS = 4
BATCH = 32  # pictures drawn at a time


def draw(task: AttributionTask, captions: list[str], seed: int) -> np.ndarray:
    """One picture a caption, uint8 [n, H, W, 3]; picture i starts from the noise of (seed, i)."""
    s, model = task.settings, task.model
    seeds = range(seed * 100_003, seed * 100_003 + len(captions))
    x_T = torch.cat([initial_noise(model.latent_shape, i) for i in seeds])
    parts = sample(model, captions, x_T, generation(s), BATCH).split(BATCH)
    return np.stack([np.asarray(picture) for x0 in parts for picture in model.decode(x0)])


def upper_bounds(task: AttributionTask, judge: EmojiClassifier) -> dict[str, dict[str, Any]]:
    """What the judge says of all real pictures at the model's size, as they are and after the
    autoencoder: bounds on any UNet.
    """
    data, model = task.everything, task.model
    names = data.column("object"), data.column("style")
    real = data.images(range(len(data)), size=model.image_size)
    kinds = {"real": real, "reconstructed": model.reconstruct(real)}
    return {k: judge.measure(resized(x, judge.settings.size), *names) for k, x in kinds.items()}


def measure_model(task: AttributionTask) -> dict[str, Any]:
    """Object and style accuracy over `SEEDS` pictures a cell, with 95 % intervals over cells; the
    last line printed is JSON.

    Held-out: all cells; seen: equally many, drawn with a fixed seed (`num_queries` bounds both).
    Beside them what bounds them: `upper_bounds`, and the judge's accuracy on art that it was not
    trained on, real and reconstructed.
    """
    judge, data, settings = load_judge(JUDGE), task.everything, task.settings
    splits = np.array(data.column("split"))
    rows = {"held_out": np.flatnonzero(splits == "held_out")}
    rows["seen"] = np.flatnonzero(splits == "train")
    n, result = settings.num_queries or len(rows["held_out"]), {}
    for name, all_rows in rows.items():
        cells = data.subset(np.random.default_rng(0).permutation(all_rows)[:n])
        drawn = np.concatenate([draw(task, cells.captions, seed) for seed in range(SEEDS)])
        names = (cells.column(concept) * SEEDS for concept in ("object", "style"))
        result[name] = judge.measure(resized(drawn, judge.settings.size), *names)
    metrics = read_json(JUDGE / "judge.json", AGAIN).get("metrics") or {}
    result |= upper_bounds(task, judge) | {"judge_on_unseen_art": metrics.get("cross_validation")}
    result |= {"guidance": settings.gen_guidance_scale, "seeds": SEEDS, "cells": n}
    made_from = [task.model.identity(), data.content_hash(), metrics]
    with result_folder(settings, "model", "accuracy", made_from) as folder:
        write_metrics(folder, "accuracy", result, settings)
    print(json.dumps(result))
    return result
