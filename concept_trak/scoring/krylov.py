"""Shifted Lanczos: solve (A + s_d I) z_d = q for all shifts s_d at once, with one product A v an
iteration.

The Krylov space of (A, q) is the same for every shift. With orthonormal basis V_m,
T_m = V_m^T A V_m tridiagonal (diagonal alpha_j, off-diagonal beta_j) and T_m + s I = L D L^T with
pivots d_1 = alpha_1 + s, d_{j+1} = alpha_{j+1} + s - beta_j^2 / d_j:

    z_m = ||q|| V_m (T_m + s I)^-1 e_1
    ||q - (A + s I) z_m|| / ||q|| = prod_{j<=m} beta_j / d_j    (that of CG)

The basis is kept and reorthogonalised in full, so small shifts converge as in exact arithmetic: at
most rank(A) + 1 iterations. Source: Paige & Saunders 1975; Frommer & Maass 1999 (shifted CG);
Parlett, "The symmetric eigenvalue problem", ch. 13.
"""

from __future__ import annotations

import torch

from ..errors import UserError
from .gram import SYMV_MAX, Product, gram_product

CHUNK = 32  # basis vectors allocated at a time
TOLERANCE = 1e-8  # relative residual at which Lanczos stops; scores are stored as float32
# Relative residual, recomputed from the solution, above which the answer is refused.
ACCEPTED_RESIDUAL = 1e-6
MAX_ITERATIONS = 1000


def gram_solutions(
    kernel: torch.Tensor, queries: torch.Tensor, lambdas: torch.Tensor, max_memory: int
) -> torch.Tensor:
    """`krylov_solutions` with K [k, k] in memory.

    After a symv scipy's threads spin for a while, and torch's, for what are tiny vectors, would
    wait for the cores: then torch keeps to one thread.
    """
    threads, on_cpu = torch.get_num_threads(), kernel.device.type == "cpu"
    by_symv = kernel.dtype == torch.float64 and on_cpu and len(queries) <= SYMV_MAX
    torch.set_num_threads(1 if by_symv else threads)
    try:
        return krylov_solutions(gram_product(kernel), queries, lambdas, max_memory)
    finally:
        torch.set_num_threads(threads)


def krylov_solutions(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, max_memory: int
) -> torch.Tensor:
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
            worst = lambdas[int(residual.max(dim=1).values.argmax())]
            raise UserError(
                f"the Krylov solver reached a relative residual of {residual.max():.1e} at lambda "
                f"= {worst:.1e} after {iterations} iterations; raise MAX_MEMORY or lower "
                "PROJ_DIM, so "
                "that it is solved directly"
            )
        solved.append(solution)
    return torch.cat(solved, dim=1)


def relative_residuals(
    product: Product, queries: torch.Tensor, lambdas: torch.Tensor, solutions: torch.Tensor
) -> torch.Tensor:
    """||(K + lambda_d I) z - q|| / ||q||: [D, Q]."""
    images = product(solutions.flatten(0, 1)).view_as(solutions)
    images = images + lambdas[:, None, None] * solutions
    return (images - queries).norm(dim=2) / _positive(queries.norm(dim=1))


def shifted_solve(
    product: Product,
    queries: torch.Tensor,
    shifts: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (A + s_d I) z = q for every shift and query; A symmetric positive semidefinite.

    product: [n, k] -> [n, k], rows v -> A v. queries: [Q, k] float64. shifts: [D] float64,
    positive. Returns solutions [D, Q, k] and the estimated relative residuals [D, Q] when all are
    <= tolerance or iterations run out. The queries advance together. Memory: 8 Q k bytes an
    iteration.
    """
    norms = queries.norm(dim=1)
    previous, vector = torch.zeros_like(queries), queries / _positive(norms)[:, None]
    basis, betas, pivots = _Basis(vector), [], []
    beta, scale = torch.zeros_like(norms), torch.zeros_like(norms)
    residual = (norms > 0).to(queries.dtype).expand(len(shifts), -1)
    for _ in range(max_iterations):
        basis.append(vector)
        image = product(vector)
        alpha = (image * vector).sum(1)
        pivot = alpha + shifts[:, None] - (beta**2 / pivots[-1] if pivots else 0)
        image = basis.remove_components(image - alpha[:, None] * vector - beta[:, None] * previous)
        scale = torch.maximum(scale, alpha.abs() + beta)
        beta = image.norm(dim=1)
        # Below rounding the query's invariant subspace is exhausted: a zero vector ends that query,
        # exactly solved.
        beta = torch.where(beta > 1e-14 * scale, beta, 0.0)
        following = torch.where(beta[:, None] > 0, image / _positive(beta)[:, None], 0.0)
        previous, vector = vector, following
        pivots.append(pivot)
        betas.append(beta)
        residual = residual * beta / pivot
        if residual.max() <= tolerance:
            break
    return basis.combine(_first_column_of_inverse(pivots, betas) * norms), residual


def _positive(norms: torch.Tensor) -> torch.Tensor:
    """Norms to divide by: the smallest positive number instead of zero."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _first_column_of_inverse(pivots: list[torch.Tensor], betas: list[torch.Tensor]) -> torch.Tensor:
    """(T + s I)^-1 e_1 from its L D L^T pivots: [m, D, Q]."""
    forward = [torch.ones_like(pivots[0])]
    for pivot, beta in zip(pivots[:-1], betas[:-1], strict=True):
        forward.append(-beta / pivot * forward[-1])
    solution = [forward[-1] / pivots[-1]]
    for j in range(len(pivots) - 2, -1, -1):
        solution.append((forward[j] - betas[j] * solution[-1]) / pivots[j])
    return torch.stack(solution[::-1])


class _Basis:
    """Orthonormal rows of each query's Krylov space, grown in chunks [Q, CHUNK, k] so that nothing
    is copied.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.like, self.length = like, 0
        self.chunks: list[torch.Tensor] = []

    def append(self, vector: torch.Tensor) -> None:
        if self.length % CHUNK == 0:
            self.chunks.append(self.like.new_zeros(len(vector), CHUNK, vector.shape[1]))
        self.chunks[-1][:, self.length % CHUNK] = vector
        self.length += 1

    def remove_components(self, vector: torch.Tensor) -> torch.Tensor:
        """Classical Gram-Schmidt, again where it took most of the vector away: orthogonal to
        working precision.

        Source: Daniel, Gragg, Kaufman & Stewart 1976, whose bound for "most" is 1 - 1/sqrt(2).
        """
        for _ in range(2):
            removed = sum(chunk.mT @ (chunk @ vector[:, :, None]) for chunk in self.chunks)[:, :, 0]
            before, vector = vector.norm(dim=1), vector - removed
            if (vector.norm(dim=1) > 0.7 * before).all():
                break
        return vector

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[m, D, Q] -> sum_j coefficients_j basis_j [D, Q, k]."""
        pieces = coefficients.permute(2, 1, 0).split(CHUNK, dim=2)  # each [Q, D, <= CHUNK]
        pairs = zip(pieces, self.chunks, strict=True)
        return sum(piece @ chunk[:, : piece.shape[2]] for piece, chunk in pairs).transpose(0, 1)
