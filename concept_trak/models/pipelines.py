"""Opening a diffusers pipeline, and one clear sentence for each that cannot be used.

Which are, is said in `kind`. Nothing here reads a pickle or runs code of a model's author.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..process import log
from ..validated_io import read_json
from .config_check import REMEDY, check_source
from .hub import folder_with_weights
from .model_files import INDEX, STEMS, header, restore_hint, weights
from .schedule import NUM_TRAIN_TIMESTEPS

WRAPPED = ("_orig_mod.", "module.")  # what torch.compile and DataParallel put before every name


def open_pipeline(source: str, dtype: torch.dtype) -> Any:
    """A `StableDiffusionPipeline` of a folder or hub id on the CPU, safetensors only, no safety
    checker.

    UserError when the folder is missing, lacks a file, or holds a model of another kind (said
    before any weight is read).
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    check_source(source)
    folder = folder_with_weights(source)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    index, parts = read_json(folder / INDEX, restore_hint(source)), {}
    with warnings.catch_warnings():
        # newer releases prefer `dtype`, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        for part in ("scheduler", "tokenizer", *STEMS):
            with told_of(source, part):
                parts[part] = read_part(folder, part, index[part], dtype)
                check_part(folder, part, parts)
        others = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        return StableDiffusionPipeline(**parts, **others, requires_safety_checker=False)


@contextlib.contextmanager
def told_of(source: str, part: str) -> Iterator[None]:
    """Whatever a damaged part makes the libraries raise becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"cannot load the pipeline {source}: {part}: {reason}; {restore_hint(source)}"
        ) from error


def read_part(folder: Path, part: str, of: list[str], dtype: torch.dtype) -> Any:
    """A part of the class (library, name) that the pipeline's index gives it."""
    import diffusers
    import transformers

    kind = getattr({"diffusers": diffusers, "transformers": transformers}[of[0]], of[1])
    if part not in STEMS:
        return kind.from_pretrained(str(folder / part), local_files_only=True)
    variant, files = weights(folder, part)
    refuse_wrapped(files)
    if variant:
        log(f"{folder}: the {part} is there as {variant} alone, which is taken")
    options = {"use_safetensors": True, "variant": variant or None, "local_files_only": True}
    return kind.from_pretrained(str(folder / part), torch_dtype=dtype, **options)


def check_part(folder: Path, part: str, parts: dict[str, Any]) -> None:
    """ValueError for a part that is read, but cannot be used; of `parts`, those read so far."""
    if part == "scheduler":
        refuse_schedule(parts[part])
    if part in STEMS:
        check_weights(parts[part], part, folder)
    if part == "text_encoder":
        check_tokenizer(parts["tokenizer"], parts[part])


def refuse_schedule(scheduler: Any) -> None:
    """ValueError for a scheduler without the shares of picture and noise of 1000 steps."""
    found = getattr(scheduler, "alphas_cumprod", torch.empty(0))
    name = type(scheduler).__name__
    if len(found) != NUM_TRAIN_TIMESTEPS:
        raise UserError(f"{name} has no noise schedule of 1000 steps; {REMEDY}")
    if not (found.diff() < 0).all() or not 0 <= found[-1] < found[0] < 1:
        raise ValueError(f"the noise of {name} does not grow from step to step")


def refuse_wrapped(files: list[Path]) -> None:
    """ValueError for weights that were saved with the name of what they were wrapped in."""
    names = [name for file in files for name in header(file) if name != "__metadata__"]
    for prefix in WRAPPED:
        if names and all(name.startswith(prefix) for name in names):
            told = f"its weights have {prefix!r} before their names, from torch.compile or the like"
            raise UserError(
                f"{files[0]}: {told}; save the network inside that one "
                f"({prefix[:-1]}), or set SD_MODEL_PATH to another"
            )


def check_weights(network: Any, part: str, folder: Path) -> None:
    """ValueError for a network whose file lacks a weight, or has one that is no number: diffusers
    leaves the first empty, transformers draws it at random, and both go on.
    """
    lacking = [key for key, p in network.named_parameters() if p.is_meta]
    if part == "text_encoder" and type(network).__name__ == "CLIPTextModel":
        known = {
            key.removeprefix("text_model.")
            for file in weights(folder, part)[1]
            for key in header(file)
        }
        wanted = (key.removeprefix("text_model.") for key, _ in network.named_parameters())
        lacking += [key for key in wanted if key not in known]
    if lacking:
        raise ValueError(f"the file of its {part} lacks {lacking[0]}")
    for key, p in network.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"{key} holds a NaN or infinite value")


def part_folder(pipe: Any, name: str) -> Path:
    """Where a part's files are: in the folder that was given, or in the hub's cache."""
    return Path(str(pipe.unet.config.get("_name_or_path") or "")).parent / name


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """ValueError for one that does not read words, or more of them than the text encoder takes: its
    files are damaged, or others. One that does not say how many gets the text encoder's number.
    """
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    length, room = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if length == VERY_LARGE_INTEGER:
        length = tokenizer.model_max_length = room
    if type(length) is not int or not 2 < length <= room:
        given = f"its tokenizer's model_max_length is {str(length)[:20]}, not 3 to {room}"
        raise ValueError(f"{given}; tokenizer/ is damaged")
    known = text_encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        told = f"its tokenizer has {len(tokenizer)} words, its text encoder {known}"
        raise ValueError(f"{told}; tokenizer/ is damaged")
    numbers = tokenizer(["a", "an"], padding="max_length", truncation=True).input_ids
    if numbers[0] == numbers[1] or not all(isinstance(n, int) for n in numbers[0]):
        raise ValueError("its tokenizer does not tell words apart; tokenizer/ is damaged")
