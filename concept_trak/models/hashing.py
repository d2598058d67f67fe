"""What makes a model another model: its weights, and how they are read (the configurations of its
parts, its schedule, its tokenizer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..validated_io import read_json, read_text
from .model_files import restore_hint
from .pipelines import part_folder

# Stores made before the reading was hashed name a model by its weights alone. This is the reading
# of the committed model: under it the weights alone are the identity still, so that its committed
# rows stay valid; under any other reading, and for any other model, both count.
COMMITTED = "db009b6998033fcec2cbe7b94a547125b72ed4a253f67cb6a9678926daccfec8"
PARTS = ("unet", "text_encoder", "vae", "scheduler", "tokenizer")
ENCODERS = ("text_encoder", "vae", "tokenizer")
IGNORED_KEYS = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "is_local",
    "local_files_only",
    "backend",
)


def weights_hash(parts: Iterable[nn.Module]) -> str:
    """sha256 over the weights (names, shapes, fp16 bytes) and LoRA scales of networks: the same in
    fp32 and fp16.
    """
    whole = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()):
            whole.update(f"{name}{tuple(tensor.shape)}".encode())
            value = tensor.detach().cpu()
            value = value.half() if value.is_floating_point() else value
            whole.update(value.numpy().tobytes())
        for name, module in part.named_modules():
            # a LoRA's alpha / rank is not among the tensors
            if isinstance(getattr(module, "scaling", None), dict):
                whole.update(f"{name}{sorted(module.scaling.items())}".encode())
    return whole.hexdigest()


def config_hash(pipe: Any, parts: Iterable[str] = PARTS) -> str:
    """Over what the text files of a pipeline's parts say; empty for a pipeline that was not loaded
    from a folder (nor the hub, whose folder is in its cache).
    """
    folder = part_folder(pipe, "unet").parent
    if not (folder / "unet/config.json").is_file():
        return ""
    files = (p for part in sorted(parts) for p in sorted((folder / part).glob("*")))
    said = {str(p.relative_to(folder)): v for p in files if (v := _read_config(p)) is not None}
    return hash_of(said)


def loaded_configs(pipe: Any) -> dict[str, dict[str, Any]]:
    """{part: its configuration, JSON} of a pipeline in memory, whatever it was loaded from."""
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "scheduler")}
    found = {}
    for name, part in parts.items():
        config = part.config
        said = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        found[name] = _deciding(json.loads(json.dumps(said, default=str)))
    return found


def hash_of(value: Any) -> str:
    """sha256 hex of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_config(path: Path) -> Any:
    """What a file says of how the model works, JSON; None for one that says nothing of it."""
    if path.suffix == ".txt":
        return read_text(path, restore_hint(path))
    if path.suffix != ".json" or path.name.endswith(".index.json"):
        return None
    said = read_json(path, restore_hint(path), object)
    if not isinstance(said, dict):
        return said
    return _deciding(said)


def _deciding(said: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in said.items() if not k.startswith("_") and k not in IGNORED_KEYS}
