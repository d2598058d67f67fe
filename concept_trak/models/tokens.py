"""Words learned elsewhere: an embedding from a file becomes a token of the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..reading import read_safetensors
from ..settings import TOKEN
from .text_to_image import TRAIN_TOKEN, TextToImage


def load_token(model: TextToImage, path: str | Path, token: str = TOKEN) -> None:
    """Give `model` a learned token: our safetensors, or a {name: embedding [d] or [1, d]} of
    diffusers or Custom Diffusion (.bin, .pt).

    It becomes `token` whatever its name in the file; a token loaded before is replaced. UserError
    when the file is missing, unreadable, holds code or several tokens, or does not fit the text
    encoder.
    """
    path = Path(path)
    if not path.is_file():
        remedy = f"give the path of a new1.bin, or {TRAIN_TOKEN}"
        raise UserError(f"the token file {path} does not exist; {remedy}")
    content = read_tensors(path)
    values = list(content.values()) if isinstance(content, dict) else []
    is_tensor = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in values]
    if is_tensor != [True]:
        found = f"holds {len(values)} entries instead of one embedding"
        raise UserError(
            f"{path} {found}; give a file with {{token: embedding}} of one token, or {TRAIN_TOKEN}"
        )
    (row,) = values
    try:
        model.add_token(token, row[0] if row.dim() == 2 and len(row) == 1 else row)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_tensors(path: Path) -> Any:
    """Content of a safetensors file, or of a pickle as far as that holds tensors. UserError when it
    is damaged or holds more.
    """
    if path.suffix == ".safetensors":
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
