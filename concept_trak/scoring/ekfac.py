"""EK-FAC: the Gauss-Newton matrix of a network in its Kronecker-factored eigenbasis.

For a weight W [out, in] that sees inputs a_p and whose output has pseudo-gradients delta_p at the
positions p of a sample, G = sum_p delta_p a_p^T, v ~ N(0, I) the cotangent of eps_hat:

    A = E sum_p a_p a_p^T = Q_A L_A Q_A^T,    S = E sum_p delta_p delta_p^T = Q_S L_S Q_S^T
    s_ij = E (Q_S^T G Q_A)_ij^2                                     (the corrected eigenvalues)
    (F + lambda I)^-1 g = Q_S [(Q_S^T g Q_A)_ij / (s_ij + lambda)] Q_A^T,  lambda = damping mean(s)

E v v^T = I, so E vec(G) vec(G)^T = J^T J: the Gauss-Newton matrix of a squared error. A vector of
parameters (bias, norm) has its full block. Sources: George et al. 2018 (EK-FAC); Grosse et al.
2023 (influence with it); Mlodozeniec et al. 2025, "Influence functions for scalable data
attribution in diffusion models" (its expand form of K-FAC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import UserError
from ..gradients.sample_grads import DenseGrad, OuterProductGrad

FULL_BLOCK = 2**13  # numbers of a tensor whose own curvature is kept in full: half a gigabyte
Grads = Sequence[OuterProductGrad | DenseGrad]  # per-sample gradients of all parameter tensors


class Eigenbasis:
    """Eigenvectors of one parameter tensor, and its eigenvalues once they are known.

    left [out, out], right [in, in] of a weight; left None for a vector. values: flat, [out * in].
    """

    def __init__(self, left: torch.Tensor | None, right: torch.Tensor) -> None:
        self.left, self.right = left, right
        size = len(right) * (1 if left is None else len(left))
        self.values = torch.zeros(size, dtype=right.dtype, device=right.device)

    def rotate(self, grad: OuterProductGrad | DenseGrad) -> torch.Tensor:
        """[B, n]: per-sample gradients in the eigenbasis; a weight's are never formed outside."""
        if self.left is None or not isinstance(grad, OuterProductGrad):
            return grad.dense().to(self.right) @ self.right
        left, right = grad.delta.to(self.left) @ self.left, grad.a.to(self.right) @ self.right
        return (left.mT @ right).flatten(1)

    def back(self, flat: torch.Tensor) -> torch.Tensor:
        """[B, n] out of the eigenbasis."""
        if self.left is None:
            return flat @ self.right.T
        square = flat.view(len(flat), len(self.left), len(self.right))
        return (self.left @ square @ self.right.T).flatten(1)


class Ekfac:
    """(F + lambda I)^-1 of all selected parameters, block by block.

    Attributes: bases, one a parameter tensor, in coordinate order.
    """

    def __init__(self, bases: list[Eigenbasis]) -> None:
        self.bases = bases

    @classmethod
    def fit(cls, gradients: Callable[[], Iterable[Grads]]) -> Ekfac:
        """From pseudo-gradients, in two passes: factors, then eigenvalues.

        gradients: gives the same per-sample gradients, batch by batch, each time it is called.
        UserError when there is none, or they are not finite.
        """
        sums: list[list[torch.Tensor]] = []
        for grads in gradients():
            parts = [_factors(g) for g in grads]
            if not sums:
                sums = parts
            else:
                for known, part in zip(sums, parts, strict=True):
                    for total, new in zip(known, part, strict=True):
                        total += new
        if not sums or not all(m.isfinite().all() for known in sums for m in known):
            raise UserError("EK-FAC had no finite gradient; give gradients of at least one picture")
        found = cls([_basis(known) for known in sums])
        found._correct(gradients())
        return found

    def _correct(self, gradients: Iterable[Grads]) -> None:
        count = 0
        for grads in gradients:
            for basis, grad in zip(self.bases, grads, strict=True):
                basis.values += basis.rotate(grad).square().sum(0)
            count += _samples(grads[0])
        for basis in self.bases:
            basis.values /= count

    def rotate(self, grads: Grads) -> list[torch.Tensor]:
        """[B, n] of each tensor in its eigenbasis."""
        return [basis.rotate(grad) for basis, grad in zip(self.bases, grads, strict=True)]

    def divide(self, rotated: list[torch.Tensor], damping: float) -> list[torch.Tensor]:
        """Each divided by its s + lambda; damping in mean eigenvalues of the tensor."""
        return [
            part / (basis.values + damping * basis.values.mean().clamp_min(1e-30))
            for basis, part in zip(self.bases, rotated, strict=True)
        ]

    def solve(self, grads: Grads, damping: float) -> list[torch.Tensor]:
        """(F + lambda I)^-1 g of each tensor [B, n], in the parameters' own coordinates."""
        divided = self.divide(self.rotate(grads), damping)
        return [basis.back(part) for basis, part in zip(self.bases, divided, strict=True)]


def _samples(grad: OuterProductGrad | DenseGrad) -> int:
    return len(grad.a if isinstance(grad, OuterProductGrad) else grad.values)


def _factors(grad: OuterProductGrad | DenseGrad) -> list[torch.Tensor]:
    """[S, A] of a weight, [the full block] of a vector, summed over a batch; float64. UserError for
    a tensor that has no factors and too many numbers for a full block.
    """
    if not isinstance(grad, OuterProductGrad):
        if grad.numel > FULL_BLOCK:
            raise UserError(
                f"EK-FAC has no factors for a tensor of {grad.numel} numbers, as of an embedding "
                "or a grouped convolution; choose another LAYER"
            )
        values = grad.values.double()
        return [values.T @ values]
    delta, a = grad.delta.flatten(0, 1).double(), grad.a.flatten(0, 1).double()
    return [delta.T @ delta, a.T @ a]


def _basis(factors: list[torch.Tensor]) -> Eigenbasis:
    vectors = [torch.linalg.eigh(factor).eigenvectors.float() for factor in factors]
    return Eigenbasis(None, vectors[0]) if len(vectors) == 1 else Eigenbasis(vectors[0], vectors[1])
