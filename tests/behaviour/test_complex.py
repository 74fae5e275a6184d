"""Complex parameters, outputs and numbers in between, against dense matrices and against runs on their real parts.

The first parameter is real and has an odd length, so that pairs begin at odd places of flat vectors.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, dense_gauss_newton_by_rows, jacobian_by_rows, real, seeded
from helpers.states import assert_same_state
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.distributions import Normal

from ngd_optim import KFAC, NaturalCG, Nystrom, estimate_covariance, least_squares, linearize
from ngd_optim.factors import kronecker_factors
from ngd_optim.testing import check_closure

SHAPES = [(4, 3), (4,), (2, 4)]


def complex_(*shape: int) -> Tensor:
    return torch.complex(real(*shape), real(*shape))


class Net:
    """Not holomorphic: ``(h |h|) W₂*`` for ``h = tanh(s x W₁ + b)``, of more samples than are told apart row by row.

    It is a function of complex parameters, or of real ones whose last dimension has both parts; with
    the same numbers.
    """

    def __init__(self, *, is_complex: bool = True) -> None:
        values = [complex_(*shape) for shape in SHAPES]
        self.params = [nn.Parameter(real(3))]
        self.params += [nn.Parameter(v if is_complex else torch.view_as_real(v)) for v in values]
        self.x, self.target = complex_(40, 3), complex_(40, 2)

    @staticmethod
    def evaluate(x: Tensor, s: Tensor, *rest: Tensor) -> Tensor:
        W1, b, W2 = (p if p.is_complex() else torch.view_as_complex(p) for p in rest)
        h = torch.tanh((x * s) @ W1.T + b)
        return (h * h.abs()) @ W2.conj().T

    def __call__(self) -> Tensor:
        return self.evaluate(self.x, *self.params[:4])

    @property
    def flat(self) -> Tensor:
        return flat(self.params)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All real parts, one after another."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def twins() -> tuple[Net, Net]:
    """On complex parameters, and on their real parts."""
    nets = []
    for is_complex in (True, False):
        torch.manual_seed(0)
        nets.append(Net(is_complex=is_complex))
    return nets[0], nets[1]


# Complex numbers in between: all parameters are real.

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
    _, net = twins()
    dense = sum(
        dense_gauss_newton_by_rows(lambda r=r: r, least_squares, net.params)
        for r in CLOSURES[name](net)
    )
    point = linearize(lambda: least_squares(*CLOSURES[name](net)), net.params, backend=backend)
    assert_near(point.curvature.to_dense(), dense, 1e-10)


@pytest.mark.parametrize("solver", ["cg", "dense", "sample"])
@pytest.mark.parametrize("name", CLOSURES)
def test_every_solver_lowers_the_loss(name, solver):
    _, net = twins()
    optimizer = NaturalCG(net.params, solver=solver)
    losses = [optimizer.step(lambda: least_squares(*CLOSURES[name](net))).item() for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]


# Complex parameters, and complex outputs.


def smooth_hessian(net: Net) -> Tensor:
    """Of a loss that is no Gauss-Newton one, dense, at the real parts."""

    def loss(theta: Tensor) -> Tensor:
        s, *parts = theta.split([3, *(2 * torch.Size(shape).numel() for shape in SHAPES)])
        pairs = [part.view(*shape, 2) for part, shape in zip(parts, SHAPES, strict=True)]
        z = net.evaluate(net.x, s, *(torch.complex(*pair.unbind(-1)) for pair in pairs))
        return (z - net.target).abs().pow(4).mean()

    return hessian(loss, net.flat)


def weighed(weights: Callable[[Tensor], Tensor | float]) -> Callable[[Net], Tensor]:
    """``Jᵀ diag(w) J`` for the real parts of the outputs, with a weight for each complex one."""

    def dense(net: Net) -> Tensor:
        z = net()
        J = jacobian_by_rows(torch.view_as_real(z), net.params)
        w = torch.as_tensor(weights((z - net.target).detach().abs()), dtype=torch.float64)
        return J.T @ (w.expand(z.shape).reshape(-1, 1).repeat_interleave(2, 0) * J)

    return dense


def irls(size: Tensor) -> Tensor:
    """That of ``mean |r|``: see ``irls_weight``."""
    return 1 / torch.maximum(size, torch.maximum(0.1 * size.median(), 0.01 * size.mean())) / 80


LOSSES: dict[str, tuple[Callable[[Net], Any], Callable[[Net], Tensor]]] = {
    "least squares": (lambda net: least_squares(net() - net.target), weighed(lambda r: 1 / 80)),
    "weights": (
        lambda net: least_squares(net() - net.target, weights=[torch.tensor([1.0, 3.0]).double()]),
        weighed(lambda r: torch.tensor([1.0, 3.0]).double() / 80),
    ),
    "robust": (
        lambda net: least_squares(net() - net.target, loss="cauchy", scale=2.0),
        weighed(lambda r: 1 / (1 + (r / 2) ** 2) / 80),
    ),
    "l1_loss": (lambda net: F.l1_loss(net(), net.target), weighed(irls)),
    "abs": (lambda net: (net() - net.target).abs().mean(), weighed(irls)),
    "mse_loss": (
        lambda net: F.mse_loss(torch.view_as_real(net()), torch.view_as_real(net.target)),
        weighed(lambda r: 2 / 160),
    ),
    "Fisher": (
        lambda net: (least_squares(net()), [Normal(net().real, 0.5), Normal(net().imag, 0.5)]),
        weighed(lambda r: 4 / 80),
    ),
    "Hessian": (lambda net: (net() - net.target).abs().pow(4).mean(), smooth_hessian),
}


@pytest.mark.parametrize("backend", ["double-backward", "torch.func"])
@pytest.mark.parametrize("name", LOSSES)
def test_of_complex_parameters_all_is_that_of_their_real_parts(name, backend):
    net, twin = twins()
    closure, dense = LOSSES[name]
    point = linearize(lambda: closure(net), net.params, backend=backend)
    matrix = dense(twin)
    assert_near(point.curvature.to_dense(), matrix, 1e-12)
    for v in (real(51), real(52)[1:]):  # also one that begins at an odd place
        assert_near(point.curvature(v), matrix @ v, 1e-12)
    assert_near(point.diagonal(), matrix.diagonal(), 1e-12)
    loss = closure(twin)
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert torch.equal(point.loss, loss)
    assert_near(point.gradient, flat(torch.autograd.grad(loss, twin.params)), 1e-12)


def test_blocks_and_eigenvalues():
    net, twin = twins()
    F_ = linearize(lambda: least_squares(net()), net.params).curvature
    dense = weighed(lambda r: 1 / 80)(twin)
    places = [*range(27, 35), *range(3, 27)]
    block = F_.block([net.params[2], net.params[1]])
    assert_near(block.to_dense(), dense[places][:, places], 1e-12)
    assert_near(F_.eigenvalues(3)[0], torch.linalg.eigvalsh(dense)[-3:], 1e-10)


STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "dense": {"solver": "dense"},
    "sample": {"solver": "sample"},
    "geodesic": {"geodesic": True},
    "cg": {"solver": "cg"},
    "kfac": {"solver": "cg", "preconditioner": "kfac"},
    "diagonal": {"solver": "cg", "preconditioner": "diagonal"},
    "nystrom": {"solver": "cg", "preconditioner": Nystrom(5)},
    "much": {"weight_decay": 0.1, "damping_scale": "diagonal", "momentum": 0.5, "max_kl": 1.0},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_on_the_real_parts_and_a_saved_run_goes_on(name):
    net, twin = twins()
    ours, theirs = (NaturalCG(one.params, **STEPS[name]) for one in (net, twin))
    for _ in range(3):
        losses = [
            optimizer.step(lambda one=one: LOSSES["least squares"][0](one))
            for optimizer, one in ((ours, net), (theirs, twin))
        ]
        assert_near(losses[0], losses[1], 1e-12)
    assert losses[0] < 2000
    assert_near(net.flat, twin.flat, 1e-12)
    for p, q in zip(net.params, twin.params, strict=True):
        for entry, like in ((ours.state[p], p), (theirs.state[q], q)):
            shaped = [v for v in entry.values() if isinstance(v, Tensor) and v.shape == like.shape]
            assert {v.dtype for v in shaped} == {like.dtype}
        assert_near(flat([ours.state[p]["solution"]]), flat([theirs.state[q]["solution"]]), 1e-10)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other, _ = twins()
    with torch.no_grad():
        for p, q in zip(other.params, net.params, strict=True):
            p.copy_(q)
    resumed = NaturalCG(other.params, **STEPS[name])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for optimizer, one in ((ours, net), (resumed, other)):
        optimizer.step(lambda one=one: LOSSES["least squares"][0](one))
    assert torch.equal(net.flat, other.flat)
    assert_same_state(ours.state_dict(), resumed.state_dict())


class WithLayers(Net):
    """Both parts of the outputs go through a real layer, which has Kronecker factors; complex ones have a diagonal."""

    def __init__(self, *, is_complex: bool) -> None:
        super().__init__(is_complex=is_complex)
        self.layer = nn.Linear(4, 3).double()
        self.params += self.layer.parameters()

    def __call__(self) -> Tensor:
        return self.layer(torch.view_as_real(super().__call__()).flatten(1))


def with_layers() -> tuple[Net, Net]:
    nets = []
    for is_complex in (True, False):
        torch.manual_seed(0)
        nets.append(WithLayers(is_complex=is_complex))
    return nets[0], nets[1]


@pytest.mark.parametrize("calls_backward", [True, False])
def test_kfac_steps_on_the_real_parts_and_a_saved_run_goes_on(calls_backward):
    net, twin = with_layers()
    labels = torch.randint(0, 3, (40,), generator=seeded())

    def closure_of(one: Net, optimizer: KFAC) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(one(), labels)
            if calls_backward:
                loss.backward()
            return loss

        return closure

    ours, theirs = (KFAC(one.params, weight_decay=0.01) for one in (net, twin))
    losses = []
    for _ in range(12):
        losses.append(ours.step(closure_of(net, ours)))
        theirs.step(closure_of(twin, theirs))
    assert losses[-1] < 0.7 * losses[0]
    assert_near(net.flat, twin.flat, 1e-12)
    assert ours.state[net.params[1]]["diagonal"].dtype == torch.complex128
    other, _ = with_layers()
    with torch.no_grad():
        for p, q in zip(other.params, net.params, strict=True):
            p.copy_(q)
    resumed = KFAC(other.params, weight_decay=0.01)
    resumed.load_state_dict(ours.state_dict())
    ours.step(closure_of(net, ours))
    resumed.step(closure_of(other, resumed))
    assert torch.equal(net.flat, other.flat)


def test_kronecker_factors_have_a_diagonal_of_both_parts():
    net, twin = with_layers()
    found = [
        kronecker_factors(
            lambda one=one: F.mse_loss(one(), torch.zeros(40, 3, dtype=torch.float64)),
            one.params,
            generator=seeded(),
        )
        for one in (net, twin)
    ]
    assert found[0].diagonals["params[1]"].shape == (4, 3, 2)
    assert_near(found[0].to_dense(), found[1].to_dense(), 1e-12)


def test_a_step_is_along_the_gradient_of_torch():
    """``p − lr · p.grad``, as in ``torch.optim.SGD``, where the damping is all there is."""
    net, other = twins()[0], twins()[0]
    optimizer = NaturalCG(
        net.params, damping=1e12, max_damping=1e12, adapt_damping=False, solver="cg"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = LOSSES["least squares"][0](net)
        loss.backward()
        return loss

    before = net.flat
    optimizer.step(closure)
    LOSSES["least squares"][0](other).backward()
    torch.optim.SGD(other.params, lr=1e-12).step()
    assert_near(1e8 * (net.flat - before), 1e8 * (other.flat - before), 1e-4)
    for p, q in zip(net.params, other.params, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_a_step_that_fails_leaves_conjugate_parameters_bit_for_bit():
    net, _ = twins()
    net.params[1:] = [nn.Parameter(p.detach().conj()) for p in net.params[1:]]
    assert net.params[1].is_conj()
    optimizer = NaturalCG(net.params)
    loss = optimizer.step(lambda: LOSSES["least squares"][0](net))
    assert optimizer.step(lambda: LOSSES["least squares"][0](net)) < loss
    before = [p.detach().clone() for p in net.params]

    def fails() -> Tensor:
        with torch.no_grad():
            net.params[1].mul_(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert all(torch.equal(p, old) for p, old in zip(net.params, before, strict=True))


def test_precisions_and_groups_may_be_mixed():
    net, twin = twins()
    for one in (net, twin):
        for i in (0, 2):
            narrow = one.params[i].detach()
            one.params[i] = nn.Parameter(
                narrow.to(torch.complex64 if narrow.is_complex() else torch.float32)
            )
    optimizers = [
        NaturalCG(
            [
                {"params": one.params[:2], "lr": 0.5},
                {"params": one.params[2:], "weight_decay": 0.1},
            ],
            adapt_damping=False,  # the less there is, the more the float32 of some parameters is magnified
        )
        for one in (net, twin)
    ]
    for _ in range(3):
        for optimizer, one in zip(optimizers, (net, twin), strict=True):
            loss = optimizer.step(lambda one=one: LOSSES["least squares"][0](one))
    assert loss < 200
    assert_near(net.flat, twin.flat, 1e-5)
    dtypes = [optimizers[0].state[p]["solution"].dtype for p in net.params]
    assert dtypes == [p.dtype for p in net.params]


def test_complex64_is_solved_in_float32():
    net, twin = twins()
    net.x, net.target = net.x.to(torch.complex64), net.target.to(torch.complex64)
    net.params = [nn.Parameter(p.detach().to(torch.complex64)) for p in net.params[1:]]
    point = linearize(lambda: least_squares(Net.evaluate(net.x, torch.ones(3), *net.params)), net.params)  # fmt: skip
    assert point.gradient.dtype == torch.float32
    twin.params[0] = nn.Parameter(torch.ones(3, dtype=torch.float64))
    dense = weighed(lambda r: 1 / 80)(twin)[3:, 3:]
    assert_near(point.curvature.to_dense().double(), dense, 1e-5)


def test_an_l1_penalty_sends_complex_numbers_to_zero():
    """The minimum of ``½ |z − y|² + c |z|`` is ``y`` shortened by ``c``, or 0."""
    y = torch.tensor([3 + 4j, 0.3 - 0.4j, -2j], dtype=torch.complex128)
    z = nn.Parameter(torch.ones_like(y))
    optimizer = NaturalCG([z])
    for _ in range(60):
        optimizer.step(lambda: 3 * least_squares(z - y) + z.abs().sum())
    expected = y * (1 - 1 / y.abs()).clamp(min=0)
    torch.testing.assert_close(z.detach(), expected, rtol=0, atol=2e-3)


def test_standard_errors_of_a_complex_mean():
    y = complex_(30)
    z = nn.Parameter(y.mean())
    found = estimate_covariance(lambda: least_squares(z - y), [z])
    # E|r|², of which each part has half: 60 numbers, and two parameters.
    variance = (y - y.mean()).abs().square().sum() / 29
    torch.testing.assert_close(found.variance, variance)
    torch.testing.assert_close(found.matrix, variance / 2 / 30 * torch.eye(2).double())
    with pytest.raises(ValueError, match=r"couples their two parts.*torch.view_as_real"):
        estimate_covariance(lambda: least_squares(z - y, loss="huber"), [z])


def test_a_complex_closure_is_found_right():
    net, _ = twins()
    report = check_closure(lambda: LOSSES["least squares"][0](net), net.params)
    assert report.ok
    assert report.outputs == 160


def test_what_is_refused():
    net, _ = twins()
    optimizer = NaturalCG(net.params)
    with pytest.raises(TypeError, match="must return a real loss, got one of dtype"):
        optimizer.step(lambda: net().mean())
    optimizer.step(lambda: LOSSES["least squares"][0](net))
    moduli = [nn.Parameter(p.detach().abs()) for p in net.params]
    with pytest.raises(ValueError, match=r"saved of a complex parameter .* this one is real"):
        NaturalCG(moduli).load_state_dict(optimizer.state_dict())
    of_real = NaturalCG(moduli)
    of_real.step(lambda: sum(p.square().sum() for p in moduli))
    with pytest.raises(ValueError, match="must be a tensor of its shape, complex if it is"):
        NaturalCG(net.params).load_state_dict(of_real.state_dict())
    with pytest.warns(UserWarning, match="ComplexHalf support is experimental"):
        half = nn.Parameter(torch.zeros(2, dtype=torch.complex32))
    with pytest.raises(TypeError, match=r"complex32 parameters are not supported.*use complex64"):
        NaturalCG([half]).step(lambda: half.abs().sum())
