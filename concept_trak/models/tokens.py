"""Words learned elsewhere: an embedding from a file becomes a token of the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..settings import TOKEN
from .text_to_image import TextToImage


def load_token(model: TextToImage, path: str | Path, token: str = TOKEN) -> None:
    """Give `model` a learned token: our safetensors, or a {name: embedding [d] or [1, d]} of
    diffusers or Custom Diffusion (.bin, .pt).

    It becomes `token` whatever its name in the file; a token loaded before is replaced. A pickle is
    only read as far as it holds tensors. UserError when the file is missing, unreadable, holds code
    or several tokens, or does not fit the text encoder.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"the token file {path} does not exist; train it with train-token or give the path of "
            "a new1.bin"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # about a pickle's version: it is read or refused
            content = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); copy or train it again"
        ) from None
    # a damaged pickle raises almost anything; one that asks for code, an UnpicklingError
    except Exception as error:
        reason = (
            "holds more than tensors"
            if "weights_only" in str(error) or "Unsupported" in str(error)
            else "is damaged"
        )
        raise UserError(
            f"{path} {reason}, so it is not loaded ({type(error).__name__}); give a file with "
            f"{{token: embedding}} only"
        ) from None
    values = list(content.values()) if isinstance(content, dict) else []
    if (
        len(values) != 1
        or not isinstance(values[0], torch.Tensor)
        or not values[0].is_floating_point()
    ):
        raise UserError(
            f"{path} holds {len(values)} entries instead of one embedding; give a file with "
            f"{{token: embedding}} of one token"
        )
    embedding = values[0]
    try:
        model.add_token(
            token, embedding[0] if embedding.dim() == 2 and len(embedding) == 1 else embedding
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
