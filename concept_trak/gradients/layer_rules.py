"""How each kind of layer's per-sample gradient follows from its input a and the gradient delta of
its output. A layer of another kind that is small enough is differentiated sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError

# What a rule yields: ("weight", (delta [B, P, out], a [B, P, in])) or (name, values [B, n]).
Factors = Iterator[tuple[str, Any]]


def _linear(module: nn.Linear, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    delta, a = (x.flatten(1, -2) if x.dim() > 2 else x[:, None] for x in (delta, a))
    yield "weight", (delta, a)
    yield "bias", delta.sum(1)


def _conv(module: Any, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    patches, delta = _patches(module, a), delta.flatten(2).transpose(1, 2)
    if module.groups == 1:
        yield "weight", (delta, patches)
    else:  # an outer product a group
        delta, patches = (x.unflatten(2, (module.groups, -1)) for x in (delta, patches))
        yield "weight", torch.einsum("bpgo,bpgi->bgoi", delta, patches).flatten(1)
        delta = delta.flatten(2)
    yield "bias", delta.sum(1)


def _patches(module: Any, a: torch.Tensor) -> torch.Tensor:
    """[B, P, channels * kernel]: what each output position of a convolution sees."""
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        if not isinstance(module.padding, str):  # the common case by the faster kernel
            shape = module.kernel_size, module.dilation, module.padding, module.stride
            return F.unfold(a, *shape).transpose(1, 2)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    a = F.pad(a, module._reversed_padding_repeated_twice, mode)
    axes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for axis, (size, dilation, stride) in enumerate(axes, 2):
        a = a.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    a = a.flatten(2, len(module.kernel_size) + 1)  # [B, channels, P, *kernel]
    return a.transpose(1, 2).flatten(2)


def _norm(module: nn.Module, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    if isinstance(module, nn.GroupNorm):
        x_hat, dims = F.group_norm(a, module.num_groups, eps=module.eps), tuple(range(2, a.dim()))
    else:
        norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        x_hat = norm(a, module.normalized_shape, eps=module.eps)
        dims = tuple(range(1, a.dim() - len(module.normalized_shape)))

    def total(x: torch.Tensor) -> torch.Tensor:
        return (x.sum(dims) if dims else x).flatten(1)

    yield "weight", total(delta * x_hat)
    yield "bias", total(delta)


def _embedding(module: nn.Embedding, index: torch.Tensor, delta: torch.Tensor) -> Factors:
    batch, width = delta.shape[0], delta.shape[-1]
    rows = torch.zeros(batch, module.num_embeddings, width, device=delta.device)
    flat = index.reshape(batch, -1, 1).expand(-1, -1, width)
    rows.scatter_add_(1, flat, delta.reshape(batch, -1, width))
    if module.padding_idx is not None:
        rows[:, module.padding_idx] = 0
    yield "weight", rows.flatten(1)


def differentiated(module: nn.Module, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    """Any small module of one input: its own VJP, of all samples at once."""
    own = _Bare(module).named_parameters()
    params = {name: p.detach().float() for name, p in own}

    def of_sample(one: torch.Tensor, by: torch.Tensor) -> dict[str, torch.Tensor]:
        def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(_Bare(module), values, (one[None],))[0]

        return torch.func.vjp(run, params)[1](by)[0]

    try:
        found = torch.func.vmap(of_sample)(a, delta)
    except RuntimeError as error:
        raise UserError(
            f"{type(module).__name__} cannot be differentiated a sample at a time; choose another "
            "LAYER"
        ) from error
    for name, value in found.items():
        yield name.removeprefix("bare."), value.flatten(1)


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, bare: nn.Module) -> None:
        super().__init__()
        self.bare = bare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the module's own forward makes of x."""
        return self.bare.forward(x)


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
RULES: dict[type[nn.Module], Callable[..., Factors]] = {
    nn.Linear: _linear,
    **dict.fromkeys(CONVOLUTIONS, _conv),
    nn.GroupNorm: _norm,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.Embedding: _embedding,
}
SMALL = 2**20  # parameters of a module without a rule of its own: their rows are dense


def rule_of(module: nn.Module) -> Callable[..., Factors] | None:
    """What makes the rows of a module's own weight and bias; None where nothing does.

    A class that inherits from one of RULES and computes something else has, where it is small, what
    any small module has.
    """
    own = dict(module.named_parameters(recurse=False))
    kind = next((k for k in RULES if isinstance(module, k)), None)
    if not all(p.is_floating_point() for p in own.values()):
        return None
    if kind and type(module).forward is kind.forward and own.keys() <= {"weight", "bias"}:
        return RULES[kind]
    if sum(p.numel() for p in own.values()) <= SMALL and not list(module.children()):
        return differentiated
    return RULES[kind] if kind else None
