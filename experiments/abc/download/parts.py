"""The assets of the AbC benchmark: what they are, and how they come to lie in one folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from concept_trak.errors import UserError
from concept_trak.validated_io import safe_join

from .archives import find_tool, unpack, unpacked_size, volumes
from .folder import DownloadState, FileJob
from .hub import RemoteFile, Repo
from .progress import human

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


LISTS = ("json/test_*", "imagenet_class_to_categories.json", "path_to_prompts.json")
ENCODED = ("abc/*laion_latents_text_embeddings.7z*",)
ENCODED_HOLDS = ("laion_latents.npy", "laion_text_embeddings.npy")
LAION, LAION_HOLDS = ("laion_subset/*.7z*",), ("images", "captions.txt")
PARTS = {
    part.name: part
    for part in (  # in the order of the work: small ones first
        Part("json", GEN_DATA, LISTS, packed=False),
        Part("fisher", UNLEARNING, ("abc/*sd_fisher.pt",), packed=False),
        Part("exemplar", GEN_DATA, ("exemplar/*.7z*",), into="exemplar"),
        Part("latents", UNLEARNING, ENCODED, holds=ENCODED_HOLDS, growth=2.0),
        Part("laion_subset", GEN_DATA, LAION, into="laion_subset", holds=LAION_HOLDS),
        Part("synth", GEN_DATA, ("synth_test/*.7z*",), into="synth"),
        Part("models", GEN_DATA, ("models_test/*.7z*",), into="models", growth=1.2),
    )
}
# folders that an archive may wrap its content in, besides its own and its part's name
INNER_NAMES = {"data", "dataset", "abc"}


def chosen_parts(text: str) -> list[Part]:
    """Parts from "a b" or "a,b"; all of them from the empty text."""
    names = re.split(r"[\s,]+", text.strip()) if text.strip() else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"PARTS: {unknown[0]!r} is unknown; set PARTS to some of {' '.join(PARTS)}")
    return [part for name, part in PARTS.items() if name in names]


def download_parts(data_dir: str | Path, parts: list[Part], workers: int) -> None:
    """Bring the parts to a folder, one after the other. UserError, before anything is fetched, for
    what cannot end well.
    """
    with DownloadState(data_dir) as folder:
        for part in parts:
            folder.finish_moves(part.name)
        pending = [part for part in parts if not folder.has_part(part.name)]
        for part in parts:
            if part not in pending:
                # left over if a call was killed right after its last move
                folder.forget(workplace(folder, part))
                print(f"{part.name}: finished")
        if not pending:
            return
        tool = find_tool() if any(part.packed for part in pending) else ""
        for part, jobs in plan(folder, pending).items():
            folder.fetch(folder.missing(jobs), workers, part.name)
            paths = [path for _, path in jobs]
            if part.packed:
                unpack_part(folder, part, paths, tool)
            else:
                folder.finish_part(part.name, paths)
            print(f"{part.name}: finished", flush=True)


def workplace(folder: DownloadState, part: Part) -> Path:
    """Where the part's archives lie and are unpacked."""
    return folder.hidden / part.name


def plan(folder: DownloadState, parts: list[Part]) -> dict[Part, list[FileJob]]:
    """{part: its files and where they go}, after checks of names, of what is in the way, and of the
    disk; prints the sizes.
    """
    repo_ids = dict.fromkeys(part.repo_id for part in parts)
    on_hub = {repo_id: Repo(repo_id).files() for repo_id in repo_ids}
    plans, used, peak = {}, 0.0, 0.0
    for part in parts:
        folder.forget(workplace(folder, part) / "unpacked")  # of a call that was killed
        plans[part] = jobs = part_jobs(folder, part, on_hub[part.repo_id])
        for name in (part.into,) if part.into else part.holds:
            folder.refuse_foreign(part.name, name)
        size = sum(file.size for file, _ in jobs)
        left = folder.bytes_left(folder.missing(jobs))
        unpacked = size * part.growth if part.packed else 0
        used += left + unpacked
        peak = max(peak, used)
        used -= size if part.packed else 0  # the archives go before the next part comes
        sizes = f"{len(jobs):3} files {human(size):>8}, to fetch {human(left):>8}"
        after = f", unpacked about {human(unpacked)}" if unpacked else ""
        print(f"{part.name:14} {sizes}{after}")
    print(f"disk needed at most: about {human(peak)}", flush=True)
    folder.need(peak, "this download with its unpacking")
    return plans


def part_jobs(folder: DownloadState, part: Part, files: list[RemoteFile]) -> list[FileJob]:
    """The part's files: archives go to the hidden folder."""
    mine = [f for f in files if any(fnmatchcase(f.path, pattern) for pattern in part.patterns)]
    if part.packed:
        wanted = {name for names in volumes([f.name for f in mine]).values() for name in names}
        mine = [file for file in mine if file.name in wanted]
    if not mine:
        raise UserError(
            f"{part.name}: no file like {part.patterns[0]} is in {part.repo_id} on the hub; leave "
            f"{part.name} out of PARTS"
        )
    if part.packed:
        hidden = os.path.relpath(workplace(folder, part), folder.root)
        return [(file, f"{hidden}/{file.name}") for file in mine]
    # the hub's `abc` is DATA_DIR itself
    return [(file, file.name if file.path.startswith("abc/") else file.path) for file in mine]


def unpack_part(folder: DownloadState, part: Part, paths: list[str], tool: str) -> None:
    """Unpack into a temporary folder, move the content to its place, then remove the archives."""
    archives = volumes([path.rpartition("/")[2] for path in paths])
    firsts = [workplace(folder, part) / names[0] for names in archives.values()]
    unpacked = workplace(folder, part) / "unpacked"
    sizes = [unpacked_size(first, tool) for first in firsts]
    folder.need(sum(sizes), f"unpacking {part.name}")
    for first, size in zip(firsts, sizes, strict=True):
        unpack(first, unpacked, size, tool)
    for path in unpacked.rglob("*"):
        if path.is_symlink():
            safe_join(unpacked, str(path.relative_to(unpacked)), f"a link in {part.name}'s archive")
    names = {name.removesuffix(".7z") for name in archives}
    root = content_root(unpacked, {part.name, part.into} | names | INNER_NAMES)
    entries = sorted(root.iterdir())
    if lacking := [name for name in part.holds if not (root / name).exists()]:
        found = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise UserError(
            f"{root} holds {found} but no {lacking[0]}; move it below {root} and run the same "
            "again, the archives are kept"
        )
    moves = [(root, part.into)] if part.into else [(entry, entry.name) for entry in entries]
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
