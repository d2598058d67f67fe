"""Per-sample gradients of one parameter, in factors where they have some."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class OuterProductGrad:
    """Per-sample gradient of one weight matrix as sum_p delta[b, p, :] (x) a[b, p, :]; delta [B, P,
    out], a [B, P, in].
    """

    offset: int  # of this parameter's first coordinate
    delta: torch.Tensor
    a: torch.Tensor

    @property
    def numel(self) -> int:
        return self.delta.shape[-1] * self.a.shape[-1]

    def dense(self) -> torch.Tensor:
        """[B, out * in] float32."""
        return torch.bmm(self.delta.transpose(1, 2), self.a).flatten(1)

    def sq_norm(self) -> torch.Tensor:
        """[B] squared Frobenius norms, by whichever of the two routes costs less."""
        positions, out, inp = self.delta.shape[1], self.delta.shape[2], self.a.shape[2]
        if positions * (out + inp) < out * inp:
            return (
                torch.bmm(self.delta, self.delta.transpose(1, 2))
                * torch.bmm(self.a, self.a.transpose(1, 2))
            ).sum((1, 2))
        return self.dense().square().sum(1)

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        """[out * in]: the sum over samples, weighted by `weight` [B]."""
        delta = self.delta * weight[:, None, None]
        return (delta.flatten(0, 1).T @ self.a.flatten(0, 1)).flatten()

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """[B, m] the entries at flat positions `index` [m]."""
        row, column = index // self.a.shape[-1], index % self.a.shape[-1]
        return (self.delta[:, :, row] * self.a[:, :, column]).sum(1)


@dataclass
class DenseGrad:
    """Per-sample gradient of a small parameter (bias, norm, embedding): values [B, n]."""

    offset: int
    values: torch.Tensor

    @property
    def numel(self) -> int:
        return self.values.shape[1]

    def dense(self) -> torch.Tensor:
        return self.values

    def sq_norm(self) -> torch.Tensor:
        return self.values.square().sum(1)

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.values

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[:, index]


def module_layout(parameters: dict[str, nn.Parameter]) -> list[list[tuple[int, ...]]]:
    """Shapes of the selected parameters, those of one module together, in coordinate order."""
    owners = itertools.groupby(parameters, key=lambda name: name.rpartition(".")[0])
    return [[tuple(parameters[name].shape) for name in names] for _, names in owners]


def dense(grads: list) -> torch.Tensor:
    """[B, P] concatenated; for tests and small models only."""
    return torch.cat([g.dense() for g in grads], 1)
