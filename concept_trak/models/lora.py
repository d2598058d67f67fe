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
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..process import log
from ..validated_io import parse_json, read_json, read_safetensors
from .model_files import header

CONFIG, PEFT = "adapter_config.json", "base_model.model."  # of peft: beside its file; in its names
# The names of diffusers and of peft, which are taken where there are several files.
NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PARTS = ("unet", "text_encoder")
HALF = re.compile(r"(.*lora.*[._])(A|B|down|up)((?:\.default)?\.weight)")
OTHERS = {  # in a weight's name: what it is of
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon in CP decomposition",
    "oft_": "OFT",
    "vera_": "VeRA",
    "on_input": "IA3",
    ".diff": "difference of whole weights",
    "bundle_emb": "LoRA with words of its own",
}
PLAIN = re.compile(r"[\w.^$-]*", re.ASCII)  # a name, as peft's patterns are: no search in it
MOST_SCALE = 1e4
MEND = "set LORA_PATH to a whole one"


def load_lora(pipe: Any, path: str) -> None:
    """Add the LoRA of a safetensors file or folder (diffusers, kohya or peft layout) to UNet and
    text encoder of `pipe`.

    UserError when peft is not installed, the file is missing or a pickle, or not every weight of it
    finds its place.
    """
    files = lora_files(Path(path))
    if importlib.util.find_spec("peft") is None:
        remedy = "install it with: pip install peft"
        raise UserError(f"the LoRA {path} needs the package peft; {remedy}")
    wanted = 0
    for file, part in files:
        weights = read_safetensors(file, MEND)
        refuse_other_kinds(file, weights)
        wanted += sum(v.numel() for name, v in weights.items() if not name.endswith(".alpha"))
        try:
            with quiet_diffusers():
                insert(pipe, file, weights, part)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever diffusers and peft raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"cannot use the LoRA {file} with this model: {reason}; set LORA_PATH to another"
            ) from error
    parts = (pipe.unet, pipe.text_encoder)
    placed = {name: p for part in parts for name, p in part.named_parameters() if "lora_" in name}
    if any("magnitude" in name for name in placed):
        raise UserError(told_kind(Path(path), "DoRA"))
    if (count := sum(p.numel() for p in placed.values())) != wanted:
        reason = f"{count} of its {wanted} numbers have a place in this model"
        remedy = "give LORA_PATH a plain LoRA of this base model"
        raise UserError(f"the LoRA {path} does not fit: {reason}; {remedy}")
    for scaling in (getattr(m, "scaling", None) for part in parts for m in part.modules()):
        scale = scaling.get("default", 1.0) if isinstance(scaling, dict) else 1.0
        if not math.isfinite(scale) or not 0 < abs(scale) < MOST_SCALE:
            told = f"multiplies its weights by {scale:g} (alpha / rank)"
            raise UserError(f"the LoRA {path} {told}; {MEND}")
    if not any(p.any() for name, p in placed.items() if "lora_B" in name):
        log(f"{path}: its second factors are all zero, so it changes nothing that is predicted")
    for p in placed.values():
        p.data = p.data.to(pipe.unet.dtype)  # it comes in the dtype of its file


def lora_files(path: Path) -> list[tuple[Path, str]]:
    """(safetensors file, part that it is of or empty) that `path` is or holds: one, or those of
    unet/ and text_encoder/. UserError when there is none, several, or only a pickle.
    """
    if not path.exists():
        remedy = "set LORA_PATH to a safetensors file, or a folder that holds one"
        raise UserError(f"LORA_PATH={path} does not exist; {remedy}")
    files = safetensors_in(path) if path.is_dir() else [path]
    files = [f for name in NAMES for f in files if f.name.lower() == name][:1] or files
    if len(files) > 1:
        remedy = f"give LORA_PATH one of them, e.g. {files[0]}"
        raise UserError(f"{path} holds {len(files)} safetensors files; {remedy}")
    if not files and (found := {p: lora_files(path / p) for p in PARTS if (path / p).is_dir()}):
        return [(file, part) for part, inner in found.items() for file, _ in inner]
    if not files and (inner := [f for p in sorted(path.iterdir()) for f in safetensors_in(p)]):
        raise UserError(f"{path} holds no LoRA itself; set LORA_PATH to one below it: {inner[0]}")
    if not files or files[0].suffix.lower() != ".safetensors":
        reason = "is no safetensors file and holds none; loading a pickle can run code"
        raise UserError(f"{path} {reason}, so set LORA_PATH to the LoRA as safetensors")
    return [(files[0], "")]


def safetensors_in(folder: Path) -> list[Path]:
    """Its files of that ending, in small or capital letters; none of what is no folder."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f for f in there if f.suffix.lower() == ".safetensors" and not f.name.startswith(".")]


def told_kind(file: Path, kind: str) -> str:
    """What is said of an adapter that is no plain LoRA."""
    reason = f"is a {kind}, which has no per-sample gradient rule here"
    return f"{file} {reason}; give LORA_PATH a plain LoRA"


def refuse_other_kinds(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """UserError for what is no LoRA of whole pairs A, B (down, up)."""
    for name in weights:
        for mark, kind in OTHERS.items():
            if mark in name:
                raise UserError(told_kind(file, kind))
    halves: dict[tuple[str, str], list[str]] = {}
    for name, value in weights.items():
        if found := HALF.fullmatch(name):
            halves.setdefault((found[1], found[3]), []).append(found[2])
            if not value.is_floating_point() or value.dim() < 2 or not value.numel():
                told = f"{value.dtype} of shape {list(value.shape)}"
                raise UserError(f"{file}: {name} is {told}, no factor of a LoRA; {MEND}")
    if not halves:
        raise UserError(f"{file} holds no weights of a LoRA; {MEND}")
    for (stem, end), there in halves.items():
        if sorted(there) not in (["A", "B"], ["down", "up"]):
            raise UserError(f"{file} has {stem}{there[0]}{end} without its other half; {MEND}")


def ranks_of(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """{what stands before the half's name: rank}."""
    found = ((HALF.fullmatch(name), value) for name, value in weights.items())
    return {half[1]: len(value) for half, value in found if half and half[2] in ("A", "down")}


def refuse_config(config: dict[str, Any], most: int, where: str) -> None:
    """UserError for ranks that the weights do not have, which would be allocated first, and for
    patterns that could search without end. most: the highest rank of the weights.
    """
    for key, value in ((key.rpartition(".")[2], value) for key, value in config.items()):
        ranks = [value] if key == "r" else []
        ranks = list(value.values()) if key == "rank_pattern" and value else ranks
        if bad := [r for r in ranks if type(r) is not int or not 1 <= r <= most]:
            told = f"has the rank {str(bad[0])[:40]}, its weights {most}"
            raise UserError(f"{where} {told}; {MEND}")
        if key.endswith(("_pattern", "_modules")) and value:
            names = [value] if isinstance(value, str) else list(map(str, value))
            if odd := [name for name in names if not PLAIN.fullmatch(name)]:
                raise UserError(f"{where}: {key} has the pattern {odd[0][:60]!r}; {MEND}")


def insert(pipe: Any, file: Path, weights: dict[str, torch.Tensor], part: str) -> None:
    """Put the layers of one file into `pipe`; raises whatever diffusers and peft do when they do
    not fit. part: which they are of; empty: told by their names.
    """
    most = max(ranks_of(weights).values(), default=1)
    if any(name.startswith(PEFT) for name in weights):
        return insert_peft(pipe, file, weights, part)
    told = header(file).get("__metadata__", {}).get("lora_adapter_metadata")
    if told:
        refuse_config(parse_json(told, f"{file}'s metadata", MEND, dict), most, str(file))
    options = {"use_safetensors": True, "local_files_only": True, "adapter_name": "default"}
    with tempfile.TemporaryDirectory() as folder:  # the ending has to be in small letters
        (Path(folder) / NAMES[0]).symlink_to(file.resolve())
        pipe.load_lora_weights(folder, weight_name=NAMES[0], **options)


def insert_peft(pipe: Any, file: Path, weights: dict[str, torch.Tensor], part: str) -> None:
    """A LoRA of one network saved by `PeftModel.save_pretrained`: names without prefix, rank and
    alpha in adapter_config.json. Which layers it is of, its weights say.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    said = read_json(file.parent / CONFIG, MEND)
    if (kind := said.get("peft_type")) != "LORA":
        raise UserError(told_kind(file, str(kind)[:40]))
    state = {k.removeprefix(PEFT): v for k, v in weights.items()}
    part = part or ("text_encoder" if any(".self_attn." in k for k in state) else "unet")
    network = getattr(pipe, part)
    if part == "text_encoder":  # named otherwise by other releases of transformers
        prefix = "text_model."
        has = any(name.startswith(prefix) for name, _ in network.named_modules())
        state = {prefix * has + k.removeprefix(prefix): v for k, v in state.items()}
    ranks = {name.removesuffix(".lora_"): rank for name, rank in ranks_of(state).items()}
    layers = {"target_modules": sorted(ranks), "exclude_modules": None}
    refuse_config(said | layers, max(ranks.values()), str(file.parent / CONFIG))
    config = LoraConfig.from_pretrained(str(file.parent))
    config.target_modules, config.exclude_modules = set(ranks), None
    inject_adapter_in_model(config, network, "default")
    strangers = set_peft_model_state_dict(network, state, "default").unexpected_keys
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
