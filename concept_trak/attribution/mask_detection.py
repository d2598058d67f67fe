"""Which mask made a header-less gradient artifact.

A masked store's columns are sorted coordinates, so a candidate mask says which parameter tensor,
and which part of it, every column belongs to. Gradients of different tensors (and attention heads)
differ in size, hence under the true mask the columns' RMS breaks exactly at the parts' first
columns; under another mask the breaks lie some tens of columns off. With z_j the normal score of
column j's RMS over a sample of rows (rank, then Gaussian quantile: no column can weigh much), n_p
and m_p the number and the mean of the columns of part p, a mask scores

    explained = sum_p n_p m_p^2 / sum_j z_j^2          log L = -k/2 ln(1 - explained)

the Gaussian log-likelihood of "z depends on the part alone". Compared are the CPU's mask, those of
all launches of `FAMILY` (of any GPU, whether its name is known or not: one with a few more threads
draws a similar mask, which must not pass for it), and `DECOYS` random ones, which are certainly
wrong. gain = log L - median of the decoys. A mask is recognised if its gain exceeds every other one
by `MIN_LEAD`, and that of every decoy by `MIN_SHARE` of itself, too: the first refuses noise and
settles the number of threads, the second refuses masks from elsewhere (another seed), for which the
candidates are only as good as decoys.

In simulated profiles of SD v1.4's layout (tensors differing by e^0.1 to e^1, heads by e^0 to e^0.4,
heavy-tailed scatter of e^0.7) none of 942 foreign masks passed, and of 210 masks of the family,
where tensors differed by e^0.3 or heads at all, 199 were recognised, 11 refused and none mistaken.
On gradients of the embedded emoji model (35 tensors, k = 4096, 32 and 96 rows) the masks of four
GPUs and the CPU's were recognised, those of two other seeds refused. Own method. No released
artifact was at hand to try it on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..gradients.cuda_mask import BLOCK, GPUS, can_rebuild, draw_masks, launch_threads
from ..gradients.projection import make_projection
from ..store.manifest import COMPUTE_HINT, RELEASE_HINT
from ..store.store import Store

SAMPLED_ROWS = 2048  # rows whose columns are measured, spread over the artifact
MIN_ROWS = 32  # fewer give no RMS worth the name
ROW_BATCH = 64  # rows in memory at a time
# Blocks of a launch: multiprocessors times 4, 6 or 8; the cards of GPUS lie between 160 and 1184.
FAMILY = range(100, 2001, 2)
DECOYS = 999
MAX_REPORTED = 10  # masks kept in the evidence
MIN_LEAD = 30.0  # in units of log L; pure noise spreads by sqrt(parts / 2), 16 for SD v1.4
MIN_SHARE = 0.35  # of the gain
# Runs of coordinates a tensor is cut into: the heads of SD v1.4's attention, whose rows lie
# together.
PARTS = 8
PART_COLUMNS = 8  # a tensor whose parts would expect fewer columns stays whole
RELEASE_SEED = 0  # the reference's proj_seed, which it never changes

# (name, numel or shape) of every masked parameter, in coordinate order
TensorLayout = Sequence[tuple[str, int | tuple[int, ...]]]


class AmbiguousMask(UserError):
    """The columns do not tell the mask: none explains them clearly better than every other one, or
    the rows are too few.
    """


def sd14_attn2_layout() -> list[tuple[str, tuple[int, ...]]]:
    """[(name, shape)] of the 80 cross-attention tensors of SD v1.4's UNet in coordinate order:
    down, up, then mid.

    Their 43,962,560 entries are P of the released gradients. Names and order are those of
    diffusers' `named_parameters`.
    """
    down, up = enumerate((320, 640, 1280)), ((1, 1280), (2, 640), (3, 320))
    blocks = [(f"down_blocks.{i}.attentions.{j}", width) for i, width in down for j in range(2)]
    blocks += [(f"up_blocks.{i}.attentions.{j}", width) for i, width in up for j in range(3)]
    layout = []
    for block, width in [*blocks, ("mid_block.attentions.0", 1280)]:
        square, text = (width, width), (width, 768)
        shapes = {"to_q": square, "to_k": text, "to_v": text, "to_out.0": square}
        names = {f"{name}.weight": shape for name, shape in shapes.items()}
        names["to_out.0.bias"] = (width,)
        prefix = f"{block}.transformer_blocks.0.attn2"
        layout += [(f"{prefix}.{name}", shape) for name, shape in names.items()]
    assert len(layout) == 80 and parameter_counts(layout).sum() == 43_962_560
    return layout


def identify_mask(
    source: Store | Path,
    layout: TensorLayout | None = None,
    dim: int | None = None,
    max_rows: int = SAMPLED_ROWS,
) -> tuple[str, dict]:
    """(mask, evidence): whose mask kept the columns of an artifact: "portable" or a key of GPUS.

    source: a Store, or (with dim) a folder of raw shards. layout: [(name, numel or shape)] of the
    masked parameters in coordinate order, default `sd14_attn2_layout()`. evidence (JSON): {"rows",
    "clear", "decoys": {"count", "best_gain"}, "masks": the best ones, [{"mask", "names": the GPUs
    that draw it, "threads", "explained", "gain"}, ...]}. Some 10 s and 400 MB for SD v1.4. Raises
    UnclearMask if no mask wins by the rule above and for fewer than MIN_ROWS rows; UserError if a
    GPU that is not in GPUS wins, and for a column of zeros, a row that is not finite and a width
    that does not fit the layout.
    """
    store = source if isinstance(source, Store) else Store.raw_shards(source, dim)
    sizes = parameter_counts(layout or sd14_attn2_layout())
    if store.dim >= sizes.sum():
        raise UserError(
            f"{store.folder} has {store.dim} columns, which no mask of {sizes.sum()} coordinates "
            "leaves; set PROJ_DIM and LAYER to those it was made with"
        )
    compared = compare_masks(column_scores(store, max_rows), sizes)
    evidence = {"rows": min(store.num_rows, max_rows), **compared}
    best = evidence["masks"][0]
    if not evidence["clear"]:
        shown = ", ".join(f"{_called(mask)} {mask['gain']:.0f}" for mask in evidence["masks"][:2])
        raise AmbiguousMask(
            f"{store.folder}: no mask clearly explains its columns (log-likelihood gains: "
            f"{shown}, best of {DECOYS} random masks "
            f"{evidence['decoys']['best_gain']:.0f}); set PROJ_MASK to the GPU that made it if "
            "you know it, else compute the train gradients again"
        )
    if best["mask"] is None:
        raise UserError(
            f"{store.folder} was made on a GPU that runs {best['threads'] // BLOCK} blocks of "
            f"{BLOCK} threads, not a known one; add it to GPUS in "
            f"concept_trak/gradients/cuda_mask.py, "
            "or make the train gradients again (about a minute for the embedded data): "
            f"{COMPUTE_HINT}"
        )
    return best["mask"], evidence


def _called(mask: dict) -> str:
    return mask["mask"] or f"a GPU of {mask['threads']} threads"


def column_scores(store: Store, max_rows: int = SAMPLED_ROWS) -> np.ndarray:
    """float64 [k]: normal scores of the columns' RMS over up to max_rows rows spread over the
    store. UserError as `identify_mask`.
    """
    if store.num_rows < MIN_ROWS:
        few = f"{store.num_rows} rows, too few to recognise its mask (at least {MIN_ROWS})"
        raise AmbiguousMask(f"{store.folder} has {few}; set PROJ_MASK to the GPU that made it")
    rows = np.linspace(0, store.num_rows - 1, min(store.num_rows, max_rows)).astype(np.int64)
    squares = np.zeros(store.dim)
    for start in range(0, len(rows), ROW_BATCH):
        block = store.rows(rows[start : start + ROW_BATCH])
        if not (finite := np.isfinite(block).all(axis=1)).all():
            bad = rows[start + np.flatnonzero(~finite)[0]]
            shard = int(np.searchsorted(store.bounds, bad, side="right")) - 1
            raise UserError(
                f"{store.folder}: the row of sample {bad} is NaN or infinite; {store.remedy(shard)}"
            )
        squares += np.square(block, dtype=np.float64).sum(0)
    if not squares.all():
        column, count = np.flatnonzero(squares == 0)[0], (squares == 0).sum()
        raise UserError(
            f"{store.folder}: column {column} ({count} in all) is zero in every sampled row, so it "
            f"is damaged or not a masked gradient; {RELEASE_HINT}"
        )
    from scipy.special import ndtri  # here: half a second of every start, of which few come here
    from scipy.stats import rankdata

    return ndtri((rankdata(squares) - 0.5) / store.dim)


def compare_masks(scores: np.ndarray, sizes: np.ndarray) -> dict:
    """The evidence of `identify_mask` for column scores [k] and tensor sizes [T]."""
    launches, breaks, decoy_breaks = _candidates(tuple(sizes.tolist()), len(scores))
    likelihood, explained = _fit(scores, breaks)
    decoys = _fit(scores, decoy_breaks)[0]
    middle = np.median(decoys)
    best_decoy = float(decoys.max() - middle)
    origins = [("portable", ["portable"], None)]
    origins += [(names[0] if names else None, names, g) for g, names in launches.items()]
    found = zip(origins, explained.tolist(), (likelihood - middle).tolist(), strict=True)
    masks = [
        {"mask": mask, "names": names, "threads": threads, "explained": share, "gain": gain}
        for (mask, names, threads), share, gain in found
    ]
    masks.sort(key=lambda mask: -mask["gain"])
    best, others = masks[0]["gain"], [mask["gain"] for mask in masks[1:]]
    clear = best - max([best_decoy, *others]) >= MIN_LEAD and best - best_decoy >= MIN_SHARE * best
    decoys_found = {"count": DECOYS, "best_gain": best_decoy}
    return {"clear": bool(clear), "decoys": decoys_found, "masks": masks[:MAX_REPORTED]}


@functools.lru_cache(maxsize=2)
def _candidates(
    sizes: tuple[int, ...], dim: int
) -> tuple[dict[int, list[str]], np.ndarray, np.ndarray]:
    """(launches, breaks, decoys' breaks): what `_fit` needs of the masks of dim columns: the CPU's,
    then one for each of `_launches`.
    """
    input_dim = sum(sizes)
    parts, launches = _parts(np.array(sizes), dim), _launches(input_dim)
    ends = np.cumsum(parts)[:-1]
    portable = make_projection("random_mask", input_dim, dim, RELEASE_SEED).indices.numpy()
    drawn = draw_masks(list(launches), input_dim, dim, RELEASE_SEED) if launches else ()
    breaks = np.array([np.searchsorted(indices, ends) for indices in chain([portable], drawn)])
    rng = np.random.default_rng(0)
    counts = rng.multivariate_hypergeometric(parts, dim, size=DECOYS, method="marginals")
    return launches, breaks, np.cumsum(counts, axis=1)[:, :-1]


def _launches(input_dim: int) -> dict[int, list[str]]:
    """{G: names of the GPUs that run so many threads}, in ascending order; empty if no mask of that
    size can be rebuilt.
    """
    if not can_rebuild(input_dim):
        return {}
    most = -(-input_dim // BLOCK)
    launches = {BLOCK * min(blocks, most): [] for blocks in FAMILY}
    for name in GPUS:
        launches.setdefault(launch_threads(name, input_dim), []).append(name)
    return dict(sorted(launches.items()))


def _parts(sizes: np.ndarray, dim: int) -> np.ndarray:
    """Sizes of the runs of coordinates that a mask of dim columns is judged by: every tensor, the
    large ones cut.
    """
    large = sizes * (dim / sizes.sum()) >= PARTS * PART_COLUMNS
    cut = np.diff(np.arange(PARTS + 1)[None] * sizes[:, None] // PARTS, axis=1)
    return np.concatenate([cut[t] if large[t] else sizes[t : t + 1] for t in range(len(sizes))])


def _fit(scores: np.ndarray, breaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log L, explained), each [c], of c masks given by the first column of every part but the
    first: breaks [c, parts - 1].
    """
    edge = np.zeros((len(breaks), 1), np.int64)
    bounds = np.concatenate([edge, breaks, edge + len(scores)], axis=1)
    sums = np.diff(np.concatenate([[0.0], np.cumsum(scores)])[bounds], axis=1)
    counts = np.maximum(np.diff(bounds, axis=1), 1)  # a part may have no column at all
    between = (sums**2 / counts).sum(1)
    explained = between / max(scores @ scores, 1e-300)
    return -len(scores) / 2 * np.log(np.maximum(1 - explained, 1e-12)), explained


def parameter_counts(layout: TensorLayout) -> np.ndarray:
    """int64 [T] numbers of entries of [(name, numel or shape)]."""
    return np.array([np.prod(shape, dtype=np.int64) for _, shape in layout])
