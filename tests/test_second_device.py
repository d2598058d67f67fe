"""All that computes, on a second device (`second_device`): no mix of devices, the CPU's values, and
no waiting where rows are made.
"""

import copy

import numpy as np
import pytest
import torch
from second_device import ELSEWHERE, near, second_device
from torch import nn

from concept_trak.components import states as component_states
from concept_trak.components.data_influence import ComponentSplitter
from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import Component
from concept_trak.components.scores import score
from concept_trak.components.second_order import knockout_curvature
from concept_trak.gradients import states as row_states
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import concept_cotangent, train_gradients
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.projectors import Projection, ProjectionSpec
from concept_trak.gradients.sample_grads import module_layout
from concept_trak.gradients.state import State, rebatch
from concept_trak.gradients.states import QueryStart, QueryTimesteps, TrainBatch, query_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import DdimNoise, GuidedDenoiser, ddim_sample
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.sample import initial_noise
from concept_trak.models.schedule import VariancePreserving
from concept_trak.models.text_to_image import TextToImage
from concept_trak.registry import OBJECTIVES
from concept_trak.scoring.ekfac import Ekfac
from concept_trak.scoring.fisher import METHODS, BlockFisher, FullFisher
from concept_trak.scoring.preconditioner import Budget
from concept_trak.scoring.scores import precondition_and_score
from concept_trak.settings import PROJECTIONS
from concept_trak.store.manifest import Layout
from concept_trak.store.store import Store
from experiments.emoji.model.pipeline import build_scheduler


class Small(nn.Module):
    """What a UNet has, in a few operations: convolutions, a time, cross-attention, a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.time, self.norm = nn.Embedding(1000, 8), nn.GroupNorm(2, 8)
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, 8, bias=False) for n in (8, 6, 6))

    def forward(self, x, t, cond):
        h = self.norm(self.conv_in(x) + self.time(t)[:, :, None, None])
        tokens = h.flatten(2).mT
        q, k, v = self.to_q(tokens), self.to_k(cond), self.to_v(cond)
        tokens = tokens + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.conv_out(tokens.mT.reshape(h.shape))


LAYER = "norm|to_k|to_v|conv_out"


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
        super().__init__(ProjectionSpec("every", count, width, 0, torch.device(device)))

    def add(self, out, grad):
        pieces = out.split([part.proj_dim for part in self.parts], 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.add(piece, grad)
            assert part.block_of_feature.device == piece.device

    def finish(self, out):
        pieces = out.split([part.proj_dim for part in self.parts], 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.finish(piece)


def made_on(device):
    """`Small` on a device."""
    schedule = VariancePreserving(build_scheduler().alphas_cumprod)
    call = lambda net, x, t, cond: net(x, t, cond.embeddings)  # noqa: E731
    return NetworkDenoiser(Small().to(device), schedule, (2, 4, 4), call)


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


def row_maker(denoiser):
    projection = Every(PerSampleVjp(denoiser.network, LAYER).parameters, denoiser.device)
    return GradientComputer(denoiser, projection, LAYER, normalize=True)


@pytest.fixture
def unheld(monkeypatch):
    """Rows are not held against autograd, which waits for the device, once for each shape."""
    monkeypatch.setattr(PerSampleVjp, "_hold_against_autograd", lambda *given: None)


def test_train_rows_of_every_objective_and_projection(unheld):
    def make(device, there):
        maker, found = row_maker(made_on(device)), []
        shown = TrainBatch(*inputs(device), row_states.noising_schedule(3))
        for name in OBJECTIVES.names():
            made = silent(there, lambda name=name: train_gradients(maker, name, shown))
            found += [made.values, made.losses]
        return found

    both(make)


def test_train_rows_of_an_inversion_held_against_autograd():
    def make(device, there):
        denoiser = made_on(device)
        shown = TrainBatch(*inputs(device), row_states.inversion_schedule(3, 2.0))
        made = train_gradients(row_maker(denoiser), "dps", shown)
        assert there is None or len(there.fetched) == 1  # for both states, of one shape
        return made.values, made.losses

    both(make)


@pytest.mark.parametrize("scope", ["seed", "global", "local", "inversion"])
def test_query_rows(scope, unheld):
    def make(device, there):
        denoiser = made_on(device)
        x0, cond, null = inputs(device, 1)
        start = QueryStart(initial_noise(denoiser.latent_shape, 0).to(device), x0)
        inversion = row_states.inversion_schedule(3, 2.0) if scope == "inversion" else None
        named = "local" if inversion else scope
        levels = row_states.trajectory_timesteps(3, 10)
        asked = QueryTimesteps(named, 2, levels, 10, 3.0, inversion=inversion)

        def run():
            seen = query_states_of(denoiser, asked, start, cond, null)
            seen = [state.contrasting(cond, null) for state in rebatch(seen, 3)]
            return row_maker(denoiser).mean_row(seen, concept_cotangent("contrast"))

        return (silent(there, run),)

    both(make)


def test_sampling_and_pictures(tiny_model):
    """With the encoders of a whole pipeline."""

    def make(device, there):
        pipe = copy.copy(tiny_model.pipe)
        for name in ("unet", "vae", "text_encoder"):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).to(device))
        model = TextToImage(pipe, tiny_model.source)
        cond, null = model.encode_prompts(["a cat in the style of line", ""]).split()
        x_T = initial_noise(model.latent_shape, 0).to(device)
        churn = DdimNoise(0.5, lambda t: torch.ones_like(x_T))
        x0, _ = silent(
            there, lambda: ddim_sample(GuidedDenoiser(model, cond, null, 3.0), x_T, 5, churn)
        )
        again = model.encode_images(np.stack([np.asarray(p) for p in model.decode(x0)]))
        return cond.embeddings, x0, again

    both(make)


def test_scores_of_weights():
    def make(device, there):
        denoiser = made_on(device)
        x0, cond, null = inputs(device, 1)
        weights = ((f"{n}.weight", getattr(denoiser.network, n).weight) for n in ("to_k", "to_v"))
        chosen = [Component(name, weight, "cross_attention", 2) for name, weight in weights]
        sampling, found = component_states.Sampling(3.0, 2, 2), []
        seen = component_states.trajectory(denoiser, cond, null, 0, sampling)
        seen_noised = component_states.noised_states(denoiser, x0, (cond, null), 0, 2)
        for aim, states in (("erase", seen), ("amplify", seen_noised)):
            made = score(
                denoiser, COMPONENT_OBJECTIVES[aim], chosen, lambda n, states=states: states, 2
            )
            found += [*made.mean.values(), made.profile]
            found += knockout_curvature(
                denoiser, COMPONENT_OBJECTIVES[aim], chosen, lambda n, states=states: states, 1
            ).values()
        through = ComponentSplitter(chosen, {c.name: c.weight.detach() for c in chosen}, "head")
        dsm = OBJECTIVES.get("dsm").cotangent
        return [*found, through.of(denoiser, seen_noised, dsm, 1)]

    both(make)


def test_the_solve_and_the_scores(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(40, 24, generator=g), torch.randn(2, 24, generator=g).numpy()
    store = Store.create(tmp_path / "store", Layout(40, 24, 1, "float32"), {})
    store.append(0, rows.numpy(), 0)
    store.finish(0)

    def make(device, there):
        budget, found = Budget(device=device.type, cache=False), []
        ways = [FullFisher(budget, m) for m in METHODS] + [BlockFisher(budget, (16, 8))]
        for way in ways:
            found.append(precondition_and_score(store, queries, [0.1, 10.0], way))
        return found

    both(make)


def test_the_curvature_of_all_weights():
    def make(device, there):
        denoiser = made_on(device)
        x0, cond, null = inputs(device)
        state = State(500, x0, cond, null, torch.ones_like(x0), x0)
        with PerSampleVjp(denoiser.network, LAYER) as tape:
            grads = tape.vjp(*OBJECTIVES.get("dsm").cotangent(denoiser, state), 3)
        return Ekfac.fit(lambda: [grads]).solve(grads, 0.1)

    both(make)


def test_a_mix_of_devices_raises_and_waiting_is_counted():
    with second_device() as there:
        here, far = torch.ones(2), torch.ones(2, device=ELSEWHERE)
        for mixed in (lambda: far + here, lambda: here @ far, lambda: far.mul_(here)):
            with pytest.raises(RuntimeError, match="one tensor is on a second device"):
                mixed()
        assert there.fetched == [] and (far + 2 * far).device == ELSEWHERE
        waiting = (
            lambda: far.sum().item(),
            lambda: bool(far.isfinite().all()),
            lambda: far.cpu(),
            lambda: far[far > 0],
            lambda: far.repeat_interleave(torch.tensor([1, 2], device=ELSEWHERE)),
        )
        for count, run in enumerate(waiting, 1):
            run()
            assert len(there.fetched) == count
