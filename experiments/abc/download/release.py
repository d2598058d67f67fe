"""The released train gradients: shards on the hub that become a store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from concept_trak.errors import UserError
from concept_trak.store.manifest import read_manifest

from .folder import DownloadState, FileJob
from .hub import Repo
from .progress import human

SOURCE, SETTINGS_NAME = "YongYong/concept-trak-abc-train-grad", "attn2-dps-NFE10-norm-ddim-gs_7.5"


@dataclass(frozen=True)
class Release:
    """Which shards to bring, and to where: `count` of `rows` x `dim` float32 values each."""

    hf_repo_id: str
    repo_type: str
    train_grad_name: str
    path_in_repo: str  # folder on the hub; empty: train_grad_name; ".": the top
    grad_root: str
    count: int
    rows: int
    dim: int

    @property
    def names(self) -> list[str]:
        return [f"train_grad-{i}.npy" for i in range(self.count)]


def download_release(release: Release, workers: int) -> None:
    """Bring the shards to grad_root/train_grad_name and write the manifest of a store."""
    from concept_trak.store.store import Store

    with DownloadState(Path(release.grad_root) / release.train_grad_name) as folder:
        refuse_computed(folder.root)
        if not all(folder.is_recorded(name) for name in release.names):
            jobs = folder.missing(released_shards(release))
            left = folder.bytes_left(jobs)
            print(f"{len(jobs)} of {release.count} shards to fetch, {human(left)}", flush=True)
            folder.need(left, "this download")
            folder.fetch(jobs, workers, "train gradients")
        if not is_adopted(folder, release):
            print("checking every value and writing the manifest", flush=True)
            # if there is one, it is that of other shards
            (folder.root / "manifest.json").unlink(missing_ok=True)
            Store.adopt_raw(folder.root, release.dim)
        rows = release.count * release.rows
        print(f"{os.path.relpath(folder.root)}: {rows} rows of {release.dim}")


def is_adopted(folder: DownloadState, release: Release) -> bool:
    """Whether the manifest is there and is that of the shards that were fetched."""
    from concept_trak.store.store import Store

    try:
        store = Store.open(folder.root, {"dim": release.dim}, verify=False)
        found = [f"sha256:{store.record(shard)['sha256']}" for shard in range(store.num_split)]
    except UserError:
        return False
    wanted = [folder.record["files"][name]["digest"] for name in release.names]
    return len(found) == len(wanted) and all(
        f == w or not w.startswith("sha256:") for f, w in zip(found, wanted, strict=True)
    )


def refuse_computed(folder: Path) -> None:
    """UserError if the folder holds gradients that were computed here: the release has the same
    names.
    """
    path = folder / "manifest.json"
    layout = read_manifest(folder)["layout"] if path.exists() else "raw"
    if layout != "raw":
        raise UserError(f"{folder} holds gradients computed here; set GRAD_ROOT to another folder")


def released_shards(release: Release) -> list[FileJob]:
    """The shards as listed by the hub. UserError if they are not exactly those asked for, each of
    rows x dim float32 values.
    """
    source = (release.path_in_repo or release.train_grad_name).strip("/")
    source = "" if source == "." else source
    found = {
        file.name: file
        for file in Repo(release.hf_repo_id, release.repo_type).files(source)
        if re.fullmatch(r"train_grad-\d+\.npy", file.name)
        and file.path.rpartition("/")[0] == source
    }
    where, size = f"{release.hf_repo_id}/{source}".rstrip("/"), 4 * release.rows * release.dim
    if absent := [name for name in release.names if name not in found]:
        raise UserError(
            f"{where} has {len(found)} shards but no {absent[0]}; check PATH_IN_REPO, or give "
            "--count"
        )
    if more := sorted(found.keys() - set(release.names)):
        raise UserError(
            f"{where} has {more[0]} beyond the {release.count} shards expected; give "
            f"--count={len(found)}"
        )
    for name in release.names:
        if found[name].size != size:
            raise UserError(
                f"{where}/{name} has {found[name].size} bytes on the hub, not --rows x --dim x 4 "
                f"= {size}; give the release's numbers"
            )
    return [(found[name], name) for name in release.names]
