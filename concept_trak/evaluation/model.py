"""How good is the embedded model: the judge names what it drew, for seen and for held-out (object,
style) cells.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..attribution.corpus import Corpus
from ..files import write_json
from ..models.ddim import ddim_sample
from ..settings import ROOT, as_dict, provenance
from ..workshop.judge.net import resized
from ..workshop.judge.train import load_judge

SEEDS = 4
JUDGE = ROOT / "data/emoji/judge"


def draw(corpus: Corpus, captions: list[str], seed: int) -> np.ndarray:
    """One picture a caption, uint8 [n, H, W, 3]; picture i starts from the noise of (seed, i)."""
    s, model = corpus.settings, corpus.model
    x_T = torch.stack(
        [
            torch.randn(
                model.latent_shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)
            )
            for i in range(len(captions))
        ]
    )
    pictures = []
    for start in tqdm(range(0, len(captions), 32), desc=f"generating, seed {seed}"):
        part = slice(start, start + 32)
        cond = model.encode_prompts(captions[part])
        null = model.encode_prompts([s.negative_prompt]).expand_as(cond)
        x0, _ = ddim_sample(
            model,
            x_T[part].to(cond),
            cond,
            null,
            scale=s.gen_guidance_scale,
            num_steps=s.gen_num_inference_steps,
        )
        pictures += [np.asarray(p) for p in model.decode(x0)]
    return np.stack(pictures)


def ceilings(corpus: Corpus, judge) -> dict:
    """What the judge says of all real pictures at the model's size, as they are and after the
    autoencoder: bounds on any UNet.
    """
    data, model = corpus.everything, corpus.model
    names = data.column("object"), data.column("style")
    real = data.images(range(len(data)), size=model.image_size)
    return {
        kind: judge.measure(resized(x, judge.settings.size), *names)
        for kind, x in (("real", real), ("reconstructed", model.reconstruct(real)))
    }


def measure_model(corpus: Corpus) -> dict:
    """Object and style accuracy over `SEEDS` pictures a cell, with 95 % intervals over cells; the
    last line printed is JSON.

    Held-out: all cells; seen: equally many, drawn with a fixed seed (`num_queries` bounds both).
    Beside them what bounds them: `ceilings`, and the judge's accuracy on art that it was not
    trained on, real and reconstructed.
    """
    judge, data = load_judge(JUDGE), corpus.everything
    rows = {
        name: [i for i, r in enumerate(data.records) if r.get("split") == split]
        for name, split in (("held_out", "held_out"), ("seen", "train"))
    }
    n = corpus.settings.num_queries or len(rows["held_out"])
    result = {}
    for name, all_rows in rows.items():
        chosen = np.random.default_rng(0).permutation(all_rows)[:n]
        records = [data.records[i] for i in chosen]
        pictures = np.concatenate(
            [draw(corpus, [data.captions[i] for i in chosen], seed) for seed in range(SEEDS)]
        )
        result[name] = judge.measure(
            resized(pictures, judge.settings.size),
            [r["object"] for r in records] * SEEDS,
            [r["style"] for r in records] * SEEDS,
        )
    unseen = json.loads((JUDGE / "judge.json").read_text(encoding="utf-8"))["metrics"].get(
        "cross_validation"
    )
    result |= ceilings(corpus, judge) | {
        "judge_on_unseen_art": unseen,
        "guidance": corpus.settings.gen_guidance_scale,
        "seeds": SEEDS,
        "cells": n,
    }
    folder = Path(corpus.settings.results_dir).parent / "model"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "accuracy.json",
        {**result, "settings": as_dict(corpus.settings), "provenance": provenance()},
    )
    print(json.dumps(result))
    return result
