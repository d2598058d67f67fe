"""Projections by dattri and trak themselves: rows are what a user of either library gets."""

import importlib.metadata

import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.models.condition import Condition
from concept_trak.registry import OBJECTIVES
from concept_trak.rows import library
from concept_trak.rows.projection import make_projection, projection_for
from concept_trak.rows.row import RowMaker
from concept_trak.rows.states import noised_states, train_states_of
from concept_trak.rows.vjp import DenseGrad, OuterProductGrad, PerSampleVjp
from concept_trak.settings import resolve

P, K, SEED = 500, 64, 3
KINDS = {
    "dattri": ("identity", "random_mask", "normal", "rademacher"),
    "trak": ("normal", "rademacher"),
}
EVERY = [(backend, kind) for backend, kinds in KINDS.items() for kind in kinds]


def grads(rows=5, width=P):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def directly(backend, kind, rows):
    """What the library gives when it is called as its documentation does."""
    width = rows.shape[1]
    dim = width if kind == "identity" else K
    if backend == "dattri":
        from dattri.func.projection import random_project

        return random_project(rows, len(rows), dim, 16, SEED, kind, device="cpu")(rows)
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(width, K, SEED, ProjectionType(kind), torch.device("cpu"))
    return projector.project(rows, 0)


def projection_of(backend, kind, width=P):
    dim = 0 if kind == "identity" else K
    return make_projection(kind, width, dim, SEED, backend=backend)


@pytest.mark.parametrize("backend, kind", EVERY)
def test_rows_equal_those_of_the_library_called_directly(backend, kind):
    got = projection_of(backend, kind).project(grads())
    torch.testing.assert_close(got, directly(backend, kind, grads()), rtol=1e-5, atol=1e-5)
    assert float(got.abs().max()) > 0


@pytest.mark.parametrize("backend, kind", EVERY)
def test_tensor_by_tensor_equals_the_whole_row(backend, kind):
    projection, whole = projection_of(backend, kind), grads()
    delta, a = torch.randn(5, 3, 10), torch.randn(5, 3, 20)
    matrix = OuterProductGrad(100, delta, a)
    whole[:, 100:300] = matrix.dense()
    out = torch.zeros(5, projection.proj_dim)
    for start, stop in ((300, P), (0, 100)):
        projection.add(out, DenseGrad(start, whole[:, start:stop]))
    projection.add(out, matrix)
    projection.finish(out)
    torch.testing.assert_close(out, projection.project(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend, kind", [("dattri", "random_mask"), ("trak", "normal")])
def test_train_rows_are_the_librarys_projection_of_the_unit_normed_gradients(
    backend, kind, tiny_denoiser
):
    """Two batches of other sizes, one after the other: nothing is left over between them."""
    width = PerSampleVjp(tiny_denoiser.network, "attn2").input_dim
    g = torch.Generator().manual_seed(0)
    null = Condition(torch.randn(1, 5, 6, generator=g))
    makers = [
        RowMaker(tiny_denoiser, projection, "attn2", True)
        for projection in (
            projection_of(backend, kind, width),
            make_projection("identity", width, 0, 0),
        )
    ]
    for n in (3, 2):
        x0, cond = (
            torch.randn(n, 2, 4, 4, generator=g),
            Condition(torch.randn(n, 5, 6, generator=g)),
        )
        got, dense = (
            maker.rows(
                train_states_of(tiny_denoiser, x0, cond, null, noised_states(3)),
                OBJECTIVES.get("dsm").cotangent,
                n,
            ).values
            for maker in makers
        )
        torch.testing.assert_close(got, directly(backend, kind, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend, package", [("dattri", "dattri"), ("trak", "traker")])
def test_a_manifest_names_the_library_and_its_version(backend, package):
    described = projection_of(backend, "normal").describe()
    assert described["backend"] == backend and described["device"] == "cpu"
    assert described["version"] == importlib.metadata.version(package)
    own = make_projection("normal", P, K, SEED).describe()
    assert not {"backend", "version", "device"} & own.keys()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "dattri", "kind": "sjlt"}, "no projection sjlt on cpu"),
        ({"backend": "trak", "kind": "random_mask"}, "no projection random_mask on cpu"),
        ({"backend": "nonsense", "kind": "normal"}, "use one of own, dattri, trak"),
        ({"backend": "dattri", "kind": "random_mask", "mask": "a100"}, "draws its own mask"),
        ({"backend": "dattri", "kind": "normal", "layout": [[(25, 20)]]}, "BLOCKS=all"),
    ],
)
def test_what_a_library_cannot_do_is_refused_with_the_remedy(options, words):
    options = dict(options)
    with pytest.raises(UserError, match=words) as error:
        make_projection(options.pop("kind"), P, K, SEED, **options)
    assert "\n" not in str(error.value) and "PROJ_BACKEND" in str(error.value)


def test_gradients_that_do_not_fit_are_refused_before_any_work(tiny_denoiser, monkeypatch):
    monkeypatch.setattr(library, "BUFFER_MAX_BYTES", 1000)
    asked = {"proj_backend": "dattri", "proj_type": "normal", "blocks": "all", "proj_dim": 64}
    parameters = PerSampleVjp(tiny_denoiser.network, "attn2").parameters
    with pytest.raises(UserError, match="BATCH_SIZE"):
        projection_for(parameters, resolve("emoji", asked), "cpu")


def test_a_kernel_that_is_not_installed_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError, match="pip install 'traker\\[fast\\]'"):
        library._need("fast_jl", "PROJ_BACKEND=trak")
