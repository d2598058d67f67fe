"""Per-sample vector-Jacobian products g_i = J_theta eps_theta(x_t, t, c)_i^T v_i, without a
parameter-sized buffer per sample.

For a Linear layer y = W a + b the gradient of <v, eps_hat> for one sample is the sum over positions
p

    dW = sum_p delta_p a_p^T,   db = sum_p delta_p,   delta = d<v, eps_hat> / dy

so the layer's input a (kept by a forward hook) and the gradient delta of its output (one
`autograd.grad` for all layers) are enough: "ghost" gradients (Goodfellow 2015; Li et al. 2022).
A convolution is the same on its patches. A squared norm or a few entries can be had from the
factors alone; `dense()` is only formed when a projection needs every entry.

The factors hold where a module sees the samples one after the other, its parameters serve nothing
else and its forward is its class's own. That is not taken on trust: `PerSampleVjp` holds every kind
of batch once against autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import UserError
from .layer_rules import CONVOLUTIONS, Factors, differentiated, rule_of
from .sample_grads import DenseGrad, OuterProductGrad
from .select import select_parameters


class _Call(NamedTuple):
    """A use of a module: its input, which version of it, where its output's gradient arrives."""

    prefix: str
    a: torch.Tensor
    version: int
    edge: GradientEdge | None
    shape: torch.Size  # of its output


def _edge(output: torch.Tensor) -> GradientEdge | None:
    """Where an output's gradient arrives, also if the output is changed in place from here on: what
    is a view (as a Linear's is of its tokens in one list) is then made anew from its base.
    """
    base = output._base
    if base is not None and base.requires_grad and base.shape.numel() == output.shape.numel():
        if base.is_contiguous() and output.is_contiguous():
            output = base
    return get_gradient_edge(output) if output.requires_grad else None


class PerSampleVjp:
    """Hooks on the modules that own the selected parameters; `with` installs them, `vjp` reads the
    per-sample gradients.

    >>> with PerSampleVjp(unet, "attn2") as tape:
    ...     eps_hat = unet(x_t, t, cond).sample
    ...     grads = tape.vjp(eps_hat, cotangent)

    grads: OuterProductGrad and DenseGrad, in coordinate order. A module may be called several
    times, with keywords, on a list of all samples' tokens [B T, ...] in their order, or for
    nothing; a parameter may be that of several modules; gradient checkpointing may be on.

    Raises UserError for a selected parameter that no supported module owns or that the forward did
    not use, and for a use whose gradient cannot be told apart by sample: `vjp` holds each selection
    and each shape of batch of a network once against autograd.
    """

    _held: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()  # what has been held against it
    holding = False  # while it is: a backward that is no part of the rows

    def __init__(self, module: nn.Module, layer: str | Callable[[str], bool]) -> None:
        self.parameters = select_parameters(module, layer)
        self.offsets, self.input_dim = {}, 0
        for name, p in self.parameters.items():
            self.offsets[name] = self.input_dim
            self.input_dim += p.numel()
        self._module, self._names = module, {id(p): n for n, p in self.parameters.items()}
        self._owners = {
            prefix: (sub, self._rule(prefix, sub))
            for prefix, sub in module.named_modules()
            if any(id(p) in self._names for p in sub.parameters(recurse=False))
        }
        self._refuse_shared()
        self._calls: list[_Call] = []
        self._handles: list = []
        self._wanted: list[tuple[nn.Parameter, bool]] = []
        self._hidden, self._in_graph = "", False

    def _refuse_shared(self) -> None:
        """UserError for a selected parameter whose memory is another's, too."""
        groups: dict[int, dict[str, nn.Parameter]] = {}
        for name, p in self._module.named_parameters():
            groups.setdefault(p.untyped_storage()._cdata, {})[name] = p
        for group in groups.values():
            if len(group) == 1 or not group.keys() & self.parameters.keys():
                continue
            size = max(p.storage_offset() + _extent(p) for p in group.values())
            taken = torch.zeros(size, dtype=torch.bool)
            for name, p in group.items():
                own = taken.as_strided(p.shape, p.stride(), p.storage_offset())
                if own.any():
                    others = " or ".join(other for other in group if other != name)
                    raise UserError(
                        f"{name} lies in the memory of {others}, so "
                        "its gradient is not its own; choose another LAYER"
                    )
                own.fill_(True)

    def _rule(self, prefix: str, sub: nn.Module) -> Callable[..., Factors]:
        rule = rule_of(sub)
        if rule is None:
            own = next(n for n, p in sub.named_parameters(prefix, False) if id(p) in self._names)
            raise UserError(
                f"no per-sample gradient rule for {own} ({type(sub).__name__}); "
                "choose another LAYER"
            )
        return rule

    def __enter__(self) -> PerSampleVjp:
        # The graph starts at the first selected layer, not before.
        self._wanted = [(p, p.requires_grad) for p in self._module.parameters()]
        for p, _ in self._wanted:
            p.requires_grad_(id(p) in self._names)
        self._handles = [self._module.register_forward_pre_hook(self._begin)]
        for prefix, (sub, _) in self._owners.items():
            # before all hooks of others, which may change the output
            hook = sub.register_forward_hook(self._hook(prefix), prepend=True, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for p, wanted in self._wanted:
            p.requires_grad_(wanted)
        self._handles, self._calls, self._wanted = [], [], []

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._in_graph = torch.is_grad_enabled()
        self._hidden = "" if self._in_graph else self._hidden

    def _hook(self, prefix: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs it once more
                return
            if not torch.is_grad_enabled():
                self._hidden = prefix if self._in_graph else self._hidden
                return
            given = [x for x in (*args, *kwargs.values()) if x is not None]
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            alone = self._owners[prefix][1] is not differentiated or len(given) == 1
            if not (alone and tensors and isinstance(output, torch.Tensor)):
                raise UserError(
                    f"{prefix} ({type(module).__name__}) has no rule for what it is called with; "
                    "choose another LAYER"
                )
            a = tensors[0].detach()
            self._calls.append(_Call(prefix, a, a._version, _edge(output), output.shape))

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
        self._check(calls)
        samples, edges = samples or len(eps_hat), [c.edge for c in calls if c.edge is not None]
        shapes = tuple(tuple(c.shape) for c in calls)
        key = (tuple(self.parameters), tuple(eps_hat.shape), samples, shapes)
        held = self._held.setdefault(self._module, set())
        found: Any = iter(())
        if edges and eps_hat.requires_grad:
            again = key not in held
            found = iter(torch.autograd.grad(eps_hat, edges, cotangent, again, allow_unused=True))
        grads: dict[str, list] = {name: [] for name in self.parameters}
        for call in calls:
            delta = None if call.edge is None else next(found, None)
            for name, value in self._uses(call, delta):
                grads[name] += _by_sample(call.prefix, value, samples, len(eps_hat))
        merged = [self._merge(name, values) for name, values in grads.items()]
        if key not in held and eps_hat.requires_grad:
            self._hold_against_autograd(eps_hat, cotangent, merged, samples)
            held.add(key)
        return merged

    def _check(self, calls: list[_Call]) -> None:
        """UserError for uses that the tape knows to be unreadable."""
        if self._hidden:
            raise UserError(
                f"{self._hidden} is run without a graph, as by gradient checkpointing with "
                "use_reentrant=True; call disable_gradient_checkpointing() or choose another LAYER"
            )
        used = {id(p) for c in calls for p in self._owners[c.prefix][0].parameters(recurse=False)}
        missed = [name for name, p in self.parameters.items() if id(p) not in used]
        if missed:
            raise UserError(
                f"the forward pass did not use {missed[0]} ({len(missed)} selected parameters "
                "unused); choose another LAYER"
            )
        changed = next((c.prefix for c in calls if c.a._version != c.version), None)
        if changed is not None:
            raise UserError(
                f"the input of {changed} is changed in place after it is used; choose another LAYER"
            )

    def _uses(self, call: _Call, delta: torch.Tensor | None) -> Iterator[tuple[str, Any]]:
        """(parameter, what a rule makes of it) for the selected ones of a call."""
        (module, rule), a = self._owners[call.prefix], call.a
        if delta is None:  # nothing came of the output
            delta = torch.zeros(call.shape, device=a.device)
        delta = delta.reshape(call.shape)
        if delta.dim() == _item_dims(module):  # one item for the whole batch
            a, delta = a[None], delta[None]
        own = dict(module.named_parameters(recurse=False))
        for kind, value in rule(
            module, a if isinstance(module, nn.Embedding) else a.float(), delta.float()
        ):
            if id(own.get(kind)) in self._names:
                yield self._names[id(own[kind])], value

    def _merge(self, name: str, values: list) -> OuterProductGrad | DenseGrad:
        """The sum over the uses of a parameter, and over several predictions of a sample."""
        offset = self.offsets[name]
        if all(isinstance(value, tuple) for value in values):
            if len(values) == 1:
                return OuterProductGrad(offset, *values[0])
            delta, a = (torch.cat(parts, 1) for parts in zip(*values, strict=True))
            return OuterProductGrad(offset, delta, a)
        values = [OuterProductGrad(0, *v).dense() if isinstance(v, tuple) else v for v in values]
        return DenseGrad(offset, sum(values[1:], values[0]))

    def _hold_against_autograd(
        self, eps_hat: torch.Tensor, cotangent: torch.Tensor, grads: list, samples: int
    ) -> None:
        """UserError where sum_i c_i g_i is not autograd's gradient of sum_i c_i <v_i, eps_hat_i>.

        c differs from sample to sample, so what went to another sample is seen, too. Costs a
        backward, and memory for the gradient of one parameter at a time.
        """
        c = torch.tensor([1 - 2 * (i * 0.6180339887 % 1) for i in range(samples)])
        c = c.to(eps_hat.device)
        scale = c.repeat(len(eps_hat) // samples).to(cotangent)
        scaled = cotangent * scale.view(-1, *[1] * (cotangent.dim() - 1))
        norms: dict[str, torch.Tensor] = {}  # of the gap, and of autograd's

        def compare(name: str, grad: Any, p: torch.Tensor) -> None:
            want = (p.grad.to_dense() if p.grad.is_sparse else p.grad).float().flatten()
            norms[name] = torch.stack([(want - grad.total(c)).norm(), want.norm()])
            p.grad = None

        kept = [p.grad for p in self.parameters.values()]
        handles, PerSampleVjp.holding = [], True
        try:
            for (name, p), grad in zip(self.parameters.items(), grads, strict=True):
                p.grad = None
                hook = partial(compare, name, grad)
                handles.append(p.register_post_accumulate_grad_hook(hook))
            eps_hat.backward(scaled, inputs=list(self.parameters.values()))
        finally:
            PerSampleVjp.holding = False
            for handle in handles:
                handle.remove()
            for p, grad in zip(self.parameters.values(), kept, strict=True):
                p.grad = grad
        exact = all(p.dtype.itemsize >= 4 for p in (eps_hat, *self.parameters.values()))
        refuse_gaps(norms, 0.01 if exact else 0.3)  # half precision loses small gradients


def refuse_gaps(norms: dict[str, torch.Tensor], share: float) -> None:
    """UserError for a parameter whose gap is more than `share` of its gradient, and of that share
    of all. norms: {name: [2], of the gap and of autograd's gradient}.
    """
    if not norms:
        return
    gap, want = torch.stack(list(norms.values()), 1).cpu().tolist()
    least = share * math.hypot(*want)
    for name, off, whole in zip(norms, gap, want, strict=True):
        if off > share * (whole + least):
            raise UserError(
                f"{name} takes part in a way that its gradient cannot be told apart by sample "
                f"(off by {off / max(whole, 1e-30):.0%}); set BATCH_SIZE=1 or choose another LAYER"
            )


def _extent(p: torch.Tensor) -> int:
    """Numbers of memory from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))


def _item_dims(module: nn.Module) -> int:
    """Dimensions of a module's output for one item; 0 where there is always a batch."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape)
    return len(module.kernel_size) + 1 if isinstance(module, CONVOLUTIONS) else 0


def _by_sample(prefix: str, value: Any, samples: int, batch: int) -> list:
    """A rule's value for each row of a call, cut into those of `samples` rows; the rows of a call
    are one for each of `batch` predictions, or as many for each, side by side.
    """
    rows = len(value[0]) if isinstance(value, tuple) else len(value)
    kinds = batch // samples if rows % batch == 0 else 1
    if samples > 1 and rows % samples:
        raise UserError(
            f"{prefix} is called with {rows} rows for {batch} predictions, so its gradient cannot "
            "be told apart by sample; set BATCH_SIZE=1 or choose another LAYER"
        )
    if isinstance(value, tuple):
        parts = [x.reshape(kinds, samples, -1, x.shape[-1]).unbind() for x in value]
        return list(zip(*parts, strict=True))
    each = value.reshape(kinds, samples, -1, value.shape[-1])
    return list((each[:, :, 0] if each.shape[2] == 1 else each.sum(2)).unbind())
