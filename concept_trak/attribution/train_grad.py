"""Train gradients: the rows of the train split, computed shard by shard into a store that knows
what made it.

Folder name (as in the reference): {layer}-{f}-NFE{n}[-norm][-ddim-gs_{g}]; the manifest holds the
full identity.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..parsing import parse_shards
from ..rows import featurize
from ..rows.featurize import StateSettings
from ..settings import ROOT, Settings, digest
from ..store.shards import Store
from .adopt import adopt_release, resolve_mask
from .corpus import Corpus

EMBEDDED_GRADS = ROOT / "data/emoji/grads"  # the committed store of the embedded model


def train_states(settings: Settings) -> StateSettings:
    """States of the train pictures: the reference's inversion (recipe reference), our own grid, or
    noisings.
    """
    if not settings.ddim_inversion:
        return featurize.noised_states(settings.nfe)
    if settings.recipe == "reference":
        return featurize.reference_states(settings.nfe, settings.train_guidance_scale)
    return featurize.inverted_states(settings.nfe, settings.train_guidance_scale)


def row_settings(settings: Settings) -> dict:
    """The settings that decide what a train row is."""
    states = train_states(settings)
    return {
        "layer": settings.layer,
        "f": settings.f,
        "normalize": settings.normalize,
        "timesteps": list(states.timesteps),
        "inversion_grid": list(states.inversion_grid),
        "guidance_scale": states.guidance_scale if states.inversion else None,
        "noise_seed": None if states.inversion else states.noise_seed,
        "dtype": settings.dtype,
    }


def folder_name(settings: Settings) -> str:
    """The reference's folder name where rows are the reference's; our own inversion grid and other
    projections are appended.
    """
    s = settings
    name = f"{s.layer.replace('|', '+')}-{s.f}-NFE{s.nfe}" + ("-norm" if s.normalize else "")
    if s.ddim_inversion:
        name += f"-ddim-gs_{s.train_guidance_scale}" + ("" if s.recipe == "reference" else "-short")
    if s.lora_path:
        name += f"-lora_{digest(s.lora_path)}"
    projection = f"{s.proj_type}_{s.proj_dim}" + (f"_seed{s.proj_seed}" if s.proj_seed else "")
    projection += "-module" if s.blocks == "module" else ""
    return name if projection == "random_mask_32768" else f"{name}-{projection}"


def identity(corpus: Corpus) -> dict:
    """What a store of this corpus must have been made from."""
    return {
        "rows": row_settings(corpus.settings),
        "model": corpus.model.weight_hash(),
        "data": corpus.data.content_hash(),
        "projection": corpus.projection.describe(),
    }


def compute(corpus: Corpus, rows: range) -> np.ndarray:
    """Projected rows [len(rows), k] float32 of consecutive train pictures."""
    s = corpus.settings
    x0, cond = corpus.data.batch(rows)
    out, _ = featurize.featurize(
        corpus.model,
        corpus.projection,
        x0,
        cond,
        corpus.model.encode_prompts([""]),
        layer=s.layer,
        objective=s.f,
        states=train_states(s),
        normalize=s.normalize,
    )
    return out.cpu().numpy()


def train_grad(corpus: Corpus) -> Store:
    """Fill the store of the settings (its pending shards among SHARDS), resuming at the first row
    that is not on disk.
    """
    s = corpus.settings
    folder = Path(s.grad_dir) / folder_name(s)
    store = Store.create(
        folder,
        len(corpus.data),
        corpus.projection.proj_dim,
        s.num_split,
        s.store_dtype,
        identity(corpus),
    )
    pending = store.pending(parse_shards(s.shards, s.num_split))
    todo = sum(store.shard_range(i)[1] - store.resume_row(i) for i in pending)
    size = (
        len(corpus.data)
        * corpus.projection.proj_dim
        * np.dtype("float16" if "16" in s.store_dtype else "float32").itemsize
    )
    print(
        f"{folder}: {todo} of {len(corpus.data)} rows to compute, {size / 1e6:.0f} MB on disk "
        "when complete"
    )
    with tqdm(total=todo, desc="train gradients", unit="image") as bar:
        for shard in pending:
            fill(corpus, store, shard, bar)
    return store


def fill(corpus: Corpus, store: Store, shard: int, bar) -> None:
    """Compute what a shard lacks and finish it. Batches start where they would in an uninterrupted
    run, so its bytes are the same.
    """
    (start, stop), size, first = (
        store.shard_range(shard),
        corpus.settings.batch_size,
        store.resume_row(shard),
    )
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
    for start in range(0, len(corpus.data), 64):
        x0, cond = corpus.data.batch(range(start, min(start + 64, len(corpus.data))))
        errors = [
            (model.eps(x_t, t, cond) - eps).float().square().flatten(1).mean(1)
            for t, x_t, eps in featurize.states_of(model, x0, cond, None, states)
        ]
        losses.append(torch.stack(errors).sum(0))
    return torch.cat(losses).cpu().numpy()


def find_store(corpus: Corpus) -> Path | None:
    """The folder of the settings' store, under GRAD_DIR or, for the embedded model, the committed
    one; None if there is none.

    Released shards without a record of their mask are adopted, and the corpus' projection takes
    over the mask that the store records. UserError when that is another than PROJ_MASK, or not
    clear.
    """
    name = folder_name(corpus.settings)
    folders = Path(corpus.settings.grad_dir) / name, EMBEDDED_GRADS / name
    found = next(
        (f for f in folders if (f / "manifest.json").exists() or (f / "train_grad-0.npy").exists()),
        None,
    )
    if found:
        adopt(corpus, found)
        corpus.use_mask(
            resolve_mask(corpus.settings.proj_mask, Store.read_manifest(found).identity)
        )
    return found


def open_store(corpus: Corpus) -> Store:
    """The finished store for this model, data and settings; see `find_store`.

    UserError naming what differs when a store of the same name was made from something else.
    """
    s, found = corpus.settings, find_store(corpus)
    if found is None:
        where = os.path.relpath(Path(s.grad_dir) / folder_name(s))
        raise UserError(
            f"no train gradients in {where}; compute them with run_train_grad.sh (same variables)"
        )
    if "adopted" not in Store.read_manifest(found).identity:
        return Store.open(found, expect=identity(corpus))
    # Of released rows nothing is recorded but the mask; the number of pictures is all that can be
    # checked beside it.
    store = Store.open(found, expect={"projection": corpus.projection.describe()})
    if store.num_rows > len(corpus.data):
        raise UserError(
            f"{found} has {store.num_rows} rows but {s.data_dir} has {len(corpus.data)} pictures; "
            "both must be of one release"
        )
    return store


def adopt(corpus: Corpus, folder: Path) -> None:
    """Give released shards, which have no record of their mask, a manifest that names it; other
    stores are left alone.
    """
    s, manifest = corpus.settings, folder / "manifest.json"
    if manifest.exists():
        known = Store.read_manifest(folder).identity
        if "adopted" not in known or "projection" in known:
            return
        manifest.unlink()  # as the download leaves it: complete, but without the mask
    print(
        f"{folder}: shards without a record of their mask; looking for the one that made them",
        flush=True,
    )
    adopt_release(
        folder,
        s.proj_dim,
        s.proj_mask,
        [(name, p.numel()) for name, p in corpus.parameters.items()],
    )
