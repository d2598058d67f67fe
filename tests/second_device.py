"""A second device without hardware: tensors that claim to lie elsewhere and hold their values here.

Inside `second_device()` whatever is made on, or moved to, `ELSEWHERE` is a `Far`: its values are an
ordinary tensor's, so results can be compared with the CPU's, but an operation that meets it and a
tensor of the CPU raises, as on a GPU. `fetched` counts where a GPU would have to be waited for:
values that go to the CPU, and operations whose result has a size only known there.

It claims to be "meta", the one device that every PyTorch knows and whose gradients flow without a
driver; nothing in here is ever asked of PyTorch's own meta kernels.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}


class Far(torch.Tensor):
    """A tensor elsewhere; near: its values."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=ELSEWHERE,
        )

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a second device that is not there any more")


class SecondDevice(TorchDispatchMode):
    """See the module. fetched: names of the operations that a GPU would be waited for at."""

    def __init__(self):
        super().__init__()
        self.fetched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = list(_tensors(args)) + list(_tensors(kwargs.values()))
        far = [x for x in given if isinstance(x, Far)]
        target = kwargs.get("device")
        there = bool(far) if target is None else torch.device(target).type == ELSEWHERE.type
        if not far and not there:
            return func(*args, **kwargs)
        if func in MOVES:
            there = isinstance(args[0], Far) if func is aten.copy_.default else there
        elif any(not isinstance(x, Far) and x.dim() for x in given):
            raise RuntimeError(f"{func}: one tensor is on a second device, another on the CPU")
        if func in WAITS or (far and not there) or _by_mask(func, args):
            self.fetched.append(str(func))
        if there and target is not None:
            kwargs["device"] = "cpu"
        known = {id(x.near): x for x in far}  # what is changed in place stays itself
        out = func(*_each(_near, args), **{k: _each(_near, x) for k, x in kwargs.items()})
        return _each(lambda x: known[id(x)] if id(x) in known else Far(x), out) if there else out


def _by_mask(func, args):
    if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return False
    return any(x is not None and x.dtype == torch.bool for x in args[1])


def _near(x):
    return x.near if isinstance(x, Far) else x


def _tensors(given):
    """In arguments and in lists among them."""
    for x in given:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _each(change, given):
    """`given`, a tensor or a nest of them, with each changed."""
    if isinstance(given, torch.Tensor):
        return change(given)
    if isinstance(given, (list, tuple)):
        return type(given)(_each(change, x) for x in given)
    return given


class FromNumbers(TorchFunctionMode):
    """Tensors of Python numbers and arrays are made here and then moved, as for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def second_device():
    """Inside, `ELSEWHERE` is there; gives the `SecondDevice`."""
    with SecondDevice() as device, FromNumbers():
        yield device


def near(x):
    """A tensor's values on the CPU, wherever it is."""
    return _near(x).detach()
