"""A model of the Hugging Face hub: its copy in the cache, which is used as it is, and what is still
missing there, which is fetched once the hub has answered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..network import check_reachable, way_to, without_credentials
from .model_files import INDEX, STEMS, is_local, no_folder, refuse_no_weights, weight_files, weights

SECONDS = 10.0  # for the hub to answer
TEXTS = (".json", ".txt", ".model")  # configurations, and what a tokenizer reads


def model_folder(source: str, variable: str = "SD_MODEL_PATH", mark: str = INDEX) -> Path:
    """The folder of a model, or the cache's of a hub id, whose configurations (some 100 KB) are
    fetched if they are not there. mark: a file that it has. UserError for one that cannot be had.
    """
    if not is_local(source):
        return cached(source, mark) or from_hub(source, texts, variable)
    if not Path(source).exists():
        told = f"set {variable} to a folder or a hub id (owner/name)"
        raise UserError(f"{no_folder(source)}; {told}")
    return Path(source)


def folder_with_weights(source: str) -> Path:
    """The same, with the weights of every network. UserError where there are none to be had."""
    folder = model_folder(source)
    lacking = [part for part in STEMS if not weights(folder, part)[1]]
    if lacking and not is_local(source) and not is_offline():
        return from_hub(source, needed)
    for part in lacking:
        place = folder / part
        names = [p.name for p in place.iterdir()] if place.is_dir() else []
        refuse_no_weights(names, part, source)
    return folder


def cached(source: str, mark: str = INDEX) -> Path | None:
    """Where the cache has a hub id's newest commit that was fetched; None if it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, mark)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, as the library read it."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def texts(source: str, names: list[str]) -> list[str]:
    """Of the files of a pipeline, those that are no weights."""
    return [name for name in names if name.endswith(TEXTS) and name.count("/") < 2]


def needed(source: str, names: list[str]) -> list[str]:
    """Of the files of a pipeline, those that are read. UserError for one without safetensors."""
    found = texts(source, names)
    for part in STEMS:
        inner = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")]
        refuse_no_weights(inner, part, source)
        found += [f"{part}/{name}" for name in weight_files(inner, part)[1]]
    return found


def from_hub(
    source: str, choose: Callable[[str, list[str]], list[str]], variable: str = "SD_MODEL_PATH"
) -> Path:
    """Fetch the files of a hub id that `choose` wants of (id, names); the folder in the cache.

    UserError, before anything is tried twice, when the hub cannot be reached or does not have it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    missing = no_folder(source)
    another = f"set {variable} to a folder that is here"
    if is_offline():
        told = f"{missing}, and HF_HUB_OFFLINE keeps it from being asked of the hub"
        raise UserError(f"{told}; {another}, or unset HF_HUB_OFFLINE")
    host = way_to(constants.ENDPOINT)[1]
    check_reachable(constants.ENDPOINT, f"{missing}: {another}, or connect")
    try:
        found = HfApi().model_info(source, timeout=SECONDS).siblings or []
        wanted = choose(source, [file.rfilename for file in found])
        return Path(snapshot_download(source, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the HTTP client is another in each major version
        told, kind = f"{missing}, and {host}", type(error).__name__
        if kind == "GatedRepoError":
            raise UserError(
                f"{told} gives {source} only to those who accepted its terms; accept them there "
                f"and set HF_TOKEN, or {another}"
            ) from None
        if kind in ("RepositoryNotFoundError", "HFValidationError", "RevisionNotFoundError"):
            raise UserError(f"{told} has no model {source}; {another}, or to its id") from None
        reason = without_credentials(" ".join(str(error).split())[:160]) or kind
        raise UserError(
            f"{told} cannot be asked for it ({reason}); {another}, or run the same again later"
        ) from None
