"""Which store of train rows belongs to the settings, and under which mask it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..errors import UserError
from ..settings import Settings, digest
from ..store.shards import Store
from .adopt import adopt_release, resolve_mask
from .plan import folder_name, row_settings

MARKS = ("manifest.json", "train_grad-0.npy")


def find_store(settings: Settings) -> Path | None:
    """The folder of the settings' store, under GRAD_DIR or, as for embedded data, DATA_DIR/grads.

    One whose rows were made under these settings comes before one that only has the name. None if
    there is none.
    """
    name = folder_name(settings)
    bases = Path(settings.grad_dir), Path(settings.data_dir) / "grads"
    folders = [f for base in bases for f in (base / name, _by_rows(base, settings))]
    there = [f for f in folders if any((f / mark).exists() for mark in MARKS)]
    return next((f for f in there if _has_rows_of(f, settings)), next(iter(there), None))


def new_folder(settings: Settings) -> Path:
    """Where the settings' rows go: named as in the reference, or with the hash of what decides a
    row where a store of that name has other rows.
    """
    folder = Path(settings.grad_dir) / folder_name(settings)
    taken = (folder / "manifest.json").exists() and not _has_rows_of(folder, settings)
    return _by_rows(folder.parent, settings) if taken else folder


def _by_rows(base: Path, settings: Settings) -> Path:
    return base / f"{folder_name(settings)}-{digest(row_settings(settings))}"


def _has_rows_of(folder: Path, settings: Settings) -> bool:
    """Whether a store was made under these settings, or does not say (released rows)."""
    try:
        made = Store.read_manifest(folder).identity.get("rows")
    except UserError:  # told by whoever opens it
        return True
    return made is None or made == json.loads(json.dumps(row_settings(settings)))


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
