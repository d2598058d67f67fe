"""Which store of train rows belongs to the settings, and under which mask it was made."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..settings import Settings, short_hash
from ..store.remote import bring_manifests
from ..store.store import Store
from .import_release import adopt_release, resolve_mask
from .naming import store_base, store_name

MARKS = ("manifest.json", "train_grad-0.npy")
Identity = dict[str, Any]  # what a store was made from, or a part of it; JSON


def find_store(settings: Settings, wanted: Identity) -> Path | None:
    """The folder of the store whose identity agrees best with what is wanted of it, under GRAD_DIR
    or, as for embedded data, DATA_DIR/grads; of several, one of STORE_DTYPE. None if there is none
    of the settings' name.
    """
    bases = store_base(settings), Path(settings.data_dir) / "grads"
    there = [f for base in bases for f in list_stores(base / store_name(settings))]

    def fits(folder: Path) -> tuple[int, ...]:
        store = _store(folder)
        same_type = store is not None and store.dtype == settings.store_dtype
        return *_agreement(folder, wanted), same_type

    return max(there, key=fits, default=None)


def choose_folder(settings: Settings, identity: Identity) -> Path:
    """Where the rows of this identity go: named as in the reference, or with the hash of the
    identity where a store of that name is of something else.
    """
    folder = store_base(settings) / store_name(settings)
    fitting = [f for f in list_stores(folder) if _agreement(f, identity)[0] == len(identity)]
    if fitting or not (folder / "manifest.json").exists() or _identity(folder) is None:
        return next(iter(fitting), folder)
    return folder.with_name(f"{folder.name}-{short_hash(_json(identity))}")


def list_stores(folder: Path) -> list[Path]:
    """The stores of a name: the plain one first, then those with a hash behind it."""
    bring_manifests(folder.parent, folder.name)
    others = sorted(folder.parent.glob(f"{glob.escape(folder.name)}-*"))
    named = [f for f in others if re.fullmatch(r"-[0-9a-f]{10}", f.name[len(folder.name) :])]
    return [f for f in (folder, *named) if any((f / mark).exists() for mark in MARKS)]


def _agreement(folder: Path, wanted: Identity) -> tuple[int, int]:
    """(parts of the identity that do not differ, parts that are told to be the same): released
    rows do not say what they were made from. (-1, -1) for a store that cannot be read.
    """
    found = _identity(folder)
    if found is None:
        return -1, -1
    same = sum(found.get(key) == value for key, value in _json(wanted).items())
    return same + len(wanted.keys() - found.keys()), same


def _identity(folder: Path) -> Identity | None:
    """What a store says that it was made from; {} for shards without a manifest, None for one that
    cannot be read, which is told by whoever opens it.
    """
    if store := _store(folder):
        return store.identity
    return None if (folder / "manifest.json").exists() else {}


def _store(folder: Path) -> Store | None:
    """The store of a folder; None where its manifest cannot be read."""
    try:
        return Store.read_manifest(folder)
    except UserError:
        return None


def _json(identity: Identity) -> Identity:
    return json.loads(json.dumps(identity))


def resolve_mask_for(
    settings: Settings, wanted: Identity, parameters: Mapping[str, nn.Parameter]
) -> str:
    """The mask to project with: that of the store of `wanted` if it is there, else PROJ_MASK.

    wanted: the identity without its projection. Released shards without a record of their mask are
    adopted. UserError when the store's is another than PROJ_MASK, or not clear.
    """
    found = find_store(settings, wanted)
    if found is None or _agreement(found, wanted)[0] < len(wanted):
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
