"""What the first order leaves out of a knock-out: the curvature of J.

    J(w with i zeroed) - J(w)  =  - alpha_i + w_i^2 / 2 d^2J/dw_i^2 + ...

J is b || eps(c) - target ||^2 with b = 1 to erase and -1 / D to amplify, so to second order in the
change of the prediction (Gauss-Newton)

    w_i^2 / 2 d^2J/dw_i^2  ~  bend_i = b w_i^2 || d eps(c) / dw_i ||^2
                                     = b w_i^2 E_v [ (d <eps(c), v> / dw_i)^2 ],    v ~ N(0, I)

which a few backward passes of random cotangents estimate for all weights at once. It adds up over
knocked-out weights as far as their effects on the prediction are orthogonal: so it does for random
masks, whose change of J alpha and bend predict together where alpha alone does not. Weights that
were chosen for the sign of their alpha push the prediction the same way and cost more than their
bends (experiments/cad/README.md), so no edit is made from them. CAD stops at alpha; this is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.denoiser import Denoiser
from .objective import ComponentObjective
from .parameter_groups import Component
from .scores import StatesOf, requires_grad_only

PROBES = 2  # random cotangents a state; those of all states and seeds are averaged
SEED = 11


def knockout_curvature(
    denoiser: Denoiser,
    aim: ComponentObjective,
    chosen: Sequence[Component],
    states_of: StatesOf,
    num_seeds: int,
    probes: int = PROBES,
) -> dict[str, torch.Tensor]:
    """{weight: bend, of the weight's shape, fp32 on the CPU}, mean over the states of all seeds.

    One copy of the chosen tensors beside a gradient; a forward pass and `probes` backward passes a
    state.
    """
    generator = torch.Generator().manual_seed(SEED)
    weights = [c.weight for c in chosen]
    total = [torch.zeros_like(w) for w in weights]
    with requires_grad_only(denoiser.network, chosen):
        for n in range(num_seeds):
            states = states_of(n)
            for state in states:
                with torch.enable_grad():
                    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
                share = aim.bend(eps_hat[0].numel()) / (probes * len(states) * num_seeds)
                for k in range(probes):
                    v = torch.randn(eps_hat.shape, generator=generator).to(eps_hat)
                    again = k + 1 < probes
                    found = torch.autograd.grad(eps_hat, weights, v, again, materialize_grads=True)
                    for sum_, g in zip(total, found, strict=True):
                        sum_.addcmul_(g, g, value=share)
    return {
        c.name: sum_.mul_(c.weight.detach().square()).cpu()
        for c, sum_ in zip(chosen, total, strict=True)
    }
