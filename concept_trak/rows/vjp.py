"""Per-sample vector-Jacobian products g_i = J_theta eps_theta(x_t, t, c)_i^T v_i, without a
parameter-sized buffer per sample.

For a Linear layer y = W a + b the gradient of <v, eps_hat> for one sample is the sum over positions
p

    dW = sum_p delta_p a_p^T,   db = sum_p delta_p,   delta = d<v, eps_hat> / dy

so the layer's input a (kept by a forward hook) and the gradient delta of its output (one
`autograd.grad` for all layers) are enough: "ghost" gradients (Goodfellow 2015; Li et al. 2022).
Conv2d is the same on unfolded patches. A squared norm or a few entries can be had from the factors
alone; `dense()` is only formed when a projection needs every entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


def select_parameters(
    module: nn.Module, layer: str | Callable[[str], bool]
) -> dict[str, nn.Parameter]:
    """Parameters whose name contains `layer` ("" selects all, "attn2.to_k|attn2.to_v" either), or
    for which it returns True.

    The order is that of `named_parameters`, which is the coordinate order of the projection.
    UserError if none matches. In a model with a LoRA a string means what it means without it: the
    base weights, in the same order. Only an alternative that contains "lora" selects the LoRA's:
    "lora" all of them, "to_k.lora|to_v.lora" those of keys and values, "attn2|lora" both kinds.
    """
    match = (
        layer
        if callable(layer)
        else lambda name: any(_names(part, name) for part in layer.split("|"))
    )
    chosen = {name: p for name, p in module.named_parameters() if match(name)}
    if not chosen:
        kinds = sorted(
            {
                part
                for name, _ in module.named_parameters()
                for part in name.split(".")[:-1]
                if not part.isdigit()
            }
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


@dataclass
class OuterProductGrad:
    """Per-sample gradient of one weight matrix as sum_p delta[b, p, :] (x) a[b, p, :]; delta [B, P,
    out], a [B, P, in].
    """

    offset: int  # of this parameter's first coordinate
    delta: torch.Tensor
    a: torch.Tensor

    @property
    def numel(self) -> int:
        return self.delta.shape[-1] * self.a.shape[-1]

    def dense(self) -> torch.Tensor:
        """[B, out * in] float32."""
        return torch.bmm(self.delta.transpose(1, 2), self.a).flatten(1)

    def sq_norm(self) -> torch.Tensor:
        """[B] squared Frobenius norms, by whichever of the two routes costs less."""
        positions, out, inp = self.delta.shape[1], self.delta.shape[2], self.a.shape[2]
        if positions * (out + inp) < out * inp:
            return (
                torch.bmm(self.delta, self.delta.transpose(1, 2))
                * torch.bmm(self.a, self.a.transpose(1, 2))
            ).sum((1, 2))
        return self.dense().square().sum(1)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """[B, m] the entries at flat positions `index` [m]."""
        row, column = index // self.a.shape[-1], index % self.a.shape[-1]
        return (self.delta[:, :, row] * self.a[:, :, column]).sum(1)


@dataclass
class DenseGrad:
    """Per-sample gradient of a small parameter (bias, norm, embedding): values [B, n]."""

    offset: int
    values: torch.Tensor

    @property
    def numel(self) -> int:
        return self.values.shape[1]

    def dense(self) -> torch.Tensor:
        return self.values

    def sq_norm(self) -> torch.Tensor:
        return self.values.square().sum(1)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[:, index]


# What a rule yields: ("weight", (delta [B, P, out], a [B, P, in])) or (name, values [B, n]).
Factors = Iterator[tuple[str, Any]]


def _linear(module: nn.Linear, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    delta, a = (x.flatten(1, -2) if x.dim() > 2 else x[:, None] for x in (delta, a))
    yield "weight", (delta, a)
    yield "bias", delta.sum(1)


def _conv2d(module: nn.Conv2d, a: torch.Tensor, delta: torch.Tensor) -> Factors:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise UserError(
            "per-sample gradients of grouped or specially padded convolutions are not available; "
            "choose another LAYER"
        )
    patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
    delta = delta.flatten(2).transpose(1, 2)
    yield "weight", (delta, patches.transpose(1, 2))
    yield "bias", delta.sum(1)


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
    yield "weight", rows.scatter_add_(1, flat, delta.reshape(batch, -1, width)).flatten(1)


RULES = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _norm,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.Embedding: _embedding,
}


class PerSampleVjp:
    """Hooks on the modules that own the selected parameters; `with` installs them, `vjp` reads the
    per-sample gradients.

    >>> with PerSampleVjp(unet, "attn2") as tape:
    ...     eps_hat = unet(x_t, t, cond).sample
    ...     grads = tape.vjp(eps_hat, cotangent)

    grads: OuterProductGrad and DenseGrad, in coordinate order.

    Raises UserError for a selected parameter that no supported module owns or that the forward did
    not use.
    """

    def __init__(self, module: nn.Module, layer: str | Callable[[str], bool]) -> None:
        self.parameters = select_parameters(module, layer)
        self.offsets, self.input_dim = {}, 0
        for name, p in self.parameters.items():
            self.offsets[name] = self.input_dim
            self.input_dim += p.numel()
        self._owners = {}
        for prefix, sub in module.named_modules():
            owned = [
                n for n, _ in sub.named_parameters(prefix, recurse=False) if n in self.parameters
            ]
            if owned:
                if type(sub) not in RULES and not isinstance(sub, tuple(RULES)):
                    raise UserError(
                        f"no per-sample gradient rule for {owned[0]} ({type(sub).__name__}); "
                        "choose another LAYER"
                    )
                self._owners[prefix] = sub
        self._module, self._calls, self._handles, self._frozen = module, [], [], []

    def __enter__(self) -> PerSampleVjp:
        # Weight gradients are formed from the factors; autograd must not form them as well.
        self._frozen = [p for p in self._module.parameters() if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
        for prefix, sub in self._owners.items():
            self._handles.append(sub.register_forward_hook(self._hook(prefix)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for p in self._frozen:
            p.requires_grad_(True)
        self._handles, self._calls = [], []

    def _hook(self, prefix: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # the graph starts at the first selected layer, not before
                output = output.requires_grad_()
            self._calls.append((prefix, module, args[0].detach(), output))
            return output

        return keep

    def vjp(
        self, eps_hat: torch.Tensor, cotangent: torch.Tensor, samples: int | None = None
    ) -> list[OuterProductGrad | DenseGrad]:
        """Per-sample gradients of <cotangent, eps_hat>; both [B, ...]. Consumes the recorded
        forward.

        samples: when the batch holds several predictions of each sample (all of the first kind,
        then all of the second), their number of samples; the gradients of a sample's predictions
        are summed.
        """
        calls, self._calls = self._calls, []
        seen = {prefix for prefix, *_ in calls}
        missed = [n for n in self.parameters if n.rpartition(".")[0] not in seen]
        if missed:
            raise UserError(
                f"the forward pass did not use {missed[0]} ({len(missed)} selected parameters "
                "unused); choose another LAYER"
            )
        deltas = torch.autograd.grad(eps_hat, [output for *_, output in calls], cotangent)
        grads: dict[str, list] = {name: [] for name in self.parameters}
        for (prefix, module, a, _), delta in zip(calls, deltas, strict=True):
            rule = next(r for kind, r in RULES.items() if isinstance(module, kind))
            a = a if isinstance(module, nn.Embedding) else a.float()
            for kind, value in rule(module, a, delta.float()):
                if f"{prefix}.{kind}" in grads:
                    grads[f"{prefix}.{kind}"] += _predictions(value, samples or len(eps_hat))
        return [self._merge(name, values) for name, values in grads.items()]

    def _merge(self, name: str, values: list) -> OuterProductGrad | DenseGrad:
        """The sum over the uses of a module, and over several predictions of a sample."""
        offset = self.offsets[name]
        if isinstance(values[0], tuple):
            delta, a = (torch.cat(parts, 1) for parts in zip(*values, strict=True))
            return OuterProductGrad(offset, delta, a)
        return DenseGrad(offset, sum(values[1:], values[0]))


def _predictions(value: Any, samples: int) -> list:
    """A rule's value cut into those of `samples` rows."""
    if isinstance(value, tuple):
        return list(zip(*(part.split(samples) for part in value), strict=True))
    return list(value.split(samples))


def module_layout(parameters: dict[str, nn.Parameter]) -> list[list[tuple[int, ...]]]:
    """Shapes of the selected parameters, those of one module together, in coordinate order."""
    owners = itertools.groupby(parameters, key=lambda name: name.rpartition(".")[0])
    return [[tuple(parameters[name].shape) for name in names] for _, names in owners]


def dense(grads: list) -> torch.Tensor:
    """[B, P] concatenated; for tests and small models only."""
    return torch.cat([g.dense() for g in grads], 1)
