"""A judge on the disk: model.safetensors (float16) and judge.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ...errors import UserError
from ...files import disk_errors, sha256_file, write_bytes, write_json
from .net import Judge, JudgeSettings


def save_judge(judge: Judge, folder: str | Path, facts: dict[str, Any]) -> None:
    """Write the weights, and as JSON classes, settings, the weights' sha256 and `facts`."""
    folder = Path(folder)
    path = folder / "model.safetensors"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    half = {k: _as(torch.float16, v).contiguous() for k, v in judge.state_dict().items()}
    write_bytes(path, save(half))
    classes = {"objects": judge.objects, "styles": judge.styles, "settings": asdict(judge.settings)}
    write_json(folder / "judge.json", classes | {"weights_sha256": sha256_file(path)} | facts)


def load_judge(folder: str | Path) -> Judge:
    """Read what `save_judge` wrote. Raises UserError if a file is missing, or the weights fit
    neither judge.json nor the code.
    """
    folder = Path(folder)
    for name in ("judge.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no judge at {folder}: {name} is missing; make it with train-judge")
    facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    path = folder / "model.safetensors"
    if sha256_file(path) != facts["weights_sha256"]:
        reason = "is not what judge.json describes; make the judge again with train-judge"
        raise UserError(f"{path} {reason}")
    weights = {k: _as(torch.float32, v) for k, v in load_file(path).items()}
    try:
        judge = Judge(facts["objects"], facts["styles"], JudgeSettings(**facts["settings"]))
        judge.load_state_dict(weights)
    except (TypeError, RuntimeError):  # a setting or a layer that this code does not have
        reason = "was made by another version of the code; make it again with train-judge"
        raise UserError(f"the judge at {folder} {reason}") from None
    return judge.eval()


def _as(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value
