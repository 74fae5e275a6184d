"""Complex numbers in a closure of real parameters, against dense matrices.

The first parameter has an odd length, so that pairs begin at odd places of flat vectors.
"""

import pytest
import torch
from helpers.problems import assert_near, dense_gauss_newton_by_rows, real
from torch import nn

from ngd_optim import NaturalCG, least_squares, linearize


class Net:
    """Not holomorphic: ``(h |h|) W₂*`` for ``h = tanh(s x W₁ + b)``, of more samples than are told apart row by row."""

    def __init__(self) -> None:
        self.params = [nn.Parameter(real(*shape)) for shape in [(3,), (4, 3, 2), (4, 2), (2, 4, 2)]]
        self.x = torch.complex(real(40, 3), real(40, 3))

    def __call__(self):
        s, *rest = self.params
        W1, b, W2 = map(torch.view_as_complex, rest)
        h = torch.tanh((self.x * s) @ W1.T + b)
        return (h * h.abs()) @ W2.conj().T


CLOSURES = {
    "both parts": lambda net: [torch.view_as_real(net())],
    "real and imaginary": lambda net: [net().real, net().imag],
    "moduli": lambda net: [net().abs()],
    "a transform": lambda net: [torch.fft.rfft(net().real, dim=0).abs()],
    "a cast": lambda net: [(net.params[0].to(torch.complex128) * net.x).imag],
}


@pytest.mark.parametrize("backend", ["double-backward", "torch.func"])
@pytest.mark.parametrize("name", CLOSURES)
def test_products_are_those_of_the_dense_matrix(name, backend):
    net = Net()

    dense = sum(
        dense_gauss_newton_by_rows(lambda r=r: r, least_squares, net.params)
        for r in CLOSURES[name](net)
    )
    point = linearize(lambda: least_squares(*CLOSURES[name](net)), net.params, backend=backend)
    assert_near(point.curvature.to_dense(), dense, 1e-10)


@pytest.mark.parametrize("solver", ["cg", "dense", "sample"])
@pytest.mark.parametrize("name", CLOSURES)
def test_every_solver_lowers_the_loss(name, solver):
    net = Net()
    optimizer = NaturalCG(net.params, solver=solver)
    losses = [optimizer.step(lambda: least_squares(*CLOSURES[name](net))).item() for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]


def test_complex_parameters_and_residuals_are_refused_with_a_way_out():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match=r"torch.view_as_real\(p\), and read it by torch.view_as_complex"
    ):
        NaturalCG([parameter]).step(lambda: parameter.abs().sum())
    with pytest.raises(TypeError, match=r"got torch.complex128; use torch.view_as_real\(r\)"):
        NaturalCG(Net().params).step(lambda: least_squares(Net()()))
