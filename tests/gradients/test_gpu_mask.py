"""Properties of the masks rebuilt for GPUs: known answers of the generator, published masks,
refusals.
"""

import hashlib

import numpy as np
import pytest

from concept_trak.errors import UserError
from concept_trak.gradients import cuda_mask as gpu_mask_module
from concept_trak.gradients.cuda_mask import (
    GPUS,
    can_rebuild,
    generator_name,
    gpu_mask,
    key_bits,
    launch_threads,
    philox4x32,
)

ATTN2, K = 43_962_560, 2**15  # the released gradients
ONES = 2**32 - 1


def words(*counter, key):
    return [int(word) for word in philox4x32([np.uint64(value) for value in counter], key)]


@pytest.fixture(scope="session")
def published_masks():
    return {name: gpu_mask(name, ATTN2, K, 0) for name in ("a100", "h100")}


@pytest.mark.parametrize("counter, key, expected", [
    ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert words(*counter, key=key) == expected


def test_philox_of_arrays_is_philox_of_each_entry():
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint64)
    together = np.array(philox4x32(counters, (7, 11)))
    assert (together.T == [words(*column, key=(7, 11)) for column in counters.T]).all()


def test_thread_mapping_gives_the_known_first_values_of_torch_rand_on_cuda():
    """torch.manual_seed(0); torch.rand(5, device="cuda"): element i is word 0 of thread i."""
    zero, threads = np.uint64(0), np.arange(5, dtype=np.uint64)
    first, *_ = philox4x32((zero, zero, threads, zero), (0, 0))
    np.testing.assert_allclose(first / 2.0**32, [0.3990, 0.5167, 0.0249, 0.9401, 0.9459], atol=5e-5)


@pytest.mark.parametrize("name, start, last, digest", [
    ("a100", [129, 1404, 1545, 2599, 2753, 3945, 9334, 10507], 43961173,
     "21149cc34fa2cfcb01fc046f8f69763cb31e1424ca5ae2abc14f6b9799bf95ef"),
    ("h100", [129, 1404, 1545, 2599, 2753, 3945, 5806, 9334], 43962433,
     "b880198635ca91e112489c67d44b41f1c10419407bf8144c0d755ea8c27d652b"),
])  # fmt: skip
def test_masks_of_the_released_size_are_the_published_ones(
    published_masks, name, start, last, digest
):
    mask = published_masks[name]
    assert mask.dtype == np.int64 and mask.shape == (K,)
    assert mask[:8].tolist() == start and mask[-1] == last
    assert hashlib.sha256(mask.astype("<i8").tobytes()).hexdigest() == digest


def test_masks_of_two_gpus_share_almost_nothing(published_masks):
    assert len(np.intersect1d(published_masks["a100"], published_masks["h100"])) == 180


@pytest.mark.slow
@pytest.mark.parametrize("name, digest", [
    ("h200", "b880198635ca91e1"), ("h100-pcie", "4db8170cd4122375"), ("v100", "44f64b56d0ad43ad"),
    ("b200", "e83ea2fc083246d9"), ("rtx4090", "f3b4ace035bf199f"),
])  # fmt: skip
def test_other_masks_of_the_released_size_are_the_published_ones(name, digest):
    assert hashlib.sha256(gpu_mask(name, ATTN2, K, 0).tobytes()).hexdigest().startswith(digest)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_gives_a_mask_of_the_released_size(name):
    mask = gpu_mask(name, ATTN2, K, 0)
    assert len(mask) == K and (np.diff(mask) > 0).all() and 0 <= mask[0] and mask[-1] < ATTN2


def keys_one_by_one(threads, input_dim, seed):
    """The recipe, position by position."""
    keys = []
    for i in range(input_dim):
        turn, thread = divmod(i, threads)
        o = words(turn // 2, 0, thread, 0, key=(seed % 2**32, seed >> 32))
        keys.append(
            ((o[0] << 32) | o[1] if turn % 2 == 0 else (o[2] << 32) | o[3])
            % 2 ** key_bits(input_dim)
        )
    return keys


def test_mask_is_the_positions_of_the_smallest_keys(monkeypatch):
    monkeypatch.setattr(gpu_mask_module, "CHUNK", 1000)
    monkeypatch.setitem(GPUS, "small", (5, 2048))
    n, threads, seed = 30_100, 256 * 40, 5 * 2**32 + 3
    assert launch_threads("small", n) == threads
    order = np.argsort(keys_one_by_one(threads, n, seed), kind="stable")
    for k in (1, 700, n - 1, n):
        assert gpu_mask("small", n, k, seed).tolist() == sorted(order[:k].tolist())


def test_too_low_a_limit_is_raised_until_enough_keys_are_found(monkeypatch):
    draw = gpu_mask_module._draw.__wrapped__  # without its cache
    expected, limits, find = draw(40_960, 70_000, 500, 0), [], gpu_mask_module._small_keys

    def too_few_at_first(*args):
        limits.append(args[-1])
        return find(*args[:-1], args[-1] // (4 if len(limits) == 1 else 1))

    monkeypatch.setattr(gpu_mask_module, "_small_keys", too_few_at_first)
    assert (draw(40_960, 70_000, 500, 0) == expected).all()
    assert len(limits) == 2 and limits[1] > limits[0]


def test_masks_are_spread_evenly_and_follow_the_seed():
    mask = gpu_mask("a100", 1_000_000, 5000, 0)
    counts = np.bincount(mask // 100_000, minlength=10)
    assert np.abs(counts - 500).max() < 5 * 500**0.5
    assert len(np.intersect1d(mask, gpu_mask("a100", 1_000_000, 5000, 1))) < 25 + 5 * 25**0.5
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 3


def test_gpus_differ_only_where_one_has_run_out_of_threads():
    a100, h100 = (gpu_mask(name, 1_000_000, 5000, 0) for name in ("a100", "h100"))
    threads = launch_threads("a100", 1_000_000)
    few, many = sorted(
        [a100[a100 < threads], h100[h100 < threads]], key=len
    )  # same keys there, hardly another k-th smallest key
    assert np.isin(few, many).all() and len(many) < 1.02 * len(few)
    assert np.isin(a100[a100 >= threads], h100).mean() < 0.05
    assert (gpu_mask("a100", 100_000, 500, 0) == gpu_mask("h100", 100_000, 500, 0)).all()
    for alike, another, size in (("a100", "t4", 100_000), ("h200", "a100", ATTN2)):
        name = generator_name("h100", size)
        assert name == generator_name(alike, size) != generator_name(another, size)


@pytest.mark.parametrize("name, threads", [
    ("a100", 221184), ("h100", 270336), ("h100-pcie", 233472), ("v100", 163840), ("b200", 303104),
    ("rtx4090", 196608), ("t4", 40960),
])  # fmt: skip
def test_threads_of_the_published_table(name, threads):
    assert launch_threads(name, ATTN2) == threads


def test_sizes_without_a_certain_rule_are_refused():
    assert key_bits(ATTN2) == 54 and can_rebuild(ATTN2)
    assert not can_rebuild(0) and not can_rebuild(30_083) and can_rebuild(30_084)
    with pytest.raises(
        UserError, match="from 30083 coordinates cannot be rebuilt .PyTorch's releases"
    ):
        gpu_mask("a100", 30_083, 100, 0)
    with pytest.raises(UserError, match="dattri cuts so many"):
        gpu_mask("a100", 2**27, 100, 0)


def test_bad_requests_are_named():
    with pytest.raises(UserError, match="unknown GPU 'a1000'; set PROJ_MASK to one of a100"):
        gpu_mask("a1000", ATTN2, K, 0)
    with pytest.raises(UserError, match="cannot keep 50000 of 40000"):
        gpu_mask("a100", 40_000, 50_000, 0)
    with pytest.raises(UserError, match="PROJ_SEED from 0"):
        gpu_mask("a100", 40_000, 100, -1)
