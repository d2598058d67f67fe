"""The coordinates dattri 0.3.0's `random_mask` keeps when it draws on a CUDA device, rebuilt on the
CPU in numpy.

    mask = sort(torch.randperm(n, generator=CUDA generator(seed))[:k])

randperm sorts the positions by random 64-bit keys, of which it compares the low `bits` bits. The
keys come from a grid-stride kernel of G threads, each with a Philox4x32-10 stream of its own, two
keys a call. With q = i div G, the key of position i is

    bits = ceil(log2(n - (6 n^2 + 1) / (12 ln 0.9)))
    G = 256 min(#SM floor(threads per SM / 256), ceil(n / 256))
    (o0, o1, o2, o3) = Philox(key = seed, counter = (q div 2, 0, i mod G, 0))
    key_i = 2^32 o0 + o1 if q is even, else 2^32 o2 + o3

so the mask is the k positions with the smallest key_i mod 2^bits. **G, and with it the mask,
depends on the GPU model.** (PyTorch also adds -2^63, which flips a bit that is not compared, and
sends the one key 2^64 - 1 to 0, which happens with chance n / 2^64.)

Sources: PyTorch's aten/src/ATen/native/cuda/Randperm.cu, Randperm.cuh and DistributionTemplates.h;
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox). Rebuilt from PyTorch's
sources; not compared with a real GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import UserError

# Resident threads per multiprocessor: {multiprocessors: names}, as CUDA reports them for the whole
# card (not for a MIG slice). Threads by compute capability: 2048 for 6.0, 7.0, 8.0, 9.0 and 10.0;
# 1536 for 8.6, 8.9 and 12.0; 1024 for 7.5.
_CARDS = {
    2048: {108: "a100", 132: "h100 h200 gh200", 114: "h100-pcie", 80: "v100", 148: "b200",
           56: "p100 a30"},
    1536: {128: "rtx4090", 76: "rtx4080", 170: "rtx5090", 142: "l40s l40 rtx6000-ada", 58: "l4",
           84: "a6000 a40 rtx3090ti", 82: "rtx3090", 80: "a10g rtx3080ti", 72: "a10", 64: "a5000"},
    1024: {40: "t4", 68: "rtx2080ti", 72: "titan-rtx"},
}  # fmt: skip
# name: (multiprocessors, resident threads). Cards with equal products draw the same mask; the first
# of them in this order gives it its name.
GPUS = {
    name: (multiprocessors, threads)
    for threads, cards in _CARDS.items()
    for multiprocessors, names in cards.items()
    for name in names.split()
}

BLOCK = 256  # threads of a block of PyTorch's distribution kernels
CHUNK = 2**14  # Philox calls at a time: the temporaries stay in cache
# From here on dattri cuts the gradient, called as the reference calls it (batch 16).
MAX_INPUT_DIM = (2**32 - 1) // 32 - 1

_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def key_bits(input_dim: int) -> int:
    """Bits of the sort keys that PyTorch's randperm compares: for a chance of 0.9 that no two of
    the n keys are equal.
    """
    n = float(input_dim)
    return min(64, math.ceil(math.log2(n - (6 * n * n + 1) / (12 * math.log(0.9)))))


def launch_threads(gpu_name: str, input_dim: int) -> int:
    """G: threads that fill input_dim keys on this GPU. UserError for a GPU that is not in GPUS."""
    if gpu_name not in GPUS:
        raise UserError(f"unknown GPU {gpu_name!r}; set PROJ_MASK to one of {', '.join(GPUS)}")
    multiprocessors, resident = GPUS[gpu_name]
    return BLOCK * min(multiprocessors * (resident // BLOCK), -(-input_dim // BLOCK))


def generator_name(gpu_name: str, input_dim: int) -> str:
    """What decides the mask beside sizes and seed, for a manifest: equal for GPUs that draw the
    same mask.
    """
    return f"torch philox4x32-10 (CUDA, {launch_threads(gpu_name, input_dim)} threads)"


def can_rebuild(input_dim: int) -> bool:
    """Whether the mask of that many coordinates follows from the recipe above (see `gpu_mask`)."""
    return input_dim > 1 and key_bits(input_dim) > 32 and input_dim <= MAX_INPUT_DIM


def gpu_mask(gpu_name: str, input_dim: int, proj_dim: int, seed: int) -> np.ndarray:
    """int64 [proj_dim]: the sorted coordinates a GPU (a key of GPUS) would have kept of input_dim
    ones. Read-only.

    Some 3 s and 10 MB for the 43,962,560 coordinates of SD v1.4's attn2. Raises UserError for an
    unknown GPU, a mask wider than input_dim, a negative seed, and sizes whose rule is not certain:
    up to 30,083 coordinates randperm draws 32-bit keys, in a way that changed between PyTorch
    releases; and above MAX_INPUT_DIM dattri draws several masks.
    """
    threads = launch_threads(gpu_name, input_dim)
    if not 1 <= proj_dim <= input_dim:
        raise UserError(
            f"random_mask cannot keep {proj_dim} of {input_dim} coordinates; lower PROJ_DIM"
        )
    if not 0 <= seed < 2**64:
        raise UserError(
            f"the mask of a GPU cannot be drawn from {seed}; set PROJ_SEED from 0 to 2^64 - 1"
        )
    if not can_rebuild(input_dim):
        reason = "PyTorch's releases draw them differently"
        if input_dim > MAX_INPUT_DIM:
            reason = "dattri cuts so many into several masks"
        raise UserError(
            f"the mask {gpu_name} draws from {input_dim} coordinates cannot be rebuilt "
            f"({reason}); set PROJ_MASK=portable"
        )
    return _draw(threads, input_dim, proj_dim, seed)


@functools.lru_cache(maxsize=64)
def _draw(threads: int, input_dim: int, proj_dim: int, seed: int) -> np.ndarray:
    """The mask of `gpu_mask` for G = threads."""
    (mask,) = draw_masks([threads], input_dim, proj_dim, seed)
    mask.setflags(write=False)
    return mask


def draw_masks(
    threads: Sequence[int], input_dim: int, proj_dim: int, seed: int, slack: float | None = None
) -> Iterator[np.ndarray]:
    """Yield the mask, int64 [proj_dim] sorted, for every G of `threads`, of sizes for which
    `can_rebuild`.

    All share one set of Philox calls: word and thread of a key do not depend on G, only its
    position does. A list from G1 to G2 costs about 1 + ln(G2 / G1) times one mask, and some
    milliseconds each. UserError if equal keys straddle the edge of a mask.
    """
    bits, values = key_bits(input_dim), 2 ** key_bits(input_dim)
    slack = slack or 10 * math.sqrt(proj_dim) + 100
    # Keys are uniform, so about proj_dim + slack of them lie below the limit; only those are kept
    # and sorted.
    limit = min(values, math.ceil(values * min(1.0, (proj_dim + slack) / input_dim)))
    keys, turns, thread = _small_keys((min(threads), max(threads)), input_dim, seed, bits, limit)
    order = np.argsort(keys, kind="stable")
    keys, turns, thread = keys[order], turns[order], thread[order]
    for count in threads:
        position = turns * count + thread
        inside = np.flatnonzero((thread < count) & (position < input_dim))[: proj_dim + 1]
        if len(inside) <= proj_dim and limit < values:
            yield from draw_masks([count], input_dim, proj_dim, seed, 4 * slack)
            continue
        if proj_dim < input_dim and keys[inside[-2]] == keys[inside[-1]]:
            raise UserError(
                f"seed {seed} gives two equal keys at the edge of the mask, which PyTorch settles "
                "at random; set PROJ_SEED to another"
            )
        yield np.sort(position[inside[:proj_dim]])


def _small_keys(
    threads: tuple[int, int], input_dim: int, seed: int, bits: int, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key mod 2^bits uint64, q int64, thread int64), each [m], of the keys below limit that any G
    from the fewest to the most threads uses.
    """
    fewest, most = threads
    key = seed & (2**32 - 1), seed >> 32
    compared, last = np.uint64(2**bits - 1), np.uint64(limit - 1)
    found = []
    for call in range(-(-input_dim // (2 * fewest))):
        # Position 2 call G + thread < n and thread < G: a late call is only reached by the small G.
        used = min(most, input_dim // (2 * call)) if call else most
        for start in range(0, used, CHUNK):
            thread = np.arange(start, min(start + CHUNK, used), dtype=np.uint64)
            words = philox4x32((np.uint64(call), np.uint64(0), thread, np.uint64(0)), key)
            for half in (0, 1):
                value = ((words[2 * half] << _HALF) | words[2 * half + 1]) & compared
                small = np.flatnonzero(value <= last)
                found.append((value[small], np.full(len(small), 2 * call + half), start + small))
    keys, turns, thread = (np.concatenate(column) for column in zip(*found, strict=True))
    return keys, turns, thread


def philox4x32(
    counter: Sequence[np.ndarray], key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ten rounds of Philox4x32: four uint64 arrays of 32-bit words.

    counter: four uint64 scalars or arrays of 32-bit words that broadcast (a scalar saves its share
    of the first rounds). key: two ints of 32 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return c0, c1, c2, c3
