"""Properties of the random projections."""

import hashlib

import pytest
import torch
from dattri.func.projection import random_project
from trak.projectors import BasicProjector

from concept_trak.errors import UserError
from concept_trak.gradients import projectors
from concept_trak.gradients.cuda_mask import GPUS, gpu_mask
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.projectors import KINDS
from concept_trak.gradients.sample_grads import DenseGrad, OuterProductGrad
from concept_trak.settings import MASKS, PROJECTIONS

P, K = 3001, 230  # neither divides a block


def grads(rows=5, dim=P, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected):
    """Equal up to float32 summation order, relative to the largest entry (trak's kinds are
    unscaled).
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def build(kind, seed=3, **options):
    return make_projection(kind, P, 0 if kind == "identity" else K, seed, **options)


@pytest.mark.parametrize("kind", ["random_mask", "normal", "rademacher", "identity"])
def test_equals_dattri_on_cpu(kind):
    x = grads()
    ours = build(kind)
    theirs = random_project(x, len(x), ours.proj_dim, 16, proj_seed=3, proj_type=kind)(x)
    torch.testing.assert_close(ours.project(x), theirs)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_equals_trak_basic_projector(kind):
    x = grads()
    theirs = BasicProjector(P, K, 3, kind, torch.device("cpu")).project(x, 0)
    torch.testing.assert_close(build(f"trak_{kind}").project(x), theirs)


def test_settings_offer_every_kind_and_every_mask():
    assert PROJECTIONS == (*KINDS, "logra")
    assert MASKS == ("auto", "portable", *GPUS)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_by_tensor_equals_whole_row(kind, monkeypatch):
    monkeypatch.setattr(projectors, "SCATTER_COORDINATES", 97)
    x = grads()
    ours = build(kind)
    out = torch.zeros(len(x), ours.proj_dim)
    pieces = [(0, 7), (7, 640), (640, 641), (641, 2222), (2222, P)]
    for start, stop in reversed(pieces):
        ours.accumulate(out, x[:, start:stop], start)
    monkeypatch.undo()
    assert_same(out, build(kind).project(x))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_batch(kind):
    x = grads()
    assert_same(build(kind).project(x)[2:3], build(kind).project(x[2:3]))


@pytest.mark.parametrize(
    "kind, options", [("normal", {}), ("rademacher", {}), ("sjlt", {}), ("sjlt", {"nonzeros": 3})]
)
def test_projection_keeps_inner_products(kind, options):
    x = torch.nn.functional.normalize(grads(2), dim=1)
    y = torch.stack([x[0], 0.6 * x[0] + 0.8 * x[1]])
    expected = y @ y.T
    found = torch.stack(
        [(lambda z: z @ z.T)(build(kind, seed, **options).project(y)) for seed in range(60)]
    )
    error = (found.mean(0) - expected).abs().max()
    # four standard errors of the mean of 60 unbiased estimates with variance <= 2/k
    assert error < 4 * (2 / K / 60) ** 0.5
    assert (found - expected).abs().max() < 6 * (2 / K) ** 0.5


def test_sjlt_coordinate_goes_to_distinct_features_with_unit_norm():
    ours = build("sjlt", nonzeros=4)
    rows = ours.project(torch.eye(P)[:200])
    assert ((rows != 0).sum(1) == 4).all()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(200))


def test_sjlt_features_and_signs_are_balanced():
    ours = make_projection("sjlt", 100_000, 50, 0)
    ours.project(torch.zeros(1, 100_000))
    code = ours._codes[0]
    counts = torch.bincount(code.long() >> 1, minlength=50)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert abs((code & 1).sum().item() - 50_000) < 5 * 25_000**0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_seed_decides_the_projection(kind):
    x = grads()
    assert torch.equal(build(kind, 3).project(x), build(kind, 3).project(x))
    assert not torch.allclose(build(kind, 3).project(x), build(kind, 4).project(x))


def test_drawing_ignores_global_generator_and_default_device():
    expected = {kind: build(kind).project(grads()) for kind in KINDS}
    torch.manual_seed(123)
    for kind in KINDS:
        assert torch.equal(build(kind).project(grads()), expected[kind])


def test_mask_of_the_published_setting_is_the_cpu_mask():
    """P = attn2 of SD v1.4, k = 2^15, seed 0: the indices dattri draws on a CPU."""
    ours = make_projection("random_mask", 43_962_560, 2**15, 0)
    assert ours.indices[:6].tolist() == [342, 2079, 2216, 3810, 3855, 4612]
    assert ours.indices[-1] == 43955309
    digest = ours.describe()["indices_sha256"]
    assert digest == "ec25f2f5b1a361d7ff1d5580c08a2171ed37f5e1d07110fe0754fef03ea27dc3"
    assert digest == hashlib.sha256(ours.indices.numpy().tobytes()).hexdigest()


def test_mask_of_a_gpu_is_rebuilt_and_named():
    wide, x = 50_000, grads(dim=50_000)
    ours, kept = make_projection("random_mask", wide, K, 3, mask="t4"), gpu_mask("t4", wide, K, 3)
    assert torch.equal(ours.project(x), x[:, torch.from_numpy(kept.copy())])
    assert ours.describe() == {
        "kind": "random_mask",
        "input_dim": wide,
        "proj_dim": K,
        "seed": 3,
        "generator": "torch philox4x32-10 (CUDA, 40960 threads)",
        "indices_sha256": hashlib.sha256(kept.tobytes()).hexdigest(),
    }
    portable = make_projection("random_mask", wide, K, 3)
    assert portable.describe()["generator"] == "torch mt19937 (CPU)"
    assert not torch.equal(portable.indices, ours.indices)
    assert make_projection("random_mask", wide, K, 3, mask="auto").describe() == portable.describe()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random_mask"])
def test_only_a_mask_can_be_that_of_a_gpu(kind):
    for mask in ("auto", "portable"):
        assert build(kind, mask=mask).describe() == build(kind).describe()
    with pytest.raises(UserError, match=f"projection {kind} has no mask of a GPU"):
        build(kind, mask="a100")


def test_mask_keeps_values_and_half_precision_input_is_accepted():
    ours = build("random_mask")
    x = grads()
    assert torch.equal(ours.project(x), x[:, ours.indices])
    for kind in KINDS:
        half = build(kind).project(x.half())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, build(kind).project(x.half().float()))


def test_bad_requests_are_named():
    with pytest.raises(UserError, match="unknown projection 'gauss'"):
        make_projection("gauss", P, K, 0)
    with pytest.raises(UserError, match="unknown GPU 'h101'"):
        make_projection("random_mask", P, K, 0, mask="h101")
    with pytest.raises(UserError, match="cannot keep 4000 of 3001"):
        make_projection("random_mask", P, 4000, 0)
    with pytest.raises(UserError, match="identity keeps all"):
        make_projection("identity", P, K, 0)
    with pytest.raises(UserError, match="too large to draw"):
        make_projection("normal", 43_962_560, 2**15, 0)
    with pytest.raises(UserError, match="give grads of 3001 coordinates"):
        build("sjlt").project(grads(dim=10))
    with pytest.raises(UserError, match="at least 1"):
        make_projection("sjlt", P, 0, 0)


# ---- module by module

LAYOUT = [[(20, 30), (20,)], [(7, 3, 2, 2)], [(11,), (11,)], [(40, 25)]]
SIZES = [620, 84, 22, 1000]
P2 = sum(SIZES)


def by_module(kind, dim=160, seed=3, separate=True):
    return make_projection(
        kind, P2, 0 if kind == "identity" else dim, seed, layout=LAYOUT, separate=separate
    )


def test_logra_of_a_weight_is_a_kronecker_product():
    ours = by_module("logra")
    _, left, right = ours.parts[0]._maps[0]
    x = grads(dim=P2)
    want = x[:, :600] @ torch.kron(left, right) + x[:, 600:620] @ ours.parts[0]._maps[600][2]
    torch.testing.assert_close(ours.project(x)[:, : ours.widths[0]], want, rtol=1e-4, atol=1e-5)


def test_logra_by_factors_equals_logra_of_the_formed_gradient():
    ours, g = by_module("logra"), torch.Generator().manual_seed(1)
    weight = OuterProductGrad(
        726, torch.randn(4, 6, 40, generator=g), torch.randn(4, 6, 25, generator=g)
    )
    vector = DenseGrad(704, torch.randn(4, 11, generator=g))
    out, row = torch.zeros(4, ours.proj_dim), torch.zeros(4, P2)
    for grad in (weight, vector):
        ours.add(out, grad)
        row[:, grad.offset : grad.offset + grad.numel] = grad.dense()
    torch.testing.assert_close(out, ours.project(row), rtol=1e-4, atol=1e-4)
    assert [ours.block_of(offset) for offset in (704, 726)] == [2, 3]
    assert by_module("logra", separate=False).block_of(726) == 0


def test_logra_keeps_inner_products_on_average():
    x = torch.nn.functional.normalize(grads(2, P2), dim=1)
    found = torch.stack(
        [(lambda z: z @ z.T)(by_module("logra", 640, seed).project(x)) for seed in range(80)]
    )
    standard_error = found.std(0) / 80**0.5
    assert ((found.mean(0) - x @ x.T).abs() < 4 * standard_error).all()
    assert standard_error.max() < 0.03


@pytest.mark.parametrize("kind", ["identity", "random_mask", "sjlt", "grass", "normal", "logra"])
def test_features_of_a_module_depend_on_its_gradient_alone(kind):
    x, ours = grads(dim=P2), by_module(kind)
    whole, part = ours.project(x), torch.zeros(len(x), ours.proj_dim)
    ours.accumulate(part, x[:, 620:704], 620)
    first, stop = ours.widths[0], sum(ours.widths[:2])
    torch.testing.assert_close(part[:, first:stop], whole[:, first:stop])
    assert not part[:, :first].any() and not part[:, stop:].any()
    assert sum(ours.widths) == ours.proj_dim == whole.shape[1]
    assert by_module(kind, separate=False).widths == [ours.proj_dim]
    if kind != "identity":
        assert max(ours.widths) <= 160 // 4
        assert not torch.allclose(by_module(kind, seed=4).project(x), whole)


def test_bad_requests_module_by_module_are_named():
    with pytest.raises(UserError, match="PROJ_DIM=3 leaves no feature for each of 4 modules"):
        by_module("logra", 3)
    with pytest.raises(UserError, match="module by module has no mask of a GPU"):
        make_projection("random_mask", P2, 160, 0, mask="a100", layout=LAYOUT)
