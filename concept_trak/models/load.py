"""The model of a folder or hub id, whichever kind it is."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .class_conditional import is_class_conditional, load_class_conditional
from .text_to_image import DTYPES, load_pipeline


def load_model(source: str, device: str = "cpu", dtype: str = "fp32", lora_path: str = "") -> Any:
    """A `TextToImage`, or a `ClassConditional`, which answers to the same.

    UserError as either loader raises it, or for a LoRA on a class-conditional model.
    """
    if not is_class_conditional(source):
        return load_pipeline(source, device, dtype, lora_path)
    if lora_path:
        raise UserError(
            "LORA_PATH is for Stable Diffusion; a class-conditional model takes none: unset "
            "LORA_PATH"
        )
    return load_class_conditional(source, device, DTYPES[dtype])
