"""Low-rank adapters (LoRA, Hu et al. 2022) of UNet and text encoder; a layer W becomes

    y = W x + b + s B A x,      s = alpha / rank

`peft` keeps W, A and B as linear layers of their own (`to_q.base_layer`, `to_q.lora_A.default`,
`to_q.lora_B.default`), so each has the per-sample gradients of any other linear layer. Safetensors
only: a pickle can run code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..reading import read_safetensors

# of diffusers and of peft
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# what diffusers and peft raise for a file that does not fit
UNFIT = (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError, ImportError)


def load_lora(pipe: Any, path: str) -> None:
    """Add the LoRA of a safetensors file or folder (diffusers, kohya or peft layout) to UNet and
    text encoder of `pipe`.

    UserError when peft is not installed, the file is missing or a pickle, or not every weight of it
    finds its place.
    """
    file = lora_file(Path(path))
    if importlib.util.find_spec("peft") is None:
        remedy = "install it with: pip install peft"
        raise UserError(f"the LoRA {path} needs the package peft; {remedy}")
    try:
        weights = read_safetensors(file, "set LORA_PATH to a whole one")
        with quiet_diffusers():
            insert(pipe, file)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot use the LoRA {file} with this model: {reason}; set LORA_PATH to another"
        ) from error
    parts = (pipe.unet, pipe.text_encoder)
    placed = {name: p for part in parts for name, p in part.named_parameters() if "lora_" in name}
    if any("magnitude" in name for name in placed):
        reason = "is a DoRA, whose magnitudes have no per-sample gradient rule"
        raise UserError(f"{file} {reason}; give LORA_PATH a plain LoRA")
    wanted = sum(v.numel() for name, v in weights.items() if not name.endswith(".alpha"))
    if (count := sum(p.numel() for p in placed.values())) != wanted:
        reason = f"{count} of its {wanted} numbers have a place in this model"
        remedy = "give LORA_PATH a plain LoRA of this base model"
        raise UserError(f"the LoRA {file} does not fit: {reason}; {remedy}")
    for p in placed.values():
        p.data = p.data.to(pipe.unet.dtype)  # it comes in the dtype of its file


def lora_file(path: Path) -> Path:
    """The one safetensors file that `path` is or holds. UserError when there is none, several, or
    only a pickle.
    """
    if not path.exists():
        remedy = "set LORA_PATH to a safetensors file, or a folder that holds one"
        raise UserError(f"LORA_PATH={path} does not exist; {remedy}")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [f for name in LORA_NAMES for f in files if f.name == name][:1] or files
    if len(files) > 1:
        remedy = f"give LORA_PATH one of them, e.g. {files[0]}"
        raise UserError(f"{path} holds {len(files)} safetensors files; {remedy}")
    if not files or files[0].suffix != ".safetensors":
        reason = "is no safetensors file and holds none; loading a pickle can run code"
        raise UserError(f"{path} {reason}, so set LORA_PATH to the LoRA as safetensors")
    return files[0]


def insert(pipe: Any, file: Path) -> None:
    """Put the layers of one file into `pipe`; raises one of `UNFIT` when they do not fit."""
    if file.name == LORA_NAMES[1] and (file.parent / "adapter_config.json").exists():
        return insert_peft_folder(pipe.unet, file)
    options = {"use_safetensors": True, "local_files_only": True, "adapter_name": "default"}
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, **options)


def insert_peft_folder(unet: torch.nn.Module, file: Path) -> None:
    """A UNet LoRA saved by `PeftModel.save_pretrained`: names without prefix, rank and alpha in
    adapter_config.json.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(file.parent))
    if config.peft_type != "LORA":
        raise ValueError(f"its peft_type is {config.peft_type}, not LORA")
    inject_adapter_in_model(config, unet, "default")
    state = {k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}
    strangers = set_peft_model_state_dict(unet, state, "default").unexpected_keys
    if strangers:
        raise ValueError(f"it has a weight for {strangers[0]}")


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
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
