"""Whether a pipeline is one that can be used, told from its JSON files before any weight is read.

A pipeline fits when its UNet predicts eps or v from (x_t, t, one prompt's embeddings) and nothing
else: `StableDiffusionPipeline`, that is Stable Diffusion 1.x, 2.x and their fine-tunes. Every value
of a configuration that is used later is checked here. Needs no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..validated_io import read_json, told
from .hub import model_folder
from .model_files import INDEX, check_config_sizes, check_pipeline_folder, restore_hint, side_of

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
PARTS = {  # (library, class) of what is used of a pipeline
    "unet": ("diffusers", r"UNet2DConditionModel"),
    "vae": ("diffusers", r"AutoencoderKL"),
    "text_encoder": ("transformers", r"CLIPTextModel|BertModel"),
    "tokenizer": ("transformers", r"\w+Tokenizer(?:Fast)?"),
    "scheduler": ("diffusers", r"\w+Scheduler"),
}
CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
PREDICTIONS = ("epsilon", "v_prediction")
STEPS = 1000  # `schedule.NUM_TRAIN_TIMESTEPS`, which needs torch
REMEDY = "give SD_MODEL_PATH a StableDiffusionPipeline (SD 1.x, 2.x or a fine-tune)"


def check_source(source: str, variable: str = "SD_MODEL_PATH") -> Path:
    """The folder of a pipeline, or the cache's of a hub id. UserError for one that is not there, or
    cannot be used, as `check_kind`.
    """
    folder = model_folder(source, variable)
    check_pipeline_folder(folder, variable)
    check_kind(folder, source)
    return folder


def check_kind(folder: Path, source: str) -> None:
    """UserError naming what a model of another kind would need, or which value cannot be."""
    mend = restore_hint(source)
    index = read_json(folder / INDEX, mend)
    check_class(index.get("_class_name"), source)
    for part, (library, known) in PARTS.items():
        given = index.get(part)
        if not isinstance(given, list) or list(map(type, given)) != [str, str]:
            raise UserError(f"{source} has no {part} (its {INDEX} names none); {mend}")
        if given[0] != library or not re.fullmatch(known, given[1]):
            refuse_class(source, part, given[1])
    files = {part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder")}
    files["scheduler"] = folder / "scheduler/scheduler_config.json"
    check_configs({part: read_json(path, mend) for part, path in files.items()}, source)


def check_class(name: Any, source: str) -> None:
    """UserError naming what a pipeline of this class would need, where it does not fit."""
    if name not in FITTING:
        reasons = (text for start, text in MISSING.items() if str(name).startswith(start))
        reason = next(reasons, "needs inputs or rules that are not known here")
        raise UserError(f"{source} is a {name}, {reason}; {REMEDY}")


def check_configs(values: dict[str, dict[str, Any]], source: str) -> None:
    """UserError for a value that cannot be, in the configurations of unet, vae, text_encoder and
    scheduler.
    """
    configs = {part: Config(source, part, said) for part, said in values.items()}
    for part in ("unet", "vae"):
        name = configs[part].values.get("_class_name")
        if name not in (None, PARTS[part][1]):
            refuse_class(source, part, str(name))
    for part in ("unet", "vae", "text_encoder"):
        check_config_sizes(configs[part].values, f"{source}, {part}")
    _check_unet(configs["unet"])
    _check_vae(configs["vae"], configs["unet"])
    _check_text_encoder(configs["text_encoder"], configs["unet"])
    _check_scheduler(configs["scheduler"])


def refuse_class(source: str, part: str, name: str) -> NoReturn:
    """UserError for a part of another class than what is used."""
    known = PARTS[part][1].replace("|", " or a ").replace(r"\w+", "").replace("(?:Fast)?", "")
    raise UserError(f"the {part} of {source} is a {name[:80]}, not a {known}; {REMEDY}")


@dataclass
class Config:
    """The configuration of a part, with the values that must be."""

    source: str
    part: str
    values: dict[str, Any]

    def refuse(self, what: str, remedy: str = REMEDY) -> NoReturn:
        """UserError: the part has such a value."""
        raise UserError(f"the {self.part} of {self.source} has {what}; {remedy}")

    def whole(self, key: str, default: int) -> int:
        """A whole number of at least 1; the default where there is none. UserError for another."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            self.refuse(f"{key}={told(value)}, which is not a whole number above 0")
        return value

    def number(self, key: str, default: float, most: float = math.inf) -> float:
        """A number above 0 and below `most`; the default where there is none."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            bound = "" if most == math.inf else f" and below {most:g}"
            self.refuse(f"{key}={told(value)}, which is not a number above 0{bound}")
        return value


def _check_unet(unet: Config) -> None:
    for key in CONDITIONS:
        if unet.values.get(key) is not None:
            needs = "needs an input beside latents, time and prompt"
            unet.refuse(f"{key}={told(unet.values[key])}: {needs}")
    channels, out = unet.whole("in_channels", 4), unet.whole("out_channels", 4)
    if out != channels:
        unet.refuse(f"{channels} input channels but {out} output channels: predicts more than eps")
    try:
        side_of(unet.values)
    except ValueError as error:
        remedy = (
            "write the one that it was trained at into unet/config.json (64 for pictures of 512 "
            "pixels), or set SD_MODEL_PATH to another"
        )
        unet.refuse(str(error), remedy)


def _check_vae(vae: Config, unet: Config) -> None:
    channels, latents = unet.values.get("in_channels", 4), vae.whole("latent_channels", 4)
    if channels != latents:
        counts = f"{channels} input channels but its latents have {latents}"
        unet.refuse(f"{counts}: needs a further picture, as for inpainting or editing")
    for key in ("in_channels", "out_channels"):
        if vae.whole(key, 3) != 3:
            vae.refuse(f"{key}={vae.values[key]}: not red, green and blue")
    vae.number("scaling_factor", 0.18215)


def _check_text_encoder(encoder: Config, unet: Config) -> None:
    inner = encoder.values.get("text_config")  # of a whole CLIP
    encoder.values = inner if isinstance(inner, dict) else encoder.values
    is_clip = encoder.values.get("model_type", "clip") != "bert"
    width = encoder.whole("hidden_size", 512 if is_clip else 768)
    encoder.whole("max_position_embeddings", 77 if is_clip else 512)
    read = unet.values.get("cross_attention_dim", 1280)
    for one in read if isinstance(read, list) and read else [read]:
        if type(one) is not int or one != width:
            wrong = f"embeddings of {width} numbers, but its unet reads {told(read)}"
            encoder.refuse(f"{wrong} (cross_attention_dim)")


def _check_scheduler(scheduler: Config) -> None:
    steps = scheduler.whole("num_train_timesteps", STEPS)
    betas = scheduler.values.get("trained_betas")
    if betas is not None:
        steps = len(betas) if isinstance(betas, list) else 0
    if steps != STEPS:
        scheduler.refuse(f"a noise schedule of {steps} steps, not of {STEPS} steps")
    prediction = scheduler.values.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        wrong = f"prediction_type={told(prediction)}, not {' or '.join(PREDICTIONS)}"
        scheduler.refuse(wrong)
    for key, default in (("beta_start", 0.0001), ("beta_end", 0.02)):
        scheduler.number(key, default, 1.0)
