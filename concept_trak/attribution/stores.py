"""Which store of train rows belongs to the settings, and under which mask it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..settings import Settings
from ..store.shards import Store
from .adopt import adopt_release, resolve_mask
from .plan import folder_name


def find_store(settings: Settings) -> Path | None:
    """The folder of the settings' store, under GRAD_DIR or, as for embedded data, DATA_DIR/grads.

    None if there is none.
    """
    name = folder_name(settings)
    folders = Path(settings.grad_dir) / name, Path(settings.data_dir) / "grads" / name
    marks = ("manifest.json", "train_grad-0.npy")
    return next((f for f in folders if any((f / mark).exists() for mark in marks)), None)


def mask_of(settings: Settings, parameters: Mapping[str, nn.Parameter]) -> str:
    """The mask to project with: that of the store there is, else that of PROJ_MASK.

    Released shards without a record of theirs are adopted. UserError when the store's is another
    than PROJ_MASK, or not clear.
    """
    found = find_store(settings)
    if found is None:
        return resolve_mask(settings.proj_mask, None)
    adopt(found, settings, parameters)
    return resolve_mask(settings.proj_mask, Store.read_manifest(found).identity)


def adopt(folder: Path, settings: Settings, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give released shards, which have no record of their mask, a manifest that names it.

    Other stores are left alone.
    """
    manifest = folder / "manifest.json"
    if manifest.exists():
        known = Store.read_manifest(folder).identity
        if "adopted" not in known or "projection" in known:
            return
        manifest.unlink()  # as the download leaves it: complete, but without the mask
    what = "shards without a record of their mask; looking for the one that made them"
    print(f"{folder}: {what}", flush=True)
    layout = [(name, p.numel()) for name, p in parameters.items()]
    adopt_release(folder, settings.proj_dim, settings.proj_mask, layout)
