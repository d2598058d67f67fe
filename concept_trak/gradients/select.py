"""Which parameters LAYER selects."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import UserError


def select_parameters(
    module: nn.Module, layer: str | Callable[[str], bool]
) -> dict[str, nn.Parameter]:
    """Parameters whose name contains `layer` ("" selects all, "attn2.to_k|attn2.to_v" either), or
    for which it returns True.

    The order is that of `named_parameters`, which is the coordinate order of the projection; a
    parameter of several names has the first and is selected by any. UserError if none matches. In a
    model with a LoRA a string means what it means without it: the base weights, in the same order.
    Only an alternative that contains "lora" selects the LoRA's: "lora" all of them,
    "to_k.lora|to_v.lora" those of keys and values, "attn2|lora" both kinds.
    """
    match = (
        layer
        if callable(layer)
        else lambda name: any(_names(part, name) for part in layer.split("|"))
    )
    every = list(module.named_parameters(remove_duplicate=False))
    wanted = {id(p) for name, p in every if match(name)}
    chosen = {name: p for name, p in module.named_parameters() if id(p) in wanted}
    if not chosen:
        kinds = sorted(
            {part for name, _ in every for part in name.split(".")[:-1] if not part.isdigit()}
        )
        raise UserError(
            f"LAYER={layer!r} matches no parameter of the model; set LAYER to one of "
            f"{', '.join(kinds)}"
        )
    return chosen


def _names(part: str, name: str) -> bool:
    """Whether an alternative of `select_parameters` selects a name; peft calls the layer it wraps
    `base_layer`.
    """
    return part in name.replace(".base_layer.", ".") and (".lora_" not in name or "lora" in part)
