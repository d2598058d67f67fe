"""What a pipeline's folder is before any of it is loaded: whether it is one, and how large its
network. Reads JSON and the headers of safetensors; needs no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UserError, restoration
from ..reading import read_json
from ..settings import EMOJI

MOST_LAYERS, MOST = 1000, 2**24  # in a network's configuration: of layers, of anything
COMMITTED = Path(EMOJI["sd_model_path"])
MOST_HEADER = 2**26  # bytes of a safetensors header


def is_local(source: str) -> bool:
    """Whether a folder is meant; "owner/name" that does not exist here is a hub id."""
    if Path(source).exists() or source.startswith("."):
        return True
    return source.count("/") != 1 or source.startswith("/")


def copy_again(path: str | Path) -> str:
    """What mends a file of a model: the committed one is in the repository."""
    if Path(path).resolve().is_relative_to(COMMITTED):
        return restoration(COMMITTED)
    return "copy or download the model again, or set SD_MODEL_PATH to another"


def refuse_other_folder(folder: Path, variable: str = "SD_MODEL_PATH") -> None:
    """UserError for a folder that is no pipeline, or holds what is neither file nor folder: a pipe
    would keep the run waiting, a device would never end.
    """
    if not (folder / "model_index.json").exists():
        reason = "is not a diffusers pipeline folder (no model_index.json)"
        raise UserError(f"{folder} {reason}; give {variable} a folder or a hub id")
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file; {copy_again(path)}")
    for path in folder.glob("*/config.json"):
        refuse_endless(read_json(path, copy_again(path)), str(path))


def refuse_endless(config: Any, where: str, key: str = "") -> None:
    """UserError for a size in a network's configuration that none has: to build it would take
    forever.
    """
    items = config.items() if isinstance(config, dict) else ()
    items = [(key, value) for value in config] if isinstance(config, list) else items
    for inner, value in items:
        refuse_endless(value, where, str(inner))
    if isinstance(config, int) and config > (MOST_LAYERS if "layers" in key else MOST):
        raise UserError(f"{where}: {key}={str(config)[:40]} is too large; {copy_again(where)}")


def unet_size(folder: Path) -> tuple[int, int] | None:
    """(parameters, side of a latent) of a pipeline's UNet; None where its files do not tell."""
    try:
        side = read_json(folder / "unet/config.json", copy_again(folder))["sample_size"]
        shapes = [
            shape for file in (folder / "unet").glob("*.safetensors") for shape in _shapes(file)
        ]
        return (sum(map(math.prod, shapes)), int(side)) if shapes else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _shapes(file: Path) -> list[list[int]]:
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"{file} has a header of {size} bytes")
        header = json.loads(opened.read(size))
    return [about["shape"] for name, about in header.items() if name != "__metadata__"]
