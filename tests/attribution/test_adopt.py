"""Properties of recognising the mask of a header-less artifact and of adopting it."""

import json

import numpy as np
import pytest

from concept_trak.attribution import import_release
from concept_trak.attribution import mask_detection as recognising
from concept_trak.attribution.import_release import adopt_release, resolve_mask
from concept_trak.attribution.mask_detection import AmbiguousMask, identify_mask, sd14_attn2_layout
from concept_trak.errors import UserError
from concept_trak.gradients import cuda_mask as gpu_mask_module
from concept_trak.gradients.cuda_mask import GPUS, generator_name, gpu_mask
from concept_trak.gradients.projection import make_projection
from concept_trak.store.store import Store

K, ROWS = 2048, 128
# SD v1.4's cross-attention at a quarter of its widths: 2.8 million coordinates, enough for the
# GPUs' masks to differ.
LAYOUT = [(name, tuple(side // 4 for side in shape)) for name, shape in sd14_attn2_layout()]
P = sum(int(np.prod(shape)) for _, shape in LAYOUT)
FIRST = {generator_name(name, P): name for name in reversed(GPUS)}  # the first GPU of each mask
DISTINCT = ["portable", *FIRST.values()]


def mask(name, seed=0):
    return make_projection("random_mask", P, K, seed, mask=name).indices.numpy()


def write_artifact(folder, kept, rows=ROWS, contrast=0.8, shards=2, seed=0):
    """Raw shards of Gaussian rows whose columns' sizes depend on tensor and attention head, and
    scatter besides.
    """
    rng, offset = np.random.default_rng(seed), 0
    log_size = 0.3 * rng.standard_normal(len(kept))
    for _, shape in LAYOUT:
        stop = offset + int(np.prod(shape))
        inside = (kept >= offset) & (kept < stop)
        heads = rng.normal(rng.normal(0, contrast), contrast / 2, 8)
        log_size[inside] += heads[(kept[inside] - offset) * 8 // (stop - offset)]
        offset = stop
    values = (rng.standard_normal((rows, len(kept))) * np.exp(log_size)).astype(np.float32)
    for shard, block in enumerate(np.array_split(values, shards)):
        block.tofile(folder / f"train_grad-{shard}.npy")
    return folder


@pytest.mark.parametrize("name", DISTINCT)
def test_mask_of_an_artifact_is_recognised(tmp_path, name):
    found, evidence = identify_mask(write_artifact(tmp_path, mask(name), seed=len(name)), LAYOUT, K)
    first, second = evidence["masks"][:2]
    assert found == first["mask"] == name and name in first["names"]
    assert evidence["clear"] and evidence["rows"] == ROWS
    assert first["gain"] - second["gain"] >= recognising.MIN_LEAD
    assert first["gain"] * (1 - recognising.MIN_SHARE) >= evidence["decoys"]["best_gain"]
    assert json.loads(json.dumps(evidence)) == evidence


def test_layout_may_give_numbers_of_entries_for_shapes(tmp_path):
    write_artifact(tmp_path, mask("a100"))
    numbers = [(name, int(np.prod(shape))) for name, shape in LAYOUT]
    assert identify_mask(tmp_path, numbers, K) == identify_mask(tmp_path, LAYOUT, K)


# 862 and 866: the neighbours of an A100, 1054: of an H100
@pytest.mark.parametrize("blocks", [300, 862, 866, 1054, 1500])
def test_gpu_that_is_not_in_the_table_is_refused_by_its_number_of_threads(tmp_path, blocks):
    kept = gpu_mask_module._draw(256 * blocks, P, K, 0)
    told = f"made on a GPU that runs {blocks} blocks of 256 threads.* add it to GPUS"
    with pytest.raises(UserError, match=told) as error:
        identify_mask(write_artifact(tmp_path, kept, seed=blocks), LAYOUT, K)
    assert "\n" not in str(error.value)
    for stated in ("auto", "a100"):  # a statement that the columns contradict
        with pytest.raises(UserError, match=f"runs {blocks} blocks"):
            adopt_release(tmp_path, K, stated, LAYOUT)


@pytest.mark.parametrize("name", ["portable", "a100"])
def test_mask_of_another_seed_is_refused(tmp_path, name):
    told = "no mask clearly explains its columns .log-likelihood gains: .* random masks .*set PROJ"
    with pytest.raises(AmbiguousMask, match=told) as error:
        identify_mask(write_artifact(tmp_path, mask(name, seed=1)), LAYOUT, K)
    assert "\n" not in str(error.value)


def test_random_masks_and_noise_are_not_recognised():
    sizes, rng = recognising.parameter_counts(LAYOUT), np.random.default_rng(0)
    levels = rng.standard_normal(len(sizes))
    for _ in range(10):
        counts = rng.multivariate_hypergeometric(sizes, K, method="marginals")
        noise = rng.standard_normal((2, K))
        for profile in (np.repeat(levels, counts) + 0.3 * noise[0], noise[1]):
            scores = (profile - profile.mean()) / profile.std()
            assert not recognising.compare_masks(scores, sizes)["clear"]


def test_rows_that_differ_only_by_chance_are_refused(tmp_path):
    with pytest.raises(AmbiguousMask):
        identify_mask(write_artifact(tmp_path, mask("h100"), contrast=0.0), LAYOUT, K)


def test_damaged_narrow_and_short_artifacts_are_refused(tmp_path):
    def artifact(name, rows, width=K):
        (tmp_path / name).mkdir()
        rows.astype(np.float32).tofile(tmp_path / name / "train_grad-0.npy")
        return tmp_path / name, LAYOUT, width

    rows = np.random.default_rng(0).standard_normal((ROWS, K))
    zero, nan = rows.copy(), rows.copy()
    zero[:, [7, 9]], nan[40, 5] = 0, np.nan
    with pytest.raises(UserError, match=r"column 7 \(2 in all\) is zero"):
        identify_mask(*artifact("zero", zero))
    with pytest.raises(UserError, match="row of sample 40 is NaN"):
        identify_mask(*artifact("nan", nan))
    with pytest.raises(UserError, match="has 10 rows, too few"):
        identify_mask(*artifact("short", rows[:10]))
    with pytest.raises(UserError, match="not of 2047 float32 values"):
        identify_mask(*artifact("narrow", rows, K - 1))
    with pytest.raises(UserError, match="2048 columns, which no mask of 2000 coordinates"):
        identify_mask(artifact("wide", rows)[0], [("weight", (40, 50))], K)


def test_rows_are_read_in_small_batches_from_every_shard(tmp_path, monkeypatch):
    write_artifact(tmp_path, mask("a100"), rows=500, shards=4)
    read, rows = [], Store.rows
    monkeypatch.setattr(
        Store, "rows", lambda store, indices: read.append(list(indices)) or rows(store, indices)
    )
    _, evidence = identify_mask(tmp_path, LAYOUT, K, max_rows=150)
    asked = sum(read, [])
    assert (
        max(map(len, read)) <= recognising.ROW_BATCH and evidence["rows"] == len(set(asked)) == 150
    )
    assert np.bincount(np.array(asked) // 125).min() > 30


def test_adopted_release_answers_only_to_its_own_mask(tmp_path):
    store = adopt_release(write_artifact(tmp_path, mask("h100")), K, layout=LAYOUT)
    own, other = (
        make_projection("random_mask", P, K, 0, mask=name).describe() for name in ("h100", "a100")
    )
    assert store.identity == {"adopted": "raw float32", "projection": own}
    assert store.num_rows == ROWS
    assert store.manifest["provenance"]["mask"]["masks"][0]["names"] == ["h100", "h200", "gh200"]
    np.testing.assert_array_equal(
        Store.open(tmp_path, {"projection": own}).rows([5]), store.rows([5])
    )
    for wrong in (other, make_projection("random_mask", P, K, 0).describe()):
        with pytest.raises(UserError, match="identity.projection.generator|projection.generator"):
            Store.open(tmp_path, {"projection": wrong})


def test_adoption_is_done_once_and_then_compared(tmp_path, monkeypatch):
    first = adopt_release(write_artifact(tmp_path, mask("a100")), K, layout=LAYOUT)
    monkeypatch.setattr(import_release, "identify_mask", None)
    for stated in ("auto", "a100"):
        assert adopt_release(tmp_path, K, stated, LAYOUT).store_id == first.store_id
    with pytest.raises(UserError, match="=t4 but these train gradients were made with the mask a1"):
        adopt_release(tmp_path, K, "t4", LAYOUT)
    with pytest.raises(UserError, match="input_dim"):
        adopt_release(tmp_path, K, layout=LAYOUT[:-1])
    with pytest.raises(UserError, match="dim = 2048, not 1024"):
        adopt_release(tmp_path, 1024, layout=LAYOUT)
    (tmp_path / "train_grad-1.npy").write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        adopt_release(tmp_path, K, layout=LAYOUT)


def test_stated_mask_is_refused_if_the_columns_show_another(tmp_path):
    write_artifact(tmp_path, mask("a100"))
    with pytest.raises(UserError, match="PROJ_MASK=v100 but the columns of .* show the mask a100"):
        adopt_release(tmp_path, K, "v100", LAYOUT)
    with pytest.raises(UserError, match="PROJ_MASK='a1000' is unknown"):
        adopt_release(tmp_path, K, "a1000", LAYOUT)
    assert not (tmp_path / "manifest.json").exists()
    assert adopt_release(tmp_path, K, "a100", LAYOUT).identity["projection"]["seed"] == 0


@pytest.mark.parametrize("contrast, rows", [(0.0, ROWS), (0.8, recognising.MIN_ROWS - 1)])
def test_stated_mask_is_believed_where_the_columns_show_none(tmp_path, contrast, rows):
    write_artifact(tmp_path, mask("h100"), contrast=contrast, rows=rows)
    with pytest.raises(AmbiguousMask):
        adopt_release(tmp_path, K, layout=LAYOUT)
    store = adopt_release(tmp_path, K, "h200", LAYOUT)
    assert store.manifest["provenance"]["mask"]["stated"] == "h200"
    assert resolve_mask("auto", store.identity) == "h100"
    assert resolve_mask("h200", store.identity) == "h200"


def identity(name, kind="random_mask", backend="own"):
    projection = make_projection(kind, P, K, 0, mask=name, backend=backend)
    return json.loads(json.dumps({"projection": projection.describe()}))


def test_auto_means_the_stores_mask_or_portable_for_new_gradients():
    assert resolve_mask("auto") == "portable" and resolve_mask("v100") == "v100"
    for name in DISTINCT:
        assert resolve_mask("auto", identity(name)) == resolve_mask(name, identity(name)) == name
    others = ("grass", "own"), ("sjlt", "own"), ("random_mask", "dattri")
    for made in (identity("portable", *other) for other in others):
        assert resolve_mask("auto", made) == resolve_mask("portable", made) == "portable"
        with pytest.raises(UserError, match="PROJ_MASK=a100 but .* the mask portable"):
            resolve_mask("a100", made)


def test_another_mask_than_the_stores_is_refused_by_both_names():
    with pytest.raises(
        UserError, match="=portable but .* mask a100; set PROJ_MASK to auto or a100"
    ):
        resolve_mask("portable", identity("a100"))
    with pytest.raises(
        UserError, match="is unknown; set PROJ_MASK to auto, portable or one of a100"
    ):
        resolve_mask("gpu")
    with pytest.raises(UserError, match="do not record their mask; remove their manifest.json"):
        resolve_mask("auto", {"adopted": "raw float32"})
    foreign = identity("a100")
    foreign["projection"]["generator"] = "another"
    with pytest.raises(UserError, match="masked by 'another', which this version cannot rebuild"):
        resolve_mask("auto", foreign)


def test_layout_of_sd14_has_the_offsets_of_diffusers():
    layout = sd14_attn2_layout()
    ends = np.cumsum([int(np.prod(shape)) for _, shape in layout])
    starts = dict(zip((name for name, _ in layout), np.concatenate([[0], ends[:-1]]), strict=True))
    offsets = {
        "down_blocks.0.attentions.1": 696640,
        "up_blocks.1.attentions.0": 15487360,
        "up_blocks.3.attentions.2": 38021760,
        "mid_block.attentions.0": 38718400,
    }
    for module, offset in offsets.items():
        assert starts[f"{module}.transformer_blocks.0.attn2.to_q.weight"] == offset
    assert len(layout) == 80 and ends[-1] == 43_962_560


def test_layout_of_sd14_is_the_order_of_a_diffusers_unet():
    import torch
    from diffusers import UNet2DConditionModel

    from concept_trak.gradients.vjp import PerSampleVjp

    with torch.device("meta"):  # beside this width the defaults are those of SD v1.4
        parameters = PerSampleVjp(UNet2DConditionModel(cross_attention_dim=768), "attn2").parameters
    assert [(name, tuple(p.shape)) for name, p in parameters.items()] == sd14_attn2_layout()


@pytest.mark.parametrize("name, starts, bias", [
    ("a100", [0, 500, 1018, 2362, 3681, 7581, 11360, 15259, 19270, 23201, 24518, 25892, 27305,
              27811, 28321, 28793],
     [2361, 7578, 7579, 7580, 11358, 11359, 15257, 15258, 23200, 24516, 24517, 28791, 28792]),
    ("h100", [0, 489, 1030, 2357, 3714, 7613, 11393, 15375, 19217, 23237, 24600, 25951, 27262,
              27795, 28307, 28811],
     [7611, 7612, 11391, 11392, 15374, 19216, 25950, 27792, 27793, 27794, 32765, 32766, 32767]),
])  # fmt: skip
def test_released_columns_fall_into_the_published_tensors(name, starts, bias):
    layout, kept = sd14_attn2_layout(), gpu_mask(name, 43_962_560, 2**15, 0)
    tensor = np.searchsorted(np.cumsum([np.prod(shape) for _, shape in layout]), kept, side="right")
    assert np.searchsorted(tensor // 5, range(16)).tolist() == starts
    assert np.flatnonzero(tensor % 5 == 4).tolist() == bias
