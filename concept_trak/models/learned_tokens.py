"""Words learned elsewhere: an embedding from a file becomes a token of the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..settings import TOKEN
from ..validated_io import read_safetensors
from .text_to_image import TRAIN_TOKEN, TextToImage


def load_token(model: TextToImage, path: str | Path, token: str = TOKEN) -> None:
    """Give `model` a learned token: our safetensors, or a file of diffusers, Custom Diffusion, the
    webui or kohya's scripts, see `embedding_of`.

    It becomes `token` whatever its name in the file; a token loaded before is replaced. UserError
    when the file is missing, unreadable, holds code or several tokens, or does not fit the text
    encoder.
    """
    path = Path(path)
    if not path.is_file():
        remedy = f"give the path of a new1.bin, or {TRAIN_TOKEN}"
        raise UserError(f"the token file {path} does not exist; {remedy}")
    content = read_tensors(path)
    rows = embedding_of(content)
    if rows is None:
        found = f"{len(content)} entries" if isinstance(content, dict) else type(content).__name__
        names = ", ".join(map(str, content))[:60] if isinstance(content, dict) else ""
        told = f"holds {found} ({names}) instead of one embedding"
        raise UserError(
            f"{path} {told}; give a file with {{token: embedding}} of one token, or {TRAIN_TOKEN}"
        )
    try:
        model.add_token(token, rows)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def embedding_of(content: Any) -> torch.Tensor | None:
    """The embedding, [d] or [n, d] of several vectors, of a file's content; None for another.

    One of {token: embedding}; {"<x>": [d], "<x>_1": [d], ...}, how diffusers names several;
    {"emb_params": [n, d]}, kohya's; {"string_to_param": {"*": [n, d]}, ...}, the webui's.
    """
    if not isinstance(content, dict) or not content:
        return None
    values = content.get("string_to_param", content)
    values = dict(values) if isinstance(values, Mapping) else {}
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values.values()):
        return None
    first = min(values, key=lambda name: len(str(name)), default="")
    names = [first, *(f"{first}_{i}" for i in range(1, len(values)))]
    if len(values) == 1:
        return values[first]
    if set(names) != set(values) or any(v.shape != values[first].shape for v in values.values()):
        return None
    return torch.stack([values[name].flatten() for name in names])


def read_tensors(path: Path) -> Any:
    """Content of a safetensors file, or of a pickle as far as that holds tensors. UserError when it
    is damaged or holds more.
    """
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path, f"copy it again, or {TRAIN_TOKEN}")
    try:
        with warnings.catch_warnings():
            # about a pickle's version: it is read or refused
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    # a damaged pickle raises almost anything; one that asks for code, an UnpicklingError
    except Exception as error:
        more = "weights_only" in str(error) or "Unsupported" in str(error)
        reason = "holds more than tensors" if more else "is damaged"
        remedy = f"give a file with {{token: embedding}} only, or {TRAIN_TOKEN}"
        told = f"so it is not loaded ({type(error).__name__}); {remedy}"
        raise UserError(f"{path} {reason}, {told}") from None
