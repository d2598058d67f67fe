"""Opening a diffusers pipeline, and one clear sentence for each that cannot be used.

A pipeline fits when its UNet predicts eps or v from (x_t, t, one prompt's embeddings) and nothing
else: `StableDiffusionPipeline`, that is Stable Diffusion 1.x, 2.x and their fine-tunes. Nothing
here reads a pickle or runs code of a model's author.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import UserError
from .folder import copy_again, is_local, refuse_endless, refuse_other_folder
from .schedule import NUM_TRAIN_TIMESTEPS

FITTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # both have the same parts
FLOW = (
    "a flow-matching transformer: needs a velocity-to-eps conversion and gradient rules for joint "
    "attention"
)
MISSING = {  # beginning of the class name: what would be needed; the first that matches counts
    "StableDiffusionXL": "needs two text encoders' embeddings and time ids beside the prompt",
    "StableDiffusion3": FLOW,
    "Flux": FLOW,
    "StableDiffusionInpaint": "its UNet takes 9 input channels: needs a mask and the masked "
    "picture beside the latents",
    "StableDiffusionInstructPix2Pix": "its UNet takes 8 input channels: needs the picture to edit "
    "beside the latents",
    "StableDiffusionControlNet": "needs a control picture beside the prompt",
    "LatentConsistencyModel": "its distilled UNet takes the guidance scale as an input and "
    "predicts x0 in one step",
}
CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
REMEDY = "give SD_MODEL_PATH a StableDiffusionPipeline (SD 1.x, 2.x or a fine-tune)"


def open_pipeline(source: str, dtype: torch.dtype) -> Any:
    """A `StableDiffusionPipeline` of a folder or hub id on the CPU, safetensors only, no safety
    checker.

    UserError when the folder is missing, lacks a file, or holds a model of another kind (said
    before any weight is read).
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if is_local(source):
        refuse_other_folder(Path(source))
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    try:
        with warnings.catch_warnings():
            # newer releases prefer `dtype`, which older ones do not know
            warnings.simplefilter("ignore", FutureWarning)
            # of the hub, about arguments that diffusers passes
            warnings.simplefilter("ignore", UserWarning)
            check_kind(source)
            pipe = StableDiffusionPipeline.from_pretrained(source, torch_dtype=dtype, **options)
            refuse_missing_weights(pipe)
            refuse_deaf_tokenizer(pipe.tokenizer, pipe.text_encoder)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a damaged part makes the libraries raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"cannot load the pipeline {source}: {reason}; {copy_again(source)}"
        ) from error
    if len(getattr(pipe.scheduler, "alphas_cumprod", ())) != NUM_TRAIN_TIMESTEPS:
        reason = f"has no noise schedule of 1000 steps ({type(pipe.scheduler).__name__})"
        raise UserError(f"{source} {reason}; {REMEDY}")
    return pipe


def refuse_missing_weights(pipe: Any) -> None:
    """ValueError for a network whose file lacks a weight: diffusers leaves it empty, transformers
    draws it at random, and both go on.
    """
    for name in ("unet", "vae", "text_encoder"):
        lacking = [key for key, p in getattr(pipe, name).named_parameters() if p.is_meta]
        if lacking:
            raise ValueError(f"the file of its {name} lacks {lacking[0]}")
    encoder = pipe.text_encoder
    files = list(part_folder(pipe, "text_encoder").glob("*.safetensors"))
    if type(encoder).__name__ != "CLIPTextModel" or not files:
        return
    known = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            known |= {key.removeprefix("text_model.") for key in opened.keys()}  # noqa: SIM118
    wanted = (key.removeprefix("text_model.") for key, _ in encoder.named_parameters())
    if lacking := [key for key in wanted if key not in known]:
        raise ValueError(f"the file of its text_encoder lacks {lacking[0]}")


def part_folder(pipe: Any, name: str) -> Path:
    """Where a part's files are: in the folder that was given, or in the hub's cache."""
    return Path(str(pipe.unet.config.get("_name_or_path") or "")).parent / name


def refuse_deaf_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """ValueError for one that does not read words, or more of them than the text encoder takes: its
    files are damaged, or others.
    """
    length, room = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if type(length) is not int or not 2 < length <= room:
        given = f"its tokenizer's model_max_length is {str(length)[:20]}, not 3 to {room}"
        raise ValueError(f"{given}; tokenizer/ is damaged")
    numbers = tokenizer(["a", "an"], padding="max_length", truncation=True).input_ids
    if numbers[0] == numbers[1] or not all(isinstance(n, int) for n in numbers[0]):
        raise ValueError("its tokenizer does not tell words apart; tokenizer/ is damaged")


def check_kind(source: str) -> None:
    """UserError naming what a model of another kind would need; reads JSON files, no weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    name = StableDiffusionPipeline.load_config(source).get("_class_name")
    if name not in FITTING:
        reasons = (text for start, text in MISSING.items() if str(name).startswith(start))
        reason = next(reasons, "needs inputs or rules that are not known here")
        raise UserError(f"{source} is a {name}, {reason}; {REMEDY}")
    unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    vae = AutoencoderKL.load_config(source, subfolder="vae")
    for part, config in (("unet", unet), ("vae", vae)):
        refuse_endless(config, f"{source}, {part}")
    for key in CONDITIONS:
        if unet.get(key) is not None:
            needs = "needs an input beside latents, time and prompt"
            raise UserError(f"the UNet of {source} has {key}={unet[key]!r}: {needs}; {REMEDY}")
    channels = unet.get("in_channels", 4)
    latents = vae.get("latent_channels", 4)
    if channels != latents:
        counts = f"takes {channels} input channels but its latents have {latents}"
        needs = "needs a further picture, as for inpainting or editing"
        raise UserError(f"the UNet of {source} {counts}: {needs}; {REMEDY}")
