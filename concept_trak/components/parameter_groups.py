"""What a weight of a denoiser is for, and how its scalars are grouped.

A component is a weight with two dimensions or more (biases and norms are never edited). Its role
follows from the module that owns it, not from a substring of its name:

    feed_forward                        the linear maps of a transformer's feed-forward block
    self_attention.q .k .v .out         attention of the picture to itself
    cross_attention.q .k .v .out        attention to the prompt
    convolution, time, projection       3x3 and 1x1 convolutions; what feeds the timestep; the rest

Granularities group the scalars of one component: scalar, row (an output neuron), column (an input),
head (rows of q, k, v; columns of out) and module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UserError
from ..parsing import KINDS, PAPER, PARTS, check_selection


@dataclass(frozen=True)
class Component:
    """A weight tensor [out, in, ...]. heads: of its attention, 0 where it has none; head_axis: the
    dimension that they split.
    """

    name: str
    weight: nn.Parameter
    role: str
    heads: int = 0
    head_axis: int = 0

    def grouped(self, values: torch.Tensor, granularity: str) -> torch.Tensor:
        """Values of the weight's shape -> [groups, members]; no groups where it has no heads."""
        rows = values.reshape(len(values), -1)
        if granularity == "scalar":
            return values.reshape(-1, 1)
        if granularity == "row":
            return rows
        if granularity == "column":
            return values.transpose(0, 1).reshape(values.shape[1], -1)
        if granularity == "module":
            return values.reshape(1, -1)
        if not self.heads:
            return values.reshape(-1)[:0].reshape(0, 1)
        split = rows if self.head_axis == 0 else rows.transpose(0, 1)
        return split.reshape(self.heads, -1)

    def members(self, groups: torch.Tensor, granularity: str) -> torch.Tensor:
        """Flat positions, ascending, of the scalars of some groups [g]."""
        if granularity == "scalar":
            return groups.sort().values
        places = torch.arange(self.weight.numel()).reshape(self.weight.shape)
        return self.grouped(places, granularity)[groups.cpu()].flatten().sort().values


def components(network: nn.Module) -> Iterator[Component]:
    """Every component of a denoiser, in the order of its parameters."""
    roles: dict[str, tuple[str, int, int]] = {}
    for prefix, module in network.named_modules():
        if hasattr(module, "to_q") and hasattr(module, "to_k"):
            kind = KINDS[int(_is_cross(prefix, module))]
            for part, letter in PARTS.items():
                heads = int(getattr(module, "heads", 0)), int(letter == "out")
                roles[f"{prefix}.{part}."] = (f"{kind}.{letter}", *heads)
        elif type(module).__name__ == "FeedForward":
            roles[f"{prefix}."] = ("feed_forward", 0, 0)
        elif type(module).__name__ == "TimestepEmbedding":
            roles[f"{prefix}."] = ("time", 0, 0)
        elif prefix.endswith("time_emb_proj"):
            roles[f"{prefix}."] = ("time", 0, 0)
    for name, weight in network.named_parameters():
        if weight.dim() < 2:
            continue
        found = [role for prefix, role in roles.items() if name.startswith(prefix)]
        rest = "convolution" if weight.dim() > 2 else "projection"
        yield Component(name, weight, *(found[-1] if found else (rest, 0, 0)))


def _is_cross(prefix: str, module: nn.Module) -> bool:
    """Whether an attention looks at the prompt; diffusers says so, else its usual name does."""
    told = getattr(module, "is_cross_attention", None)
    return prefix.endswith("attn2") if told is None else bool(told)


def select(network: nn.Module, selection: str) -> list[Component]:
    """The components that a SELECTION names: roles, or "cross_attention" for all of its parts.

    `paper` is the feed-forward matrices. UserError for what is no role, or matches nothing.
    """
    check_selection(selection)
    wanted = [part.strip() for part in selection.split("|")]
    wanted = ["feed_forward" if part == PAPER else part for part in wanted]
    chosen = [
        c for c in components(network) if {"all", c.role, c.role.partition(".")[0]} & set(wanted)
    ]
    if not chosen:
        there = ", ".join(dict.fromkeys(c.role for c in components(network)))
        raise UserError(
            f"SELECTION={selection} matches no weight of this model; set SELECTION to one or "
            f"several of {there or 'another model'}"
        )
    return chosen
