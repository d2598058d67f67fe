"""All that computes, on a second device (`second_device`): no mix of devices, the CPU's values, and
no waiting where rows are made.
"""

import copy

import numpy as np
import pytest
import torch
from second_device import ELSEWHERE, near, second_device

from concept_trak.components import states as component_states
from concept_trak.components.by_picture import Through
from concept_trak.components.curvature import bends
from concept_trak.components.objective import AIMS
from concept_trak.components.roles import select
from concept_trak.components.scores import score
from concept_trak.models.condition import Condition
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.generation import initial_noise
from concept_trak.registry import OBJECTIVES
from concept_trak.rows import states as row_states
from concept_trak.rows.objectives import of_concept, train_rows
from concept_trak.rows.projection import make_projection
from concept_trak.rows.projectors import Projection, Spec
from concept_trak.rows.row import RowMaker
from concept_trak.rows.state import regrouped
from concept_trak.rows.states import QueryStates, Start, TrainPictures, query_states_of
from concept_trak.rows.vjp import PerSampleVjp, dense, module_layout
from concept_trak.scoring.fisher import BlockFisher, FullFisher
from concept_trak.scoring.kfac import Ekfac
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.scores import solve_and_score
from concept_trak.settings import PROJECTIONS
from concept_trak.store.manifest import Layout
from concept_trak.store.shards import Store

LAYER = "attn2|conv_out|conv_norm_out"
STATES = {"noised": row_states.noised_states(3), "inverted": row_states.inverted_states(3, 2.0)}


class Every(Projection):
    """All kinds of projection, whole and module by module, their features side by side."""

    def __init__(self, parameters, device):
        layout, count = module_layout(parameters), sum(p.numel() for p in parameters.values())
        self.parts = [
            make_projection(kind, count, 0 if kind == "identity" else 24, 0, device, **options)
            for kind in PROJECTIONS
            for options in ({}, {"layout": layout, "separate": True})
            if options or kind != "logra"
        ]
        width = sum(part.proj_dim for part in self.parts)
        super().__init__(Spec("every", count, width, 0, torch.device(device)))

    def add(self, out, grad):
        pieces = out.split([part.proj_dim for part in self.parts], 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.add(piece, grad)
            assert part.block_of_feature.device == piece.device

    def finish(self, out):
        pieces = out.split([part.proj_dim for part in self.parts], 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.finish(piece)


@pytest.fixture(params=["cpu", ELSEWHERE.type])
def where(request):
    return torch.device(request.param)


def moved(denoiser, device):
    """The same network on a device."""
    network = copy.deepcopy(denoiser.network).to(device)
    return NetworkDenoiser(network, denoiser.schedule, denoiser.latent_shape)


def inputs(device, n=3):
    g = torch.Generator().manual_seed(0)
    x0, cond, null = (torch.randn(s, generator=g) for s in ((n, 2, 4, 4), (n, 5, 6), (1, 5, 6)))
    return x0.to(device), Condition(cond.to(device)), Condition(null.to(device))


def both(make):
    """make(device, the `SecondDevice` or None): nested results on the CPU and elsewhere agree."""
    want = make(torch.device("cpu"), None)
    with second_device() as there:
        got = make(ELSEWHERE, there)
    for a, b in zip(got, want, strict=True):
        a, b = (near(x) if isinstance(x, torch.Tensor) else torch.as_tensor(x) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def silent(there, run):
    """What run() gives; nothing in it waits for the device."""
    before = [] if there is None else list(there.fetched)
    found = run()
    assert there is None or there.fetched == before, set(there.fetched[len(before) :])
    return found


@pytest.mark.parametrize("states", STATES)
def test_train_rows_of_every_objective_and_projection(states, tiny_denoiser):
    def make(device, there):
        denoiser = moved(tiny_denoiser, device)
        x0, cond, null = inputs(device)
        shown = TrainPictures(x0, cond, null, STATES[states])
        projection = Every(PerSampleVjp(denoiser.network, LAYER).parameters, device)
        maker = RowMaker(denoiser, projection, LAYER, normalize=True)
        found = []
        for name in OBJECTIVES.names():
            train_rows(maker, name, shown)  # holds this shape against autograd
            made = silent(there, lambda name=name: train_rows(maker, name, shown))
            found += [made.values, made.losses]
        return found

    both(make)
