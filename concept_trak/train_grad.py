"""Train gradients: the rows of the train split, computed shard by shard into a store that knows what made it.

Folder name (as in the reference): {layer}-{f}-NFE{n}[-norm][-ddim-gs_{g}]; the manifest holds the full identity.
"""

from __future__ import annotations

import copy
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import featurize
from .datasets.folder import ImageCaptionDataset, load_folder
from .errors import UserError
from .featurize import StateSettings
from .gradients import PerSampleVjp
from .models import TextToImage, load_pipeline
from .projection import make_projection
from .settings import ROOT, Settings
from .store import Store

EMBEDDED_GRADS = ROOT / "data/emoji/grads"  # the committed store of the embedded model


def train_states(settings: Settings) -> StateSettings:
    """States of the train pictures: the reference's inversion (recipe reference), our own grid, or noisings."""
    if not settings.ddim_inversion:
        return featurize.noised_states(settings.nfe)
    if settings.recipe == "reference":
        return featurize.reference_states(settings.nfe, settings.train_guidance_scale)
    return featurize.inverted_states(settings.nfe, settings.train_guidance_scale)


def row_settings(settings: Settings) -> dict:
    """The settings that decide what a train row is."""
    states = train_states(settings)
    return {"layer": settings.layer, "f": settings.f, "normalize": settings.normalize, "timesteps": list(states.timesteps),
            "inversion_grid": list(states.inversion_grid), "guidance_scale": states.guidance_scale if states.inversion else None,
            "noise_seed": None if states.inversion else states.noise_seed, "dtype": settings.dtype}


def folder_name(settings: Settings) -> str:
    """The reference's folder name; a projection other than its own is appended."""
    name = f"{settings.layer.replace('|', '+')}-{settings.f}-NFE{settings.nfe}" + ("-norm" if settings.normalize else "")
    name += f"-ddim-gs_{settings.train_guidance_scale}" if settings.ddim_inversion else ""
    name += "" if settings.recipe == "default" else f"-{settings.recipe}"
    return f"{name}-{settings.proj_type}_{settings.proj_dim}"


class Corpus:
    """A model and the train split it is attributed to: latents [N, C, h, w], one caption a picture.

    Latents are encoded once, on the model's device, in batches; N C h w 4 bytes are kept on the CPU.
    """

    def __init__(self, settings: Settings, device: str):
        self.settings, self.device = settings, device
        self.model: TextToImage = load_pipeline(settings.sd_model_path, device, settings.dtype)
        self.everything: ImageCaptionDataset = load_folder(settings.data_dir)
        self.train = self.everything.split("train")
        if not len(self.train):
            raise UserError(f"{settings.data_dir} has no picture in its train split; check the split column of its metadata")

    @cached_property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] scaled latents of the train pictures."""
        size, step = self.model.image_size, 64
        return torch.cat([self.model.encode_images(self.train.images(range(i, min(i + step, len(self.train))), size=size)).cpu()
                          for i in range(0, len(self.train), step)])

    @cached_property
    def projection(self):
        """The settings' projection for the selected parameters of this model."""
        tape = PerSampleVjp(self.model.network, self.settings.layer)
        s = self.settings
        return make_projection(s.proj_type, tape.input_dim, 0 if s.proj_type == "identity" else s.proj_dim, s.proj_seed, self.device)

    @cached_property
    def identity(self) -> dict:
        """What a store of this corpus must have been made from."""
        return {"rows": row_settings(self.settings), "model": self.model.weight_hash(), "data": self.train.content_hash(),
                "projection": self.projection.describe()}

    def with_settings(self, settings: Settings) -> Corpus:
        """The same model, pictures and latents under other settings."""
        other = copy.copy(self)
        for name in ("projection", "identity"):
            other.__dict__.pop(name, None)
        other.settings = settings
        return other


def parse_shards(text: str, count: int) -> list[int]:
    """"3,7-9" -> [3, 7, 8, 9]; empty is all. UserError for anything else or a shard out of range."""
    chosen = []
    for part in text.split(",") if text.strip() else ():
        numbers = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        low, high = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
        if high < low:
            raise UserError(f"SHARDS={text!r} is not a list of shards such as 3,7-9")
        chosen += range(low, min(high, max(low, count)) + 1)  # one too many is enough to be refused below
    if bad := [s for s in chosen if s >= count]:
        raise UserError(f"SHARDS={text!r} names shard {bad[0]} but there are only {count} (0 to {count - 1}); mend SHARDS or NUM_SPLIT")
    return chosen or list(range(count))


def compute(corpus: Corpus, rows: range) -> np.ndarray:
    """Projected rows [len(rows), k] float32 of consecutive train pictures."""
    s = corpus.settings
    x0 = corpus.latents[rows.start:rows.stop].to(corpus.device)
    captions = corpus.model.encode_prompts([corpus.train.captions[i] for i in rows] + [""])
    out, _ = featurize.featurize(corpus.model, corpus.projection, x0, captions[:-1], captions[-1:], layer=s.layer, objective=s.f,
                                 states=train_states(s), normalize=s.normalize)
    return out.cpu().numpy()


def train_grad(corpus: Corpus) -> Store:
    """Fill the store of the settings (its pending shards among SHARDS), resuming at the first row that is not on disk."""
    s = corpus.settings
    folder = Path(s.grad_dir) / folder_name(s)
    store = Store.create(folder, len(corpus.train), corpus.projection.proj_dim, s.num_split, s.store_dtype, corpus.identity)
    pending = store.pending(parse_shards(s.shards, s.num_split))
    todo = sum(store.shard_range(i)[1] - store.resume_row(i) for i in pending)
    size = len(corpus.train) * corpus.projection.proj_dim * np.dtype("float16" if "16" in s.store_dtype else "float32").itemsize
    print(f"{folder}: {todo} of {len(corpus.train)} rows to compute, {size / 1e6:.0f} MB on disk when complete")
    with tqdm(total=todo, desc="train gradients", unit="image") as bar:
        for shard in pending:
            fill(corpus, store, shard, bar)
    return store


def fill(corpus: Corpus, store: Store, shard: int, bar) -> None:
    """Compute what a shard lacks and finish it. Batches start where they would in an uninterrupted run, so its bytes are the same."""
    (start, stop), size, first = store.shard_range(shard), corpus.settings.batch_size, store.resume_row(shard)
    for low in range(start + (first - start) // size * size, stop, size):
        missing = max(first - low, 0)
        rows = compute(corpus, range(low, min(low + size, stop)))[missing:]
        store.append(shard, rows, low + missing)
        bar.update(len(rows))
    store.finish(shard)


@torch.no_grad()
def dsm_losses(corpus: Corpus) -> np.ndarray:
    """[N] DAS's residuals: mean squared DSM error of each train picture, summed over the states."""
    states, model, losses = train_states(corpus.settings), corpus.model, []
    for start in range(0, len(corpus.train), 64):
        x0 = corpus.latents[start:start + 64].to(corpus.device)
        cond = model.encode_prompts(corpus.train.captions[start:start + len(x0)])
        errors = [(model.eps(x_t, t, cond) - eps).float().square().flatten(1).mean(1)
                  for t, x_t, eps in featurize.states_of(model, x0, cond, None, states)]
        losses.append(torch.stack(errors).sum(0))
    return torch.cat(losses).cpu().numpy()


def open_store(corpus: Corpus) -> Store:
    """The finished store for this model, data and settings: under GRAD_DIR or, for the embedded model, the committed one.

    UserError naming what differs when a store of the same name was made from something else.
    """
    name = folder_name(corpus.settings)
    folders = [Path(corpus.settings.grad_dir) / name, EMBEDDED_GRADS / name]
    found = [f for f in folders if (f / "manifest.json").exists()]
    if not found:
        raise UserError(f"no train gradients in {os.path.relpath(folders[0])}; compute them with run_train_grad.sh (same variables)")
    return Store.open(found[0], expect=corpus.identity)
