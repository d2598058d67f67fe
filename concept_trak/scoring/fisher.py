"""Damped inverse Fisher, applied to the queries: (K + lambda I)^-1 q with K = X^T X, X [N, k] the
rows of a store.

lambda = damping * trace(K) / k, i.e. dampings are relative to the mean eigenvalue. No centring and
no 1/N (Park et al. 2023, TRAK; Park et al. 2025, Concept-TRAK). All dampings come from one
factorisation or one Krylov run; everything is float64.

| method | what it does | for |
|---|---|---|
| primal | K = Q L Q^T, z = Q (L + lambda)^-1 Q^T q | k of a few thousand at most |
| dual | X X^T = U S U^T, z = (q - X^T U (S + lambda)^-1 U^T X q) / lambda | N < k, N of a few thousand at most |
| krylov_gram | shifted Lanczos with K held in memory, cached beside the store | middling k, many queries |
| krylov_rows | shifted Lanczos with v -> X^T (X v) streamed from disk, K never formed | large k, few queries |
| (blocks) | primal in each block, K taken as block-diagonal (as K-FAC does: Martens & Grosse 2015) | BLOCKS=module |

Known limit: a K that only fits in memory as float32 (krylov_gram, large k) carries a rounding error
of about 1e-7 ||K||, which the smallest dampings may feel; krylov_rows has none.
"""

import os
import warnings

import numpy as np
import torch
from scipy.linalg.blas import dsymv

from ..errors import UserError
from ..files import sync_folder
from .krylov import shifted_solve

METHODS = ("auto", "primal", "dual", "krylov", "krylov_gram", "krylov_rows")
# largest side "auto" gives to a full eigendecomposition: seconds on one core, Krylov is faster
# beyond
DIRECT_MAX = 2048
TOLERANCE = 1e-8  # relative residual at which Lanczos stops; scores are stored as float32
ACCEPTED_RESIDUAL = (
    1e-6  # relative residual, recomputed from the solution, above which the answer is refused
)
MAX_ITERATIONS = 1000
STREAM_VALUES = (
    2**18
    # values of X widened at a time in a product: 2 MB of float64 stay in cache (1.5 times faster
    # than
    # 16 MB)
)
# vectors up to which one symv each is faster than one matrix product for all (k = 4096, two cores)
SYMV_MAX = 3
GRAM_ROWS, GRAM_TILE = 2048, 1024  # rows and columns of X in one matrix product of the Gram matrix


def precondition(
    store, queries, dampings, max_memory, method="auto", device="cpu", cache=True, widths=None
):
    """(K + lambda_d I)^-1 q for all dampings and queries: [D, Q, k] float64 numpy.

    widths: of blocks of features (`projection.Projection`) between which K is taken to be zero,
    each with a lambda of its own.

    queries: [Q, k] array. dampings: [D], relative to the mean eigenvalue. max_memory: bytes this
    call may hold. cache: keep the Gram matrix beside the store, named by the store's checksum.
    Raises UserError for queries of another width or not finite, dampings that are not positive, a
    store of zeros, a method that does not fit in max_memory, and a Krylov run that does not
    converge.
    """
    queries = torch.as_tensor(np.asarray(queries, dtype=np.float64), device=device)
    if queries.ndim != 2 or queries.shape[1] != store.dim:
        raise UserError(
            f"the query gradient has shape {list(queries.shape)} but {store.folder} holds rows of "
            f"{store.dim}"
        )
    if not queries.isfinite().all():
        raise UserError("the query gradient is NaN or infinite: compute it again")
    if min(dampings) <= 0:
        raise UserError(f"dampings must be positive, not {min(dampings)}")
    if widths is not None and len(widths) > 1:
        return _block_diagonal(store, queries, dampings, max_memory, widths).cpu().numpy()
    method = choose_method(store, len(queries), max_memory, method)
    solver = {
        "primal": _primal,
        "dual": _dual,
        "krylov_gram": _krylov_gram,
        "krylov_rows": _krylov_rows,
    }[method]
    return solver(store, queries, dampings, max_memory, cache).cpu().numpy()


def choose_method(store, num_queries, max_memory, method="auto"):
    """The concrete method: dual or primal when the smaller side is at most DIRECT_MAX, else Krylov
    with the cheaper product.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    rows, dim = store.num_rows, store.dim
    if method == "auto":
        if rows < dim and rows <= DIRECT_MAX and _dual_bytes(rows, dim) <= max_memory:
            return "dual"
        method = "primal" if dim <= DIRECT_MAX and _primal_bytes(dim) <= max_memory else "krylov"
    if method == "krylov":
        cached = os.path.exists(gram_path(store, torch.float64))
        fits = 8 * dim * dim <= max_memory // 2
        return "krylov_gram" if fits and (cached or _gram_pays(dim, num_queries)) else "krylov_rows"
    needed = {"dual": _dual_bytes(rows, dim), "primal": _primal_bytes(dim)}.get(method, 0)
    if needed > max_memory:
        raise UserError(
            f"method {method} needs {needed / 2**30:.1f} GiB: raise max_memory or use krylov"
        )
    return method


def _gram_pays(dim, num_queries, products=100, runs=4):
    """Is forming K cheaper than streaming X? Both cost N k times something, so N drops out.

    Seconds per value of X, measured on one 2020s server core: one float64 multiply-add of the Gram
    matrix 5e-11, used by `runs` calls; reading and widening 1.5e-9 and multiplying twice 0.5e-9 a
    query, each for about `products` Lanczos iterations.
    """
    return dim * 5e-11 / runs < products * (1.5e-9 + 0.5e-9 * num_queries)


def _primal_bytes(dim):
    return 5 * 8 * dim * dim  # K, its eigenvectors and the work space of syevd


def _dual_bytes(rows, dim):
    return 4 * rows * dim + 5 * 8 * rows * rows


def shifts(dampings, trace, dim, device="cpu"):
    """lambda = damping * trace(K) / k: [D] float64."""
    if not trace > 0:
        raise UserError("every row of the store is zero: nothing can be attributed")
    return torch.tensor(dampings, dtype=torch.float64, device=device) * (float(trace) / dim)


def trace(store, device="cpu"):
    """trace(K) = sum of the squares of all rows, one pass."""
    return sum(
        block.double().square().sum().item()
        for _, block in store.tensor_blocks(stream_rows(store.dim), device)
    )


def stream_rows(dim):
    """Rows of X to widen at a time."""
    return max(1, STREAM_VALUES // dim)


# ---- direct methods


def _primal(store, queries, dampings, max_memory, cache):
    return _eigh_solve(gram(store, max_memory, queries.device, cache).double(), queries, dampings)


def _eigh_solve(kernel, queries, dampings):
    values, vectors = torch.linalg.eigh(kernel)
    lambdas = shifts(dampings, kernel.trace(), len(kernel), queries.device)
    scaled = (queries @ vectors) / (values.clamp_min(0) + lambdas[:, None, None])
    return scaled @ vectors.T


def _block_diagonal(store, queries, dampings, max_memory, widths):
    """primal in each block, the blocks of K summed in one pass. A block without any gradient has no
    say.
    """
    if sum(widths) != store.dim:
        raise UserError(
            f"blocks of {sum(widths)} features do not fit {store.folder}, whose rows have "
            f"{store.dim}"
        )
    if (needed := sum(8 * w * w for w in widths) + _primal_bytes(max(widths))) > max_memory:
        raise UserError(
            f"{len(widths)} blocks of up to {max(widths)} features need {needed / 2**30:.1f} GiB: "
            "raise MAX_MEMORY or lower PROJ_DIM"
        )
    kernels = [torch.zeros(w, w, dtype=torch.float64, device=queries.device) for w in widths]
    for _, rows in store.tensor_blocks(gram_rows(store.dim, max_memory), queries.device):
        for kernel, part in zip(kernels, rows.split(widths, 1)):
            part = part.double()
            kernel.addmm_(part.T, part)
    shifts(
        dampings, sum(kernel.trace() for kernel in kernels), store.dim
    )  # refuses a store of zeros
    solved = [
        _eigh_solve(kernel, part, dampings)
        if kernel.trace() > 0
        else part.new_zeros(len(dampings), *part.shape)
        for kernel, part in zip(kernels, queries.split(widths, 1))
    ]
    return torch.cat(solved, 2)


def _dual(store, queries, dampings, max_memory, cache):
    """float64 throughout: at small lambda, q minus its projection on the rows is a difference of
    nearly equal numbers.
    """
    rows = torch.cat([block for _, block in store.tensor_blocks(store.num_rows, queries.device)])
    columns = range(0, store.dim, GRAM_TILE)
    inner = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=queries.device)
    for start in columns:
        piece = rows[:, start : start + GRAM_TILE].double()
        inner.addmm_(piece, piece.T)
    values, vectors = torch.linalg.eigh(inner)
    lambdas = shifts(dampings, inner.trace(), store.dim, queries.device)[:, None, None]
    along = sum(
        queries[:, s : s + GRAM_TILE] @ rows[:, s : s + GRAM_TILE].double().T for s in columns
    )  # X q: [Q, N]
    weights = ((along @ vectors) / (values.clamp_min(0) + lambdas)) @ vectors.T  # [D, Q, N]
    back = torch.cat([weights @ rows[:, s : s + GRAM_TILE].double() for s in columns], dim=2)
    return (queries - back) / lambdas


# ---- Krylov methods


def _krylov_gram(store, queries, dampings, max_memory, cache):
    kernel = gram(store, max_memory, queries.device, cache)
    lambdas = shifts(dampings, kernel.diagonal().double().sum(), store.dim, queries.device)
    return gram_solutions(kernel, queries, lambdas, max_memory)


def gram_solutions(kernel, queries, lambdas, max_memory):
    """`krylov_solutions` with K [k, k] in memory.

    After a symv scipy's threads spin for a while, and torch's, for what are tiny vectors, would
    wait for the cores: then torch keeps to one thread.
    """
    threads, product = torch.get_num_threads(), gram_product(kernel)
    by_symv = (
        kernel.dtype == torch.float64 and kernel.device.type == "cpu" and len(queries) <= SYMV_MAX
    )
    torch.set_num_threads(1 if by_symv else threads)
    try:
        return krylov_solutions(product, queries, lambdas, max_memory)
    finally:
        torch.set_num_threads(threads)


def _krylov_rows(store, queries, dampings, max_memory, cache):
    lambdas = shifts(dampings, trace(store, queries.device), store.dim, queries.device)
    return krylov_solutions(row_product(store), queries, lambdas, max_memory)


def gram_product(kernel):
    """v -> K v in float64 for rows v [n, k], K [k, k] held in float32 or float64."""
    if kernel.dtype == torch.float64 and kernel.device.type == "cpu":
        return lambda vectors: _symmetric_product(kernel.numpy(), vectors.numpy())
    if kernel.dtype == torch.float64:
        return lambda vectors: vectors @ kernel
    rows = stream_rows(len(kernel))
    return lambda vectors: torch.cat(
        [vectors @ kernel[s : s + rows].double().T for s in range(0, len(kernel), rows)], dim=1
    )


def _symmetric_product(kernel, vectors):
    """vectors @ kernel. A few vectors cost the time of reading K from memory, and symv reads half
    of it; torch has no symv.
    """
    if len(vectors) > SYMV_MAX:
        return torch.from_numpy(vectors @ kernel)
    transpose = kernel.T  # Fortran-ordered, so it is not copied
    return torch.from_numpy(np.stack([dsymv(1.0, transpose, vector) for vector in vectors]))


def row_product(store):
    """v -> X^T (X v) in float64 for v [n, k], streaming the store once a call."""

    def product(vectors):
        total = torch.zeros_like(vectors)
        for _, block in store.tensor_blocks(stream_rows(store.dim), vectors.device):
            block = block.double()
            total.addmm_(vectors @ block.T, block)
        return total

    return product


def krylov_solutions(product, queries, lambdas, max_memory):
    """(K + lambda I)^-1 q, [D, Q, k], by shifted Lanczos in groups of queries whose bases fit in
    half of max_memory.

    Raises UserError when a recomputed relative residual exceeds ACCEPTED_RESIDUAL.
    """
    dim = queries.shape[1]
    iterations = min(dim + 1, MAX_ITERATIONS)
    group = max(1, int(max_memory // 2 // (8 * dim * iterations)))
    solved = []
    for part in queries.split(group):
        solution, _ = shifted_solve(product, part, lambdas, TOLERANCE, iterations)
        residual = relative_residuals(product, part, lambdas, solution)
        if residual.max() > ACCEPTED_RESIDUAL:
            worst = int(residual.max(dim=1).values.argmax())
            raise UserError(
                f"the Krylov solver reached a relative residual of {residual.max():.1e} at lambda "
                f"= {lambdas[worst]:.1e} after "
                f"{iterations} iterations: drop the smallest dampings or use method primal or dual"
            )
        solved.append(solution)
    return torch.cat(solved, dim=1)


def relative_residuals(product, queries, lambdas, solutions):
    """||(K + lambda_d I) z - q|| / ||q||: [D, Q]."""
    images = (
        product(solutions.flatten(0, 1)).view_as(solutions) + lambdas[:, None, None] * solutions
    )
    return (images - queries).norm(dim=2) / queries.norm(dim=1).clamp_min(
        torch.finfo(queries.dtype).tiny
    )


# ---- the Gram matrix


def gram_path(store, dtype):
    """Where K is cached: the name carries the store's checksum, so a changed store never meets an
    old K.
    """
    return store.folder / f"gram-{str(dtype).removeprefix('torch.')}-{store.checksum[:16]}.npy"


def gram(store, max_memory, device="cpu", cache=True):
    """K = X^T X [k, k], float64 if that takes at most half of max_memory, else float32; read from
    the cache if it is there.
    """
    dtype = torch.float64 if 8 * store.dim**2 <= max_memory // 2 else torch.float32
    if 4 * store.dim**2 > 0.8 * max_memory:
        raise UserError(
            f"K takes {4 * store.dim**2 / 2**30:.1f} GiB: raise max_memory or use krylov_rows"
        )
    path = gram_path(store, dtype)
    if cache and path.exists():
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(device)
    kernel = compute_gram(store, dtype, max_memory, device)
    if cache:
        _save_gram(path, kernel)
    return kernel


def gram_rows(dim, max_memory):
    """Rows of X in one product of a Gram matrix."""
    return max(1, min(GRAM_ROWS, max_memory // 32 // (8 * dim)))


def compute_gram(store, dtype, max_memory, device="cpu"):
    """K by bands of its rows, each summed over the blocks of X in float64; products in `dtype`;
    only the upper half is computed.

    A float64 K is one band and its own accumulator. A float32 K takes one pass over X for each band
    of max_memory / 16 bytes.
    """
    dim = store.dim
    kernel = torch.zeros(dim, dim, dtype=dtype, device=device)
    whole = dtype == torch.float64
    height = dim if whole else max(1, min(dim, max_memory // 16 // (8 * dim)))
    rows = gram_rows(dim, max_memory)
    for top in range(0, dim, height):
        bottom = min(top + height, dim)
        strips = [
            (start, min(start + GRAM_TILE, bottom)) for start in range(top, bottom, GRAM_TILE)
        ]
        band = (
            kernel if whole else torch.zeros(bottom - top, dim, dtype=torch.float64, device=device)
        )
        for _, block in store.tensor_blocks(rows, device):
            block = block.to(dtype)
            for start, stop in strips:
                band[start - top : stop - top, start:] += block[:, start:stop].T @ block[:, start:]
        if not whole:
            kernel[top:bottom, top:] = band[
                :, top:
            ]  # left of it stands what earlier bands mirrored
        for start, stop in strips:  # columns of the lower half
            kernel[stop:, start:stop] = kernel[start:stop, stop:].T
    return kernel


def _save_gram(path, kernel):
    """A cache that cannot be written costs time, not the result."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            np.save(file, kernel.cpu().numpy(), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        for old in path.parent.glob("gram-*.npy"):
            old.unlink()
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        warnings.warn(
            f"the Gram matrix could not be cached at {path}: {error.strerror}", stacklevel=2
        )
