"""What can be refused before the model is loaded: words, files, values. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ..datasets import labels
from ..datasets.image_folder import ImageCaptionDataset, load_folder
from ..errors import UserError
from ..flags import command
from ..index.faiss_import import FOLDER, faiss
from ..models.config_check import check_source
from ..models.hub import cached
from ..models.model_files import is_local, unet_size
from ..parsing import parse_memory, parse_methods
from ..scoring.memory import refuse_blocks, refuse_scores
from ..settings import DAMPINGS, Settings
from ..store.manifest import block_widths, read_manifest
from ..store.remote import bring_manifests, is_address
from ..validated_io import read_npy
from . import prompts
from .naming import store_base, store_name

LATENTS, TEXT = "laion_latents.npy", "laion_text_embeddings.npy"  # see `datasets.encoded`
ROW_STAGES = ("rows", "projection", "model", "data_dir", "num_train", "grad_dir")
# Two CPU cores: a row of the default recipe, 28 forward passes' worth, of the embedded model took
# 0.063 s (scripts/bench.sh); a pass of Stable Diffusion 1.4 9.5 s (scripts/abc/bench_sd14.sh). Time
# goes with parameters x pixels of the latents to the power that joins the two.
SECONDS, PARAMETERS, SIDE, PASSES, POWER = 0.063, 8_900_000, 8, 28, 0.956
STABLE_DIFFUSION = (859_520_964, 64)  # what a hub id is taken for before it is there
LATENT_CHANNELS, TEXT_VALUES = 4, 77 * 1024  # at most, of encoded pictures and captions


def check_question(settings: Settings) -> None:
    """UserError for words, pictures or a model that `attribution.answer` could not use, and for
    rows that are not there.
    """
    s, encoded = settings, (Path(settings.data_dir) / LATENTS).exists()
    check_targets(s, None if encoded else load_folder(s.data_dir))
    if s.search == "index":
        check_index_search(s)
    check_rows(s)
    check_memory(s)


def check_targets(
    settings: Settings, everything: ImageCaptionDataset | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """(targets, (c+, c-) of each) of PROMPT and TARGET_CONCEPTS. everything: the pictures whose
    labels know words; None for encoded ones. UserError for words that do not fit.
    """
    s, targets = settings, prompts.split_list(settings.target_concepts)
    contrasts = prompts.contrast_prompts(s.query_form, s.prompt, targets, s.negative_prompts)
    if everything is not None:
        labels.check_known(everything, s.prompt, targets)
    return targets, contrasts


def check_memory(settings: Settings) -> None:
    """UserError for a MAX_MEMORY too small for the scores by the rows there are, of several stores
    the smallest.
    """
    s, found = settings, []
    for folder in find_candidate_stores(s):
        with contextlib.suppress(UserError):  # told by whoever opens it
            found.append(read_manifest(folder))
    if not found:
        return
    manifest, limit = min(found, key=lambda m: m["num_rows"]), parse_memory(s.max_memory)
    if len(widths := block_widths(manifest)) > 1:
        refuse_blocks(widths, limit)
    if s.search == "scan":
        questions = len(prompts.split_list(s.target_concepts))
        refuse_scores(questions * len(DAMPINGS), manifest["num_rows"], limit)


def check_index_search(settings: Settings) -> None:
    """UserError for what an index cannot serve, for FAISS missing, and for no index."""
    if others := [name for name in parse_methods(settings.methods) if name != "concept_trak"]:
        raise UserError(
            f"METHODS={','.join(others)} needs the scores of all pictures, and an index knows "
            "those of the highest and lowest only: leave METHODS or SEARCH out"
        )
    faiss()
    stores = find_candidate_stores(settings)
    if stores and not any((folder / FOLDER / "manifest.json").exists() for folder in stores):
        raise UserError(f"{stores[0]} has no index; {build_index_hint(settings)}")


def build_index_hint(settings: Settings) -> str:
    """What makes the index of the settings' rows, to end a refusal with."""
    uses = (*ROW_STAGES, "damping", "candidates")
    return f"make it: {command('build-index', settings, uses)}"


def check_rows(settings: Settings) -> None:
    """UserError for a model or pictures that are not there, or rows that nobody made yet."""
    check_model(settings)
    if not gradients_exist(settings):
        raise UserError(missing_gradients_message(settings))


def check_index(settings: Settings) -> None:
    """As `check_rows`, and for FAISS missing."""
    faiss()
    check_rows(settings)


def check_model(settings: Settings) -> None:
    """UserError for pictures or a model that are not there, or object storage that refuses."""
    if is_address(settings.grad_dir):
        find_candidate_stores(settings)
    if not (Path(settings.data_dir) / LATENTS).exists():
        load_folder(settings.data_dir)
    for variable in ("SD_MODEL_PATH", "FIT_MODEL_PATH"):
        if source := getattr(settings, variable.lower()):
            check_source(source, variable)


def gradients_exist(settings: Settings) -> bool:
    """Whether there is anything under the name of the settings' store."""
    return bool(find_candidate_stores(settings))


def find_candidate_stores(settings: Settings) -> list[Path]:
    """What there is under the name of the settings' store."""
    name = store_name(settings)
    bases = store_base(settings), Path(settings.data_dir) / "grads"
    bring_manifests(bases[0], name)
    there = [f for base in bases if base.is_dir() for f in base.iterdir()]
    return [folder for folder in there if folder.name.startswith(name)]


def missing_gradients_message(settings: Settings) -> str:
    """What to run for rows that are not there, and how long it takes."""
    s, where = settings, f"{settings.grad_dir}/{store_name(settings)}"
    where = where if is_address(where) else os.path.relpath(where)
    takes = estimate(s, number_of_pictures(s))
    told = f" ({takes})" if takes else ""
    return f"no train gradients in {where}; make them{told}: {command('train-grad', s, ROW_STAGES)}"


def number_of_pictures(settings: Settings) -> int:
    """Of the train split; 0 where that is not told without the model."""
    text = Path(settings.data_dir) / TEXT
    if not (Path(settings.data_dir) / LATENTS).exists():
        return len(train_split(settings.data_dir))
    there = len(read_npy(text, "mend DATA_DIR", 3, mmap=True)) if text.exists() else 0
    return min(settings.num_train or there, there or settings.num_train)


def with_shards(settings: Settings, count: int, given: bool) -> Settings:
    """With no more shards than rows, of which there are `count` (0: nobody knows yet).

    given: whether NUM_SPLIT is the user's, and no default. UserError then.
    """
    if not 0 < count < settings.num_split:
        return settings
    if given:
        raise UserError(
            f"NUM_SPLIT={settings.num_split} is more than the {count} training pictures; set "
            f"NUM_SPLIT to at most {count}, or leave it out: unset NUM_SPLIT"
        )
    return settings.but(num_split=count)


def train_split(folder: str) -> ImageCaptionDataset:
    """The train pictures of a folder."""
    return load_folder(folder).split("train")


def seconds_per_gradient(settings: Settings) -> float | None:
    """On two CPU cores, from the size of the network; None where that is not known beforehand."""
    size = network_size(settings)
    if size is None:
        return None
    passes = 16 + 6 * (settings.nfe - 1)  # of the caption's fit, and of the states
    scale = size[0] / PARAMETERS * (size[1] / SIDE) ** 2
    return SECONDS * scale**POWER * passes / PASSES


def network_size(settings: Settings) -> tuple[int, int] | None:
    """(parameters, side of a latent) of the UNet; a hub id that is not here yet is taken for Stable
    Diffusion.
    """
    source = settings.sd_model_path
    if is_local(source):
        return unet_size(Path(source))
    folder = cached(source)
    return (unet_size(folder) if folder else None) or STABLE_DIFFUSION


def check_own_data(settings: Settings) -> None:
    """UserError for what would stop `run_own_data.sh` after hours: words, pictures, model."""
    s = settings
    targets = prompts.split_list(s.target_concepts)
    prompts.contrast_prompts(s.query_form, s.prompt, targets, s.negative_prompts)
    labels.check_known(load_folder(s.source_dir), s.prompt, targets)
    check_source(s.sd_model_path)


def estimate_own_data(settings: Settings) -> str:
    """What encoding SOURCE_DIR and making its rows takes, in a line. UserError for a disk that is
    too small, and as `check_own_data`.
    """
    check_own_data(settings)
    s, data = settings, load_folder(settings.source_dir)
    count, size = len(data.split("train")), network_size(settings)
    side = size[1] if size else STABLE_DIFFUSION[1]
    values = 2 * LATENT_CHANNELS * side**2 + TEXT_VALUES
    wide = 4 if s.store_dtype == "float32" else 2
    needed = count * (2 * values + wide * s.proj_dim)
    place = store_base(s)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    told = f"at most {needed / 1e6:,.0f} MB on disk ({free / 1e6:,.0f} MB free)"
    if free < needed:
        raise UserError(
            f"{place}: {count} pictures take {told}; free some or set DATA_DIR, GRAD_DIR"
        )
    time = estimate(s, count) or "how long cannot be told beforehand"
    kept = "what was made before is kept, and a stop loses nothing"
    return "; ".join(filter(None, (f"{count} pictures: {time}, {told}", kept, data.told_splits())))


def estimate(settings: Settings, count: int) -> str:
    """ "about 2 min on two CPU cores" for `count` rows; "" where it is not known beforehand."""
    seconds = seconds_per_gradient(settings)
    return f"about {duration(seconds * count)} on two CPU cores" if seconds and count else ""


def duration(seconds: float) -> str:
    """40 s, 5 min, 2.5 h, 3 days."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
