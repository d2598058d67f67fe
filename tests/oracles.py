"""Slow and independent ways to the same numbers, shared by the tests of several packages."""

import torch
from torch.func import functional_call, grad, vmap


def vmap_gradients(network, call, selected, inputs, cotangent):
    """[B, P] by vmap(grad) of <cotangent, network(...)>: the slow oracle."""
    params = {n: p.detach() for n, p in network.named_parameters()}
    chosen = {n: params[n] for n in selected}

    def inner(chosen, single, v):
        out = call(
            lambda *a, **k: functional_call(network, {**params, **chosen}, a, k),
            *[x[None] for x in single],
        )
        return (out[0] * v).sum()

    out = vmap(grad(inner), in_dims=(None, 0, 0))(chosen, inputs, cotangent)
    return torch.cat([out[n].flatten(1) for n in selected], 1)
