"""Properties of projections done by dattri and trak themselves: their rows, their limits."""

import importlib.metadata
import sys

import pytest
import torch
from dattri.func.projection import random_project
from trak import projectors as trak_projectors

from concept_trak.errors import UserError
from concept_trak.gradients import external_projectors
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.projection import make_projection, projection_for
from concept_trak.gradients.sample_grads import DenseGrad, OuterProductGrad, dense
from concept_trak.gradients.states import noising_schedule, train_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import resolve

P, K = 3001, 230  # neither divides a block
CHOICES = [(b, kind) for b, kinds in external_projectors.ON_CPU.items() for kind in kinds]
ON_GPU = [(b, kind) for b, kinds in external_projectors.ON_CUDA.items() for kind in kinds]


def build(backend, kind, seed=3, device="cpu", dim=K, **options):
    dim = 0 if kind == "identity" else dim
    return make_projection(kind, P, dim, seed, device, backend=backend, **options)


def theirs(backend, kind, x, dim=K, seed=3):
    """Rows of the library, called as its users call it."""
    dim, device = x.shape[1] if kind == "identity" else dim, x.device
    if backend == "dattri":
        project = random_project(x, len(x), dim, 16, proj_seed=seed, proj_type=kind, device=device)
        return project(x)
    kind = trak_projectors.ProjectionType(kind)
    if device.type == "cpu":
        made = trak_projectors.BasicProjector(x.shape[1], dim, seed, kind, device)
    else:
        made = trak_projectors.CudaProjector(x.shape[1], dim, seed, kind, device, 16)
    return made.project(x, 0)


def gradients(count=4, seed=0):
    """A weight by its factors, between two vectors: P coordinates in all."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, 6, 50, generator=g), torch.randn(count, 6, 59, generator=g)
    first, last = torch.randn(count, 40, generator=g), torch.randn(count, 11, generator=g)
    return [DenseGrad(0, first), OuterProductGrad(40, *weight), DenseGrad(2990, last)]


def parameters():
    return {f"attn2.{name}": p for name, p in torch.nn.Linear(20, 30).named_parameters()}


@pytest.mark.parametrize("backend, kind", CHOICES)
def test_rows_are_those_of_the_library_itself(backend, kind):
    ours, grads = build(backend, kind), gradients()
    want = theirs(backend, kind, dense(grads))
    assert torch.equal(ours.project(dense(grads)), want)
    for batch in (grads, list(reversed(grads))):  # one after the other: nothing is left behind
        out = torch.zeros(4, ours.proj_dim)
        for grad in batch:
            ours.add(out, grad)
        assert not out.any()
        ours.finish(out)
        torch.testing.assert_close(out, want)
    few = dense(gradients(2))
    torch.testing.assert_close(ours.project(few), theirs(backend, kind, few))


@pytest.mark.parametrize("kind", ["identity", "random_mask", "normal", "rademacher"])
def test_on_a_cpu_dattri_and_our_own_are_the_same_projection(kind):
    x = dense(gradients())
    own = make_projection(kind, P, 0 if kind == "identity" else K, 3)
    torch.testing.assert_close(build("dattri", kind).project(x), own.project(x))


@pytest.mark.gpu
@pytest.mark.parametrize("backend, kind", ON_GPU)
def test_rows_on_a_gpu_are_those_of_the_library_itself(backend, kind):
    x = dense(gradients()).cuda()
    try:
        ours = build(backend, kind, device="cuda", dim=512)
    except UserError as error:
        pytest.skip(str(error))
    want = theirs(backend, kind, x, dim=512)
    torch.testing.assert_close(ours.project(x), want, rtol=1e-3, atol=1e-3 * float(want.std()))


def test_finishing_without_a_share_changes_nothing():
    for projection in (build("own", "sjlt"), build("dattri", "normal")):
        out = torch.ones(2, K)
        projection.finish(out)
        assert (out == 1).all()


@pytest.mark.parametrize("backend, kind", CHOICES)
def test_identity_of_a_store_names_library_and_version(backend, kind):
    version = importlib.metadata.version({"dattri": "dattri", "trak": "traker"}[backend])
    dim = P if kind == "identity" else K
    assert build(backend, kind).describe() == {
        "kind": kind,
        "input_dim": P,
        "proj_dim": dim,
        "seed": 3,
        "backend": backend,
        "version": version,
        "device": "cpu",
    }
    assert "backend" not in make_projection(kind, P, dim, 3).describe()


def test_settings_choose_the_library():
    asked = {"proj_type": "normal", "proj_dim": 64, "proj_backend": "trak", "blocks": "all"}
    found = projection_for(parameters(), resolve("emoji", asked), "cpu")
    assert found.describe()["backend"] == "trak" and found.widths == [64]
    with pytest.raises(UserError, match="trak projects all parameters as one block; set BLOCKS="):
        projection_for(parameters(), resolve("emoji", asked | {"blocks": "module"}), "cpu")
    with pytest.raises(UserError, match="dattri has no projection logra on cpu; use PROJ_TYPE"):
        logra = {"proj_type": "logra", "proj_backend": "dattri"}
        projection_for(parameters(), resolve("emoji", asked | logra), "cpu")


def test_dense_gradients_beyond_the_bound_are_refused(monkeypatch):
    x, ours = dense(gradients()), build("dattri", "random_mask")
    monkeypatch.setattr(external_projectors, "BUFFER_MAX_BYTES", 4 * 3 * P)
    with pytest.raises(UserError, match=f"4 x {P} float32 values .* lower BATCH_SIZE"):
        ours.project(x)
    assert len(ours.project(x[:3])) == 3
    asked = {"proj_type": "random_mask", "proj_dim": 64, "blocks": "all", "batch_size": 10**6}
    projection_for(parameters(), resolve("emoji", asked), "cpu")
    with pytest.raises(UserError, match="1000000 x"):  # before any gradient is computed
        projection_for(parameters(), resolve("emoji", asked | {"proj_backend": "dattri"}), "cpu")


def test_what_a_library_cannot_do_is_refused_in_one_line(monkeypatch):
    for backend, kind in (("dattri", "sjlt"), ("dattri", "grass"), ("trak", "random_mask")):
        with pytest.raises(UserError, match=f"{backend} has no projection {kind} on cpu; use"):
            build(backend, kind)
    with pytest.raises(
        UserError, match="'jax' is unknown; set PROJ_BACKEND to one of own, dattri, trak"
    ):
        build("jax", "normal")
    with pytest.raises(UserError, match="dattri draws its own mask; leave PROJ_MASK=a100 out"):
        build("dattri", "random_mask", mask="a100")
    with pytest.raises(UserError, match="too large to draw"):
        make_projection("normal", 43_962_560, 2**15, 0, backend="trak")
    with pytest.raises(
        UserError, match="cannot make 230 features; set PROJ_DIM to a multiple of 512"
    ):
        build("trak", "normal", device="cuda")
    with pytest.raises(UserError, match="trak on cuda cannot count 300000000 coordinates"):
        make_projection("normal", 300_000_000, 512, 0, "cuda", backend="trak")
    for backend, kind, kernel in (("trak", "normal", "fast_jl"), ("dattri", "grass", "sjlt")):
        monkeypatch.setitem(sys.modules, kernel, None)  # as if it were not installed
        with pytest.raises(UserError, match=f"{backend} needs the CUDA kernels of {kernel} .*pip"):
            build(backend, kind, device="cuda", dim=512)


class HalfPrecisionKernel:
    """Stands in for trak's kernel: it computes from float16 entries."""

    def __init__(self, matrix):
        self.matrix = matrix

    def project(self, grads, model_id):
        assert model_id == 0
        return grads.half().float() @ self.matrix


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_rows_of_any_size_survive_a_kernel_of_half_precision(size):
    x, matrix = dense(gradients()) * size, torch.randn(P, 8)
    found = external_projectors._by_fast_jl(HalfPrecisionKernel(matrix).project, x)
    torch.testing.assert_close(found, x @ matrix, rtol=0, atol=0.3 * size)
    x[1] = 0
    found = external_projectors._by_fast_jl(HalfPrecisionKernel(matrix).project, x)
    assert not found[1].any() and found.isfinite().all() and found[0].any()


def test_kernel_that_silently_gives_zeros_is_refused():
    x, silent = dense(gradients()), HalfPrecisionKernel(torch.zeros(P, 8)).project
    with pytest.raises(UserError, match="fast_jl gives zeros: build it for this GPU"):
        external_projectors._by_fast_jl(silent, x)
    assert not external_projectors._by_fast_jl(silent, torch.zeros_like(x)).any()  # as it should be


@pytest.mark.parametrize("backend, kind", [("dattri", "random_mask"), ("trak", "normal")])
def test_train_rows_are_the_librarys_projection_of_the_unit_normed_gradients(
    backend, kind, tiny_denoiser
):
    """Two batches of other sizes, one after the other: nothing is left over between them."""
    width = PerSampleVjp(tiny_denoiser.network, "attn2").input_dim
    g = torch.Generator().manual_seed(0)
    null = Condition(torch.randn(1, 5, 6, generator=g))
    options = (kind, 64, {"backend": backend}), ("identity", 0, {})
    makers = [
        GradientComputer(tiny_denoiser, make_projection(k, width, dim, 3, **more), "attn2", True)
        for k, dim, more in options
    ]
    for n in (3, 2):
        x0 = torch.randn(n, 2, 4, 4, generator=g)
        inputs = x0, Condition(torch.randn(n, 5, 6, generator=g)), null
        got, whole = (
            maker.rows(
                train_states_of(tiny_denoiser, *inputs, noising_schedule(3)),
                OBJECTIVES.get("dsm").cotangent,
                n,
            ).values
            for maker in makers
        )
        want = theirs(backend, kind, whole, 64)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
