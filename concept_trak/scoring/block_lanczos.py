"""Shifted block Lanczos: solve (A + s_d I) z = q for all shifts s_d and all queries at once, with
one product A V an iteration.

The Krylov space of A and the queries is the same for every shift, and queries share theirs: what
one finds of the head of the spectrum serves all. With orthonormal blocks V_j (rows), the
block-tridiagonal T (diagonal A_j, off-diagonal L_j, from V_j A = .. + L_j V_{j+1}), queries
Q = C V_1 and pivots D_1 = A_1 + s, D_{j+1} = A_{j+1} + s - L_j^T D_j^-1 L_j:

    f_1 = C,   f_{j+1} = - f_j D_j^-1 L_j
    z_m = y V,   y_m = f_m D_m^-1,   y_j = (f_j - y_{j+1} L_j^T) D_j^-1
    Q - z_m (A + s I) = f_{m+1} V_{m+1}

so residuals come with the recursion, for all shifts in the same block: where memory ends the method
starts again from V_{m+1}. The basis is reorthogonalised in full, so small shifts converge as in
exact arithmetic. Source: Paige & Saunders 1975; O'Leary 1980 (block CG); Frommer & Maass 1999
(shifted CG); Frommer & Simoncini 2008 (restarts); Parlett, "The symmetric eigenvalue problem",
ch. 13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import UserError
from .gram import SYMV_MAX, Product, gram_product

CHUNK = 32  # basis vectors allocated at a time, at least
TOLERANCE = 1e-8  # relative residual at which Lanczos stops; scores are stored as float32
# Relative residual, recomputed from the solution, above which the answer is refused.
ACCEPTED_RESIDUAL = 1e-6
MAX_ITERATIONS = 1000
MAX_BLOCK = 64  # blocks of a group's basis that fit in its memory, so that few groups start again
NEGLIGIBLE = 1e-14  # relative norm of a direction below which rounding is all that it holds
REFINEMENTS = 4  # solves again for what is left, where the product is not quite A's
PROBES = 4  # random mixtures of a shift's residuals that are recomputed in place of each


def gram_solutions(
    kernel: torch.Tensor, queries: torch.Tensor, lambdas: torch.Tensor, max_memory: int
) -> torch.Tensor:
    """`krylov_solutions` with K [k, k] in memory.

    After a symv scipy's threads spin for a while, and torch's, for what are tiny vectors, would
    wait for the cores: then torch keeps to one thread.
    """
    threads, on_cpu = torch.get_num_threads(), kernel.device.type == "cpu"
    by_symv = on_cpu and len(queries) <= SYMV_MAX
    torch.set_num_threads(1 if by_symv else threads)
    try:
        return krylov_solutions(gram_product(kernel), queries, lambdas, max_memory)
    finally:
        torch.set_num_threads(threads)


def krylov_solutions(
    product: Product,
    queries: torch.Tensor,
    lambdas: torch.Tensor,
    max_memory: int,
    exact: Product | None = None,
) -> torch.Tensor:
    """(K + lambda I)^-1 q, [D, Q, k], in groups of queries whose basis fits in half of max_memory.

    exact: a dearer product that is K's where `product` is K's up to rounding; residuals are
    recomputed with it, and what is left is solved for again.
    Raises UserError when a recomputed relative residual exceeds ACCEPTED_RESIDUAL.
    """
    rows = max(2, int(max_memory // 2 // (8 * queries.shape[1])))

    def solve(right: torch.Tensor, shifts: torch.Tensor, tolerance: float) -> torch.Tensor:
        return shifted_solve(product, right, shifts, tolerance, MAX_ITERATIONS, rows)[0]

    groups = queries.split(max(1, rows // MAX_BLOCK))
    if exact is None:
        solved = [
            _verified(product, part, lambdas, solve(part, lambdas, TOLERANCE)) for part in groups
        ]
    else:
        solved = [_refined(exact, part, lambdas, solve) for part in groups]
    return torch.cat(solved, dim=1)


def _verified(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, solution: torch.Tensor
) -> torch.Tensor:
    """The solution [D, Q, k]; UserError if a residual is too large."""
    found = relative_residuals(product, queries, lambdas, solution).amax(1)
    if found.max() > ACCEPTED_RESIDUAL:
        worst = int(found.argmax())
        raise UserError(
            f"the Krylov solver reached a relative residual of {found[worst]:.1e} at lambda = "
            f"{lambdas[worst]:.1e} after {MAX_ITERATIONS} iterations; raise MAX_MEMORY or lower "
            "PROJ_DIM, so that it is solved directly"
        )
    return solution


def _refined(
    exact: Product,
    queries: torch.Tensor,
    lambdas: torch.Tensor,
    solve: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """Iterative refinement (Wilkinson 1963): solve for the residuals of the shifts that the exact
    product finds too large, until there are none. solve: right-hand sides [n, k], shifts [d],
    relative residual at which to stop -> [d, n, k], not verified.

    The residuals of all such shifts are one block of right-hand sides, for which the solver gives
    all of them; each takes its own. It stops where the sum is good enough, a few steps on.
    """
    solution = solve(queries, lambdas, ACCEPTED_RESIDUAL / 10)
    for _ in range(REFINEMENTS):
        if few := len(queries) <= PROBES:
            left = residuals(exact, queries, lambdas, solution)
            found = (left.norm(dim=2) / _positive(queries.norm(dim=1))).amax(1)
        else:
            found = _sampled_residuals(exact, queries, lambdas, solution)
        some = (found > ACCEPTED_RESIDUAL).nonzero().flatten()
        if not len(some):
            return solution
        if few:  # a pass over all rows is dear
            left = left[some]
        else:
            left = residuals(exact, queries, lambdas[some], solution[some])
        enough = min(0.1, ACCEPTED_RESIDUAL / 4 / float(found.max()))
        again = solve(left.flatten(0, 1), lambdas[some], enough)
        own = again.view(len(some), len(some), *queries.shape).diagonal().movedim(-1, 0)
        solution[some] += own
    return _verified(exact, queries, lambdas, solution)


def _sampled_residuals(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, solutions: torch.Tensor
) -> torch.Tensor:
    """The largest relative residual over queries, [D], from one product with D PROBES + Q vectors
    in place of D Q.

    At the smallest shift, where rounding tells most, each query's is recomputed. At the others
    their root mean square is estimated, and taken times what the largest is above it at the
    smallest: the squared norm of a mixture of residuals with standard normal weights has the sum of
    their squares as its mean (Freivalds 1979; Hutchinson 1990).
    """
    generator = torch.Generator().manual_seed(len(queries))
    weights = torch.randn(PROBES, len(queries), generator=generator, dtype=torch.float64)
    norms = _positive(queries.norm(dim=1))
    weights = weights.to(queries.device) / norms
    mixed, least = weights @ solutions, int(lambdas.argmin())
    own = solutions[least]
    images = product(torch.cat([mixed.flatten(0, 1), own]))
    each = queries - images[-len(own) :] - lambdas[least] * own
    found = each.norm(dim=1) / norms
    above = found.max() / _positive(found.square().mean().sqrt())
    left = weights @ queries - images[: -len(own)].view_as(mixed) - lambdas[:, None, None] * mixed
    largest = (left.norm(dim=2).square().mean(1) / len(queries)).sqrt() * above
    largest[least] = found.max()
    return largest


def residuals(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, solutions: torch.Tensor
) -> torch.Tensor:
    """q - (K + lambda_d I) z: [D, Q, k]."""
    images = product(solutions.flatten(0, 1)).view_as(solutions)
    return queries - images - lambdas[:, None, None] * solutions


def relative_residuals(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, solutions: torch.Tensor
) -> torch.Tensor:
    """||(K + lambda_d I) z - q|| / ||q||: [D, Q]."""
    left = residuals(product, queries, lambdas, solutions)
    return left.norm(dim=2) / _positive(queries.norm(dim=1))


def shifted_solve(
    product: Product,
    queries: torch.Tensor,
    shifts: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    max_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (A + s_d I) z = q for every shift and query; A symmetric positive semidefinite.

    product: [n, k] -> [n, k], rows v -> A v. queries: [Q, k] float64. shifts: [D] float64,
    positive. max_rows: basis vectors to hold before it starts again; None: all. Returns solutions
    [D, Q, k] and the relative residuals [D, Q] of the recursion when all are <= tolerance or
    iterations run out. Memory: 8 Q k bytes an iteration.
    """
    norms = queries.norm(dim=1)
    coupling, block = _orthonormal(queries / _positive(norms)[:, None], NEGLIGIBLE)
    space = _Space(coupling.expand(len(shifts), -1, -1), block, shifts)
    solution = queries.new_zeros(len(shifts), *queries.shape)
    for _ in range(max_iterations):
        if space.right.norm(dim=2).max() <= tolerance or not len(space.block):
            break
        if max_rows and 0 < max_rows - len(space.block) < space.basis.length:
            solution += space.solution()
            space = _Space(space.right, space.block, shifts)
        space.extend(product)
    if space.basis.length:
        solution += space.solution()
    return solution * norms[:, None], space.right.norm(dim=2)


class _Space:
    """The Krylov space of a block, grown by a product at a time, with T's factors at all shifts.

    right: f_1 [D, Q, p], later what is left of the queries, f_{m+1}. block: V_1 [p, k], later
    V_{m+1}, of no rows when the space is exhausted.
    """

    def __init__(self, right: torch.Tensor, block: torch.Tensor, shifts: torch.Tensor) -> None:
        self.right, self.block, self.shifts = right, block, shifts
        self.previous, self.schur, self.scale = block[:0], block.new_zeros(()), 0.0
        self.basis = _Basis()
        self.factors: list[torch.Tensor] = []  # of D_j, lower triangles [D, p, p]
        self.forward: list[torch.Tensor] = []  # f_j [D, Q, p]
        self.couplings: list[torch.Tensor] = []  # L_j [p, p of the next]

    def extend(self, product: Product) -> None:
        """From V_m to V_{m+1}."""
        block = self.block
        image = product(block)
        inner = image @ block.T
        inner = (inner + inner.T) / 2
        rest = image - inner @ block
        if self.couplings:
            rest -= self.couplings[-1].T @ self.previous
        self.basis.append(block)
        rest = self.basis.remove_components(rest)
        norm = inner.diagonal().abs().max() + rest.norm(dim=1).max()
        self.scale = max(self.scale, float(norm))
        coupling, following = self._next(rest)

        identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
        # Cholesky: pivots of a positive definite matrix are. MKL's LU of a wide block never ends
        # in two threads once their number has been changed.
        pivots = inner + self.shifts[:, None, None] * identity - self.schur
        factors, failed = torch.linalg.cholesky_ex((pivots + pivots.mT) / 2)
        if failed.any():
            least = float(self.shifts[failed.nonzero()[0]])
            told = f"K + {least:.1e} is not positive definite as far as rounding lets it be seen"
            raise UserError(f"{told}; leave out so small a damping, or lower PROJ_DIM")
        along = torch.cholesky_solve(coupling.expand(len(self.shifts), -1, -1), factors)
        self.factors.append(factors)
        self.forward.append(self.right)
        self.couplings.append(coupling)
        self.schur, self.right = coupling.T @ along, -self.right @ along
        self.previous, self.block = block, following

    def _next(self, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(L_m, V_{m+1}) of what is left of an image. Directions far shorter than the image hold
        much of its rounding: they are made orthogonal to the basis once more.
        """
        coupling, block = _orthonormal(rest, NEGLIGIBLE * self.scale)
        if len(block) > 1:
            again, block = _orthonormal(self.basis.remove_components(block), 0.5)
            coupling = coupling @ again
        return coupling, block

    def solution(self) -> torch.Tensor:
        """y V, [D, Q, k]."""
        found: list[torch.Tensor] = []
        for factors, forward, coupling in zip(
            reversed(self.factors), reversed(self.forward), reversed(self.couplings), strict=True
        ):
            right = forward - found[-1] @ coupling.T if found else forward
            found.append(torch.cholesky_solve(right.mT, factors).mT)
        return self.basis.combine(torch.cat(found[::-1], dim=2))


def _orthonormal(rows: torch.Tensor, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(C [n, p], V [p, k]) with rows [n, k] = C V and V V^T = I, without directions of a norm of
    at most `smallest`.
    """
    q, r = torch.linalg.qr(rows.T)
    u, values, v = torch.linalg.svd(r, full_matrices=False)
    kept = values > smallest
    return v.T[:, kept] * values[kept], (q @ u[:, kept]).T.contiguous()


def _positive(norms: torch.Tensor) -> torch.Tensor:
    """Norms to divide by: the smallest positive number instead of zero."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


class _Basis:
    """Orthonormal rows, grown in chunks [>= CHUNK, k] so that nothing is copied."""

    def __init__(self) -> None:
        self.length = 0
        self.chunks: list[torch.Tensor] = []
        self.filled: list[int] = []  # rows of each chunk

    def append(self, block: torch.Tensor) -> None:
        if not self.chunks or self.filled[-1] + len(block) > len(self.chunks[-1]):
            self.chunks.append(block.new_zeros(max(CHUNK, len(block)), block.shape[1]))
            self.filled.append(0)
        self.chunks[-1][self.filled[-1] : self.filled[-1] + len(block)] = block
        self.filled[-1] += len(block)
        self.length += len(block)

    def remove_components(self, rows: torch.Tensor) -> torch.Tensor:
        """Classical Gram-Schmidt, again where it took most of a row away: orthogonal to working
        precision.

        Source: Daniel, Gragg, Kaufman & Stewart 1976, whose bound for "most" is 1 - 1/sqrt(2).
        """
        for _ in range(2):
            removed = sum((rows @ chunk.T) @ chunk for chunk in self.chunks)
            before, rows = rows.norm(dim=1), rows - removed
            if (rows.norm(dim=1) > 0.7 * before).all():
                break
        return rows

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[D, Q, m] -> sum_j coefficients_j basis_j [D, Q, k]."""
        pieces = coefficients.split(self.filled, dim=2)
        pairs = zip(pieces, self.chunks, self.filled, strict=True)
        return sum(piece @ chunk[:filled] for piece, chunk, filled in pairs)
