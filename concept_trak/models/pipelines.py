"""Opening a diffusers pipeline, with a LoRA if asked for, and one clear sentence for each that
cannot be used.

A pipeline fits when its UNet predicts eps or v from (x_t, t, one prompt's embeddings) and nothing
else: `StableDiffusionPipeline`, that is Stable Diffusion 1.x, 2.x and their fine-tunes. A LoRA (Hu
et al. 2022) turns a layer W into

    y = W x + b + s B A x,      s = alpha / rank

`peft` keeps W, A and B as linear layers of their own (`to_q.base_layer`, `to_q.lora_A.default`,
`to_q.lora_B.default`), so each has the per-sample gradients of any other linear layer. Nothing here
reads a pickle or runs code of a model's author.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError

FITTING = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
)  # the second has the same parts
FLOW = "a flow-matching transformer: needs a velocity-to-eps conversion and gradient rules for joint attention"
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
LORA_NAMES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)  # of diffusers and of peft


def open_pipeline(source: str, dtype: torch.dtype):
    """A `StableDiffusionPipeline` of a folder or hub id on the CPU, safetensors only, no safety
    checker.

    UserError when the folder is missing, lacks a file, or holds a model of another kind (said
    before any weight is read).
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    local = os.sep in source or source.startswith(".") or Path(source).exists()
    if (
        local
        and "/" in source
        and not Path(source).exists()
        and source.count("/") == 1
        and not source.startswith((".", "/"))
    ):
        local = False  # owner/name: a hub id
    if local and not (Path(source) / "model_index.json").exists():
        raise UserError(
            f"{source} is not a diffusers pipeline folder (no model_index.json); give "
            "SD_MODEL_PATH a folder or a hub id"
        )
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # newer releases prefer `dtype`, which older ones do not know
            warnings.simplefilter(
                "ignore", UserWarning
            )  # of the hub, about arguments that diffusers passes
            check_kind(source)
            pipe = StableDiffusionPipeline.from_pretrained(
                source,
                torch_dtype=dtype,
                safety_checker=None,
                use_safetensors=True,
                requires_safety_checker=False,
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the pipeline {source}: {str(error).splitlines()[0].rstrip('.')}; check "
            "SD_MODEL_PATH"
        ) from error
    if not hasattr(pipe.scheduler, "alphas_cumprod") or len(pipe.scheduler.alphas_cumprod) != 1000:
        raise UserError(
            f"{source} has no noise schedule of 1000 steps ({type(pipe.scheduler).__name__}); "
            f"{REMEDY}"
        )
    return pipe


def check_kind(source: str) -> None:
    """UserError naming what a model of another kind would need; reads the JSON files of a folder or
    hub id, no weights.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    name = StableDiffusionPipeline.load_config(source).get("_class_name")
    if name not in FITTING:
        reason = next(
            (text for start, text in MISSING.items() if str(name).startswith(start)),
            "needs inputs or rules that are not known here",
        )
        raise UserError(f"{source} is a {name}, {reason}; {REMEDY}")
    unet, vae = (
        kind.load_config(source, subfolder=part)
        for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    for key in CONDITIONS:
        if unet.get(key) is not None:
            raise UserError(
                f"the UNet of {source} has {key}={unet[key]!r}: needs an input beside latents, "
                f"time and prompt; {REMEDY}"
            )
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"the UNet of {source} takes {channels} input channels but its latents have "
            f"{latents}: needs a further picture, "
            f"as for inpainting or editing; {REMEDY}"
        )


def load_lora(pipe, path: str) -> None:
    """Add the LoRA of a safetensors file or folder (diffusers, kohya or peft layout) to UNet and
    text encoder of `pipe`.

    UserError when peft is not installed, the file is missing or a pickle, or not every weight of it
    finds its place.
    """
    file = lora_file(Path(path))
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"the LoRA {path} needs the package peft; install it with: pip install peft"
        )
    parts = (pipe.unet, pipe.text_encoder)
    try:
        wanted = sum(
            value.numel() for name, value in load_file(file).items() if not name.endswith(".alpha")
        )
        with quiet_diffusers():
            if file.name == LORA_NAMES[1] and (file.parent / "adapter_config.json").exists():
                inject_peft_folder(pipe.unet, file)
            else:
                pipe.load_lora_weights(
                    str(file.parent),
                    weight_name=file.name,
                    use_safetensors=True,
                    local_files_only=True,
                    adapter_name="default",
                )
    except (
        OSError,
        SafetensorError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        ImportError,
    ) as error:
        raise UserError(
            f"cannot use the LoRA {file} with this model: {' '.join(str(error).split())[:200]}; "
            "check LORA_PATH"
        ) from error
    placed = {name: p for part in parts for name, p in part.named_parameters() if "lora_" in name}
    if any("magnitude" in name for name in placed):
        raise UserError(
            f"{file} is a DoRA, whose magnitudes have no per-sample gradient rule; give LORA_PATH "
            "a plain LoRA"
        )
    if (count := sum(p.numel() for p in placed.values())) != wanted:
        raise UserError(
            f"the LoRA {file} does not fit: {count} of its {wanted} numbers have a place in this "
            "model; "
            "give LORA_PATH a plain LoRA of this base model"
        )
    for p in placed.values():
        p.data = p.data.to(pipe.unet.dtype)  # it comes in the dtype of its file


def lora_file(path: Path) -> Path:
    """The one safetensors file that `path` is or holds. UserError when there is none, several, or
    only a pickle.
    """
    if not path.exists():
        raise UserError(
            f"LORA_PATH={path} does not exist; give a safetensors file or a folder that holds one"
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [f for name in LORA_NAMES for f in files if f.name == name][:1] or files
    if len(files) > 1:
        raise UserError(
            f"{path} holds {len(files)} safetensors files; give LORA_PATH one of them, e.g. "
            f"{files[0]}"
        )
    if not files or files[0].suffix != ".safetensors":
        raise UserError(
            f"{path} is no safetensors file and holds none; loading a pickle can run code, so "
            "convert the LoRA to safetensors"
        )
    return files[0]


def inject_peft_folder(unet: torch.nn.Module, file: Path) -> None:
    """A UNet LoRA saved by `PeftModel.save_pretrained`: names without prefix, rank and alpha in
    adapter_config.json.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(file.parent))
    if config.peft_type != "LORA":
        raise ValueError(f"its peft_type is {config.peft_type}, not LORA")
    inject_adapter_in_model(config, unet, "default")
    state = {
        name.removeprefix("base_model.model."): value for name, value in load_file(file).items()
    }
    strangers = set_peft_model_state_dict(unet, state, "default").unexpected_keys
    if strangers:
        raise ValueError(f"it has a weight for {strangers[0]}")


@contextlib.contextmanager
def quiet_diffusers():
    """Keep diffusers and peft from warning about parts that a LoRA leaves alone: whether it fits is
    counted, not read from a log.
    """
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
