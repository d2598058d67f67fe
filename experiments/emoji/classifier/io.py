"""A judge on the disk: model.safetensors (float16) and judge.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from concept_trak.atomic_io import disk_errors, sha256_file, write_bytes, write_json
from concept_trak.errors import UserError, script_hint
from concept_trak.validated_io import read_json, read_safetensors

from .net import EmojiClassifier, EmojiClassifierSettings

AGAIN = (
    "bring back the committed one, git checkout -- data/emoji/judge, or make the judge again (two "
    f"hours on one core): {script_hint('emoji/train_judge.sh')}"
)


def save_judge(judge: EmojiClassifier, folder: str | Path, facts: dict[str, Any]) -> None:
    """Write the weights, and as JSON classes, settings, the weights' sha256 and `facts`."""
    folder = Path(folder)
    path = folder / "model.safetensors"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    half = {k: _as(torch.float16, v).contiguous() for k, v in judge.state_dict().items()}
    write_bytes(path, save(half))
    classes = {"objects": judge.objects, "styles": judge.styles, "settings": asdict(judge.settings)}
    write_json(folder / "judge.json", classes | {"weights_sha256": sha256_file(path)} | facts)


def load_judge(folder: str | Path) -> EmojiClassifier:
    """Read what `save_judge` wrote. Raises UserError if a file is missing, or the weights fit
    neither judge.json nor the code.
    """
    folder = Path(folder)
    for name in ("judge.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no judge at {folder}: {name} is missing; {AGAIN}")
    facts, path = read_json(folder / "judge.json", AGAIN), folder / "model.safetensors"
    if sha256_file(path) != facts.get("weights_sha256"):
        raise UserError(f"{path} is not what judge.json describes; {AGAIN}")
    weights = {k: _as(torch.float32, v) for k, v in read_safetensors(path, AGAIN).items()}
    try:
        judge = EmojiClassifier(
            facts["objects"], facts["styles"], EmojiClassifierSettings(**facts["settings"])
        )
        judge.load_state_dict(weights)
    # a setting or a layer that this code does not have, or a value that none can have
    except (TypeError, RuntimeError, KeyError, ValueError, ArithmeticError):
        reason = f"was made by another version of the code; {AGAIN}"
        raise UserError(f"the judge at {folder} {reason}") from None
    return judge.eval()


def _as(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value
