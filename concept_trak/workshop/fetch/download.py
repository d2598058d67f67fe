"""`concept-trak download-abc` and `download-train-grad`: the assets of the AbC benchmark, and the
released train gradients.

Both can be called again at any time: finished parts are skipped, begun files are gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import UserError
from ...settings import ROOT
from .archives import find_tool, unpack, unpacked_size, volumes
from .folder import DownloadFolder, human
from .hub import RemoteFile, Repo

RELEASE, SETTINGS_NAME = "YongYong/concept-trak-abc-train-grad", "attn2-dps-NFE10-norm-ddim-gs_7.5"
GEN_DATA, UNLEARNING = "sywang/GenDataAttribution", "sywang/AttributeByUnlearning"


@dataclass(frozen=True)
class Part:
    """A group of files on the hub: archives that become `into` (empty: that lie in DATA_DIR
    itself), or plain files.
    """

    name: str
    repo_id: str
    patterns: tuple[str, ...]
    packed: bool = True
    into: str = ""
    holds: tuple[str, ...] = ()  # what must be in the unpacked folder
    # unpacked bytes for one of the archive, for the first check of the disk; pictures and weights
    # hardly shrink
    growth: float = 1.1


PARTS = {
    part.name: part
    for part in (  # in the order of the work: small ones first
        Part(
            "json",
            GEN_DATA,
            ("json/test_*", "imagenet_class_to_categories.json", "path_to_prompts.json"),
            packed=False,
        ),
        Part("fisher", UNLEARNING, ("abc/*sd_fisher.pt",), packed=False),
        Part("exemplar", GEN_DATA, ("exemplar/*.7z*",), into="exemplar"),
        Part(
            "latents",
            UNLEARNING,
            ("abc/*laion_latents_text_embeddings.7z*",),
            holds=("laion_latents.npy", "laion_text_embeddings.npy"),
            growth=2.0,
        ),
        Part(
            "laion_subset",
            GEN_DATA,
            ("laion_subset/*.7z*",),
            into="laion_subset",
            holds=("images", "captions.txt"),
        ),
        Part("synth", GEN_DATA, ("synth_test/*.7z*",), into="synth"),
        Part("models", GEN_DATA, ("models_test/*.7z*",), into="models", growth=1.2),
    )
}
INNER_NAMES = {
    "data",
    "dataset",
    "abc",
}  # folders that an archive may wrap its content in, besides its own and its part's name


def add_parser(verbs) -> None:
    """The two sub-commands. HF_TOKEN and HF_ENDPOINT are read from the environment only: flags show
    in the list of processes.
    """
    abc = verbs.add_parser("download-abc", help="fetch and unpack the AbC benchmark's assets")
    optional(abc, "--data-dir", str(ROOT / "data/abc"), "where to (default data/abc)")
    abc.add_argument("--parts", default="", help=f"which, of {' '.join(PARTS)} (default all)")
    abc.set_defaults(run=download_abc)
    grad = verbs.add_parser(
        "download-train-grad", help="fetch the released train gradients and make them a store"
    )
    optional(grad, "--hf-repo-id", RELEASE, f"default {RELEASE}")
    grad.add_argument("--repo-type", default="dataset", choices=("dataset", "model", "space"))
    optional(
        grad,
        "--train-grad-name",
        SETTINGS_NAME,
        f"folder below --grad-root (default {SETTINGS_NAME})",
    )
    grad.add_argument(
        "--path-in-repo",
        default="",
        help="folder on the hub (default: the train grad name; . is the top)",
    )
    optional(
        grad,
        "--grad-root",
        str(ROOT / "experiments/abc/results/grads"),
        "default experiments/abc/results/grads",
    )
    grad.add_argument("--count", type=int, default=16, help="shards (default 16)")
    grad.add_argument("--rows", type=int, default=6250, help="rows of each shard (default 6250)")
    grad.add_argument(
        "--dim", type=int, default=32768, help="float32 values of a row (default 32768)"
    )
    grad.set_defaults(run=download_train_grad)
    for verb in (abc, grad):
        verb.add_argument("--max-workers", type=int, default=8, help="files at a time (default 8)")


def optional(verb: argparse.ArgumentParser, flag: str, default: str, text: str) -> None:
    """A flag whose empty value means the default, too: an empty DATA_DIR must not mean the current
    folder.
    """
    verb.add_argument(flag, default=default, type=lambda given: given or default, help=text)


# ---- the benchmark's assets


def download_abc(arguments: argparse.Namespace) -> None:
    """Bring the chosen parts to --data-dir, one after the other. UserError, before anything is
    fetched, for what cannot end well.
    """
    parts = chosen_parts(arguments.parts)
    refuse_below_one(arguments, "max_workers")
    with DownloadFolder(arguments.data_dir) as folder:
        for part in parts:
            folder.finish_moves(part.name)
        pending = [part for part in parts if not folder.has_part(part.name)]
        for part in parts:
            if part not in pending:
                folder.forget(
                    workplace(folder, part)
                )  # left over if a call was killed right after its last move
                print(f"{part.name}: finished")
        if not pending:
            return
        tool = find_tool() if any(part.packed for part in pending) else ""
        plans = plan(folder, pending)
        for part, jobs in plans.items():
            folder.fetch(folder.missing(jobs), arguments.max_workers, part.name)
            if part.packed:
                unpack_part(folder, part, [path for _, path in jobs], tool)
            else:
                folder.finish_part(part.name, [path for _, path in jobs])
            print(f"{part.name}: finished", flush=True)


def chosen_parts(text: str) -> list[Part]:
    """Parts from "a b" or "a,b"; all of them from the empty text."""
    names = re.split(r"[\s,]+", text.strip()) if text.strip() else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"PARTS: {unknown[0]!r} is unknown; use some of {' '.join(PARTS)}")
    return [part for name, part in PARTS.items() if name in names]


def workplace(folder: DownloadFolder, part: Part) -> Path:
    """Where the part's archives lie and are unpacked."""
    return folder.hidden / part.name


def plan(folder: DownloadFolder, parts: list[Part]) -> dict[Part, list[tuple[RemoteFile, str]]]:
    """{part: its files and where they go}, after checks of names, of what is in the way, and of the
    disk; prints the sizes.
    """
    listed = {
        repo_id: Repo(repo_id).files() for repo_id in dict.fromkeys(part.repo_id for part in parts)
    }
    plans, used, peak = {}, 0, 0
    for part in parts:
        folder.forget(workplace(folder, part) / "unpacked")  # of a call that was killed
        plans[part] = jobs = part_jobs(folder, part, listed[part.repo_id])
        for name in (part.into,) if part.into else part.holds:
            folder.refuse_foreign(part.name, name)
        size = sum(file.size for file, _ in jobs)
        left = folder.bytes_left(folder.missing(jobs))
        unpacked = size * part.growth if part.packed else 0
        used += left + unpacked
        peak = max(peak, used)
        used -= size if part.packed else 0  # the archives go before the next part comes
        after = f", unpacked about {human(unpacked)}" if unpacked else ""
        print(
            f"{part.name:14} {len(jobs):3} files {human(size):>8}, to fetch {human(left):>8}{after}"
        )
    print(f"disk needed at most: about {human(peak)}", flush=True)
    folder.need(peak, "this download with its unpacking")
    return plans


def part_jobs(
    folder: DownloadFolder, part: Part, files: list[RemoteFile]
) -> list[tuple[RemoteFile, str]]:
    """(file on the hub, path below DATA_DIR) of the part's files: archives go to the hidden folder."""
    mine = [
        file for file in files if any(fnmatchcase(file.path, pattern) for pattern in part.patterns)
    ]
    if part.packed:
        wanted = {
            name for names in volumes([file.name for file in mine]).values() for name in names
        }
        mine = [file for file in mine if file.name in wanted]
    if not mine:
        raise UserError(
            f"{part.name}: no file like {part.patterns[0]} is in {part.repo_id} on the hub; leave "
            f"{part.name} out of PARTS"
        )
    if part.packed:
        hidden = os.path.relpath(workplace(folder, part), folder.root)
        return [(file, f"{hidden}/{file.name}") for file in mine]
    return [
        (file, file.name if file.path.startswith("abc/") else file.path) for file in mine
    ]  # that `abc` is DATA_DIR itself


def unpack_part(folder: DownloadFolder, part: Part, paths: list[str], tool: str) -> None:
    """Unpack into a temporary folder, move the content to its place, then remove the archives."""
    archives = volumes([path.rpartition("/")[2] for path in paths])
    firsts = [workplace(folder, part) / names[0] for names in archives.values()]
    unpacked = workplace(folder, part) / "unpacked"
    sizes = [unpacked_size(first, tool) for first in firsts]
    folder.need(sum(sizes), f"unpacking {part.name}")
    for first, size in zip(firsts, sizes):
        unpack(first, unpacked, size, tool)
    root = content_root(
        unpacked,
        {part.name, part.into, *(name.removesuffix(".7z") for name in archives)} | INNER_NAMES,
    )
    if lacking := [name for name in part.holds if not (root / name).exists()]:
        raise UserError(
            f"{root} holds {listed(root)} but no {lacking[0]}; put it in place by hand, the "
            "archives are kept"
        )
    moves = (
        [(root, part.into)]
        if part.into
        else [(entry, entry.name) for entry in sorted(root.iterdir())]
    )
    folder.place(part.name, moves)
    folder.forget(workplace(folder, part))


def content_root(folder: Path, wrappers: set[str]) -> Path:
    """The folder with the content proper: an archive may wrap it in folders of the given names, or
    not.
    """
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name not in wrappers:
            return folder
        folder = entries[0]


def listed(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"


# ---- the released gradients


def download_train_grad(arguments: argparse.Namespace) -> None:
    """Bring the shards to --grad-root/--train-grad-name and write the manifest that makes them a
    store.
    """
    from ...store.shards import Store

    refuse_below_one(arguments, "max_workers", "count", "rows", "dim")
    names = [f"train_grad-{i}.npy" for i in range(arguments.count)]
    with DownloadFolder(Path(arguments.grad_root) / arguments.train_grad_name) as folder:
        refuse_computed(folder.root)
        if not all(folder.is_recorded(name) for name in names):
            jobs = folder.missing(released_shards(arguments, names))
            left = folder.bytes_left(jobs)
            print(f"{len(jobs)} of {len(names)} shards to fetch, {human(left)}", flush=True)
            folder.need(left, "this download")
            folder.fetch(jobs, arguments.max_workers, "train gradients")
        if not is_adopted(folder, names, arguments.dim):
            print("checking every value and writing the manifest", flush=True)
            (folder.root / "manifest.json").unlink(
                missing_ok=True
            )  # if there is one, it is that of other shards
            Store.adopt_raw(folder.root, arguments.dim)
        print(
            f"{os.path.relpath(folder.root)}: {arguments.count * arguments.rows} rows of "
            f"{arguments.dim}"
        )


def is_adopted(folder: DownloadFolder, names: list[str], dim: int) -> bool:
    """Whether the manifest is there and is that of the shards that were fetched."""
    from ...store.shards import Store

    try:
        store = Store.open(folder.root, {"dim": dim}, verify=False)
        found = [f"sha256:{store.record(shard)['sha256']}" for shard in range(store.num_split)]
    except UserError:
        return False
    wanted = [folder.record["files"][name]["digest"] for name in names]
    return len(found) == len(wanted) and all(
        f == w or not w.startswith("sha256:") for f, w in zip(found, wanted)
    )


def refuse_computed(folder: Path) -> None:
    """UserError if the folder holds gradients that were computed here: the release has the same
    names.
    """
    path = folder / "manifest.json"
    try:
        layout = json.loads(path.read_text())["layout"] if path.exists() else "raw"
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a store manifest ({error}); remove it and run again"
        ) from error
    if layout != "raw":
        raise UserError(f"{folder} holds gradients computed here; set GRAD_ROOT to another folder")


def released_shards(
    arguments: argparse.Namespace, names: list[str]
) -> list[tuple[RemoteFile, str]]:
    """The shards as listed by the hub. UserError if they are not exactly those asked for, each of
    --rows x --dim float32 values.
    """
    source = (arguments.path_in_repo or arguments.train_grad_name).strip("/")
    source = "" if source == "." else source
    files = Repo(arguments.hf_repo_id, arguments.repo_type).files(source)
    found = {
        file.name: file
        for file in files
        if re.fullmatch(r"train_grad-\d+\.npy", file.name)
        and file.path.rpartition("/")[0] == source
    }
    where, size = f"{arguments.hf_repo_id}/{source}".rstrip("/"), 4 * arguments.rows * arguments.dim
    if absent := [name for name in names if name not in found]:
        raise UserError(
            f"{where} has {len(found)} shards but no {absent[0]}; check PATH_IN_REPO, or give "
            "--count"
        )
    if more := sorted(found.keys() - set(names)):
        raise UserError(
            f"{where} has {more[0]} beyond the {len(names)} shards expected; give "
            f"--count={len(found)}"
        )
    for name in names:
        if found[name].size != size:
            raise UserError(
                f"{where}/{name} has {found[name].size} bytes on the hub, not --rows x --dim x 4 "
                f"= {size}; give the release's numbers"
            )
    return [(found[name], name) for name in names]


def refuse_below_one(arguments: argparse.Namespace, *names: str) -> None:
    """UserError for the first of the named numbers that is not positive."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(
                f"{name.upper()}={getattr(arguments, name)} is out of range; give at least 1"
            )
