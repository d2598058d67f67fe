"""What a pipeline's folder is before any of it is loaded: whether it is one, which of its files
hold the weights, and how large its network is. Reads JSON and the headers of safetensors; needs no
torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, git_restore_hint
from ..parsing import nearest
from ..settings import EMOJI
from ..validated_io import read_json, safe_join

MOST_LAYERS, MOST = 1000, 2**24  # in a network's configuration: of layers, of anything
MOST_SIDE = 2**12  # of a latent
COMMITTED = Path(EMOJI["sd_model_path"])
MOST_HEADER = 2**26  # bytes of a safetensors header
INDEX = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# The networks of a pipeline, and how the files of their weights begin.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# The variants that are taken where the plain weights are missing, the first that is there; those
# that a training goes on from last.
VARIANTS = ("fp16", "bf16", "fp32", "ema")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_local(source: str) -> bool:
    """Whether a folder is meant: what exists here, or cannot be a hub id ("owner/name")."""
    return Path(source).exists() or not HUB_ID.fullmatch(source)


def no_folder(source: str) -> str:
    """ "no such folder: my_modle (there is my_model)"."""
    path, near = Path(source), []
    if path.parent.is_dir():
        near = nearest(path.name, sorted(p.name for p in path.parent.iterdir() if p.is_dir()), 1)
    return f"no such folder: {source}" + (f" (there is {path.parent / near[0]})" if near else "")


def restore_hint(path: str | Path) -> str:
    """What mends a file of a model: the committed one is in the repository."""
    if Path(path).resolve().is_relative_to(COMMITTED):
        return git_restore_hint(COMMITTED)
    return "copy or download the model again, or set SD_MODEL_PATH to another"


def check_pipeline_folder(folder: Path, variable: str = "SD_MODEL_PATH") -> None:
    """UserError for a folder that is no pipeline, or holds what is neither file nor folder: a pipe
    would keep the run waiting, a device would never end.
    """
    if not folder.is_dir():
        loaded = f"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{folder}"
        raise UserError(
            f"{folder} is a single file; make a pipeline's folder of it and set {variable}=model: "
            f"python -c \"{loaded}').save_pretrained('model')\""
        )
    if not (folder / INDEX).exists():
        reason = f"is not a diffusers pipeline folder (no {INDEX})"
        raise UserError(f"{folder} {reason}; give {variable} a folder or a hub id")
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file; {restore_hint(path)}")
    for path in folder.glob("*/config.json"):
        check_config_sizes(read_json(path, restore_hint(path)), str(path))


def check_config_sizes(config: Any, where: str, key: str = "") -> None:
    """UserError for a size in a network's configuration that none has: to build it would take
    forever.
    """
    items = config.items() if isinstance(config, dict) else ()
    items = [(key, value) for value in config] if isinstance(config, list) else items
    for inner, value in items:
        check_config_sizes(value, where, str(inner))
    if isinstance(config, int) and config > (MOST_LAYERS if "layers" in key else MOST):
        raise UserError(f"{where}: {key}={str(config)[:40]} is too large; {restore_hint(where)}")


def side_of(unet: Mapping[str, Any]) -> int:
    """Side of a latent, of a UNet's configuration. ValueError where that tells none, or none that
    is square.
    """
    side = unet.get("sample_size")
    if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    if type(side) is not int or not 1 <= side <= MOST_SIDE:
        raise ValueError(f"sample_size={str(side)[:40]} is not the side of a square latent")
    return side


def weight_files(names: Iterable[str], part: str) -> tuple[str, list[str]]:
    """(variant, files) of a network among the names of its folder: those that are loaded. The plain
    ones have the variant ""; another one is taken only where they are missing. ([] for none.)
    """
    names, stem = sorted(names), STEMS[part]
    shard = r"-\d{5}-of-\d{5}"
    found: dict[str, list[str]] = {}
    for name in names:
        whole = re.fullmatch(rf"{stem}(?:\.(\w+))?\.safetensors", name)
        listed = re.fullmatch(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", name)
        if whole:
            found.setdefault(whole[1] or "", [name])
        if listed:
            v = rf"\.{listed[1]}" if listed[1] else ""
            piece = re.compile(rf"{stem}(?:{v}{shard}|{shard}{v})\.safetensors")
            found[listed[1] or ""] = [name, *filter(piece.fullmatch, names)]
    order = ["", *VARIANTS, *(v for v in found if v not in VARIANTS)]
    variant = next((v for v in order if v in found), "")
    return variant, found.get(variant, [])


def weights(folder: Path, part: str) -> tuple[str, list[Path]]:
    """(variant, safetensors) of a network of a pipeline's folder that are loaded; [] for none.
    UserError for an index of shards that is none, or names a file that is missing or elsewhere.
    """
    place = folder / part
    names = [p.name for p in place.iterdir() if p.exists()] if place.is_dir() else []
    variant, files = weight_files(names, part)
    if not files or not files[0].endswith(".json"):
        return variant, [place / name for name in files]
    index = read_json(place / files[0], restore_hint(folder))
    shards = index.get("weight_map")
    listed = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    paths = [safe_join(place, name, f"{place / files[0]}: the shard") for name in listed]
    if lacking := [path for path in paths if not path.is_file()]:
        raise UserError(f"{lacking[0]} is missing; {restore_hint(folder)}")
    return variant, paths


def refuse_no_weights(names: Iterable[str], part: str, source: str) -> None:
    """UserError for a network without safetensors, with what makes them of a pickle if there is
    one. names: of its folder.
    """
    names = sorted(names)
    if weight_files(names, part)[1]:
        return
    pickled = [name for name in names if name.endswith(PICKLES)]
    if not pickled:
        raise UserError(f"{source} has no weights in {part}/; {restore_hint(source)}")
    inner = re.search(r"_model\.(\w+)\.bin$", pickled[0])
    plain = any(re.search(r"_model\.bin$", name) for name in pickled)
    given = f", variant='{inner[1]}'" if inner and not plain else ""
    told = f"{source} has the weights of its {part} only as a pickle ({part}/{pickled[0]})"
    load = f"from diffusers import StableDiffusionPipeline as P; P.from_pretrained('{source}'"
    raise UserError(
        f"{told}, which can run code; save it as safetensors and set SD_MODEL_PATH=model: "
        f"python -c \"{load}{given}, safety_checker=None).save_pretrained('model')\""
    )


def unet_size(folder: Path) -> tuple[int, int] | None:
    """(parameters, side of a latent) of a pipeline's UNet, from the files that are loaded; None
    where they do not tell.
    """
    try:
        side = side_of(read_json(folder / "unet/config.json", restore_hint(folder)))
        shapes = [shape for file in weights(folder, "unet")[1] for shape in _shapes(file)]
        return (sum(map(math.prod, shapes)), side) if shapes else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _shapes(file: Path) -> list[list[int]]:
    return [about["shape"] for name, about in header(file).items() if name != "__metadata__"]


def header(file: Path) -> dict[str, Any]:
    """Of a safetensors file. ValueError for one that is none."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"{file} has a header of {size} bytes")
        return json.loads(opened.read(size))
