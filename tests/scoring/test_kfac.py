"""EK-FAC against the exact Gauss-Newton matrix of small networks."""

import pytest
import torch
from torch import nn

from concept_trak.errors import UserError
from concept_trak.gradients.sample_grads import dense
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.scoring.ekfac import Ekfac

OUT = 3


class Net(nn.Module):
    """Two layers over four positions, and a bias: [B, 4, 5] -> [B, 4, 3]."""

    def __init__(self, linear):
        super().__init__()
        self.first = nn.Linear(5, 4, bias=False)
        self.second = nn.Linear(4, OUT)
        self.act = nn.Identity() if linear else nn.Tanh()

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def made(layer, linear=False, positions=4):
    """(network, inputs, tape's exact pseudo-gradients): every v of an orthogonal basis, scaled so
    that the mean of v v^T is I.
    """
    torch.manual_seed(0)
    network, x = Net(linear), torch.randn(12, positions, 5)

    def gradients():
        with PerSampleVjp(network, layer) as tape:
            for position in range(positions):
                for k in range(OUT):
                    v = torch.zeros(len(x), positions, OUT)
                    v[:, position, k] = (positions * OUT) ** 0.5
                    yield tape.vjp(network(x), v)

    return network, x, gradients


def gauss_newton(network, x, layer):
    """mean_i J_i^T J_i by autograd, one output at a time."""
    chosen, total = [p for n, p in network.named_parameters() if layer in n], 0
    for i in range(len(x)):
        out = network(x[i : i + 1]).flatten()
        for value in out:
            grads = torch.autograd.grad(value, chosen, retain_graph=True)
            row = torch.cat([g.flatten() for g in grads])
            total = total + torch.outer(row, row)
    return total / len(x)


def test_it_is_the_gauss_newton_matrix_where_that_is_a_kronecker_product():
    """The last layer of a network at one position: I (x) E[a a^T]."""
    network, x, gradients = made("second.weight", positions=1)
    exact, fitted = gauss_newton(network, x, "second.weight"), Ekfac.fit(gradients)
    (basis,) = fitted.bases
    vectors = torch.kron(basis.left, basis.right)
    torch.testing.assert_close(vectors @ torch.diag(basis.values) @ vectors.T, exact)
    grads = next(iter(gradients()))
    (solved,) = fitted.solve(grads, 0.1)
    shifted = exact + 0.1 * exact.diagonal().mean() * torch.eye(len(exact))
    want = torch.linalg.solve(shifted, dense(grads).T).T
    torch.testing.assert_close(solved, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["first.weight", "second.weight", "second.bias"])
def test_eigenvalues_are_the_diagonal_of_the_exact_matrix_in_its_basis(layer):
    network, x, gradients = made(layer)
    exact, (basis,) = gauss_newton(network, x, layer), Ekfac.fit(gradients).bases
    vectors = basis.right if basis.left is None else torch.kron(basis.left, basis.right)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(exact)), rtol=1e-4, atol=1e-5)
    want = (vectors.T @ exact @ vectors).diagonal()
    torch.testing.assert_close(basis.values, want, rtol=1e-3, atol=1e-4)


def test_it_is_nearer_to_the_exact_matrix_than_its_diagonal_is():
    network, x, gradients = made("first.weight")
    exact, (basis,) = gauss_newton(network, x, "first.weight"), Ekfac.fit(gradients).bases
    vectors = torch.kron(basis.left, basis.right)
    ours = vectors @ torch.diag(basis.values) @ vectors.T
    diagonal = torch.diag(exact.diagonal())
    assert (ours - exact).norm() < 0.7 * (diagonal - exact).norm()


def test_several_tensors_are_blocks_of_their_own():
    _, _, gradients = made("second")
    fitted, grads = Ekfac.fit(gradients), next(iter(gradients()))
    solved = fitted.solve(grads, 1.0)
    assert [part.shape[1] for part in solved] == [OUT * 4, OUT]
    (alone,) = Ekfac.fit(made("second.bias")[2]).solve(grads[1:], 1.0)
    torch.testing.assert_close(solved[1], alone)


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(UserError, match="EK-FAC had no"):
        Ekfac.fit(lambda: [])


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 12, 30, groups=4), nn.Embedding(100, 90)])
def test_a_tensor_without_factors_is_refused_beyond_what_a_full_block_holds(layer):
    x = torch.randint(100, (2, 3)) if isinstance(layer, nn.Embedding) else torch.ones(2, 4, 30, 30)
    with PerSampleVjp(nn.Sequential(layer), "weight") as tape:
        grads = tape.vjp(layer(x).flatten(1), torch.ones_like(layer(x).flatten(1)))
    with pytest.raises(UserError, match="no factors for a tensor of"):
        Ekfac.fit(lambda: [grads])
