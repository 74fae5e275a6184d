"""The energy of a wave function as a recognised loss, against sums over all states of a small chain."""

import logging

import pytest
import torch
from helpers.problems import assert_near, real
from torch import nn

from ngd_optim import NaturalCG, linearize
from ngd_optim.losses import variational_energy
from ngd_optim.testing import check_closure

SPINS, HIDDEN = 4, 3
STATES = torch.arange(2**SPINS)
X = (1 - 2 * ((STATES[:, None] >> torch.arange(SPINS)) & 1)).double()
BONDS = -(X * X.roll(-1, 1)).sum(1)
FLIPS = STATES[:, None] ^ (1 << torch.arange(SPINS))
H = torch.diag(BONDS).index_put(
    (STATES[:, None].expand(-1, SPINS), FLIPS), torch.tensor(-1.0).double()
)


def flat(tensors):
    """All real parts."""
    parts = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)
    return torch.cat([part.flatten() for part in parts])


class Problem:
    """A Boltzmann machine; ``"pairs"`` are complex numbers in real parameters, by their last dimension."""

    def __init__(self, kind: str) -> None:
        self.is_complex = kind != "real"
        shapes = [(SPINS,), (HIDDEN,), (HIDDEN, SPINS)]
        values = [0.3 * real(*shape, *[2] * self.is_complex) for shape in shapes]
        if kind == "complex":
            values = [torch.view_as_complex(value) for value in values]
        self.params = [nn.Parameter(value) for value in values]

    def log_psi(self, x):
        is_pairs = self.is_complex and not self.params[0].is_complex()
        read = torch.view_as_complex if is_pairs else (lambda p: p)
        a, b, W = map(read, self.params)
        x = x.to(a.dtype)
        return x @ a + (x @ W.T + b).cosh().log().sum(-1)

    def local_energy(self, log_psi):
        return BONDS - (log_psi[FLIPS] - log_psi[:, None]).exp().sum(1)

    def closure(self):
        log_psi = self.log_psi(X)
        with torch.no_grad():
            weights = 3 * (2 * log_psi.real).exp()  # which need not add up to 1
            energy = self.local_energy(log_psi)
        return variational_energy(log_psi, energy, weights)

    def truth(self):
        """Energy, gradient and metric, from the definition."""
        log_psi = self.log_psi(X)
        psi = log_psi.exp().detach()
        p = psi.abs().square() / psi.abs().square().sum()
        parts = torch.view_as_real(log_psi) if self.is_complex else log_psi[:, None]
        rows = [
            [flat(torch.autograd.grad(z, self.params, retain_graph=True)) for z in row]
            for row in parts
        ]
        slopes = torch.stack([torch.stack(row) for row in rows])
        re, im = slopes[:, 0], slopes[:, -1] if self.is_complex else 0 * slopes[:, 0]
        slopes = torch.complex(re, im)
        energy = ((psi.conj() @ (H.to(psi.dtype) @ psi)) / psi.abs().square().sum()).real
        centred = slopes - (p[:, None] * slopes).sum(0)
        local = self.local_energy(log_psi.detach())
        gradient = 2 * (centred.conj().T * p) @ (local - (p * local).sum()).to(slopes.dtype)
        return energy, gradient.real, 2 * ((centred.conj().T * p) @ centred).real


KINDS = ["real", "pairs", "complex"]


@pytest.mark.parametrize("backend", ["double-backward", "torch.func"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_gradient_and_metric(kind, backend):
    problem = Problem(kind)
    energy, gradient, metric = problem.truth()
    point = linearize(problem.closure, problem.params, backend=backend)
    assert point.kind == "ggn"
    assert_near(point.loss, energy, 1e-12)
    assert_near(point.gradient, gradient, 1e-12)
    assert_near(point.curvature.to_dense(), metric, 1e-12)
    loss = problem.closure()  # without a trace
    assert_near(loss.detach(), energy, 1e-12)
    assert_near(flat(torch.autograd.grad(loss, problem.params)), gradient, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_energy(kind):
    problem = Problem(kind)
    report = check_closure(problem.closure, problem.params)
    assert report.ok, report
    assert report.recognised == ("variational_energy",)
    assert report.gradient_error < 1e-6


@pytest.mark.parametrize("settings", [{}, {"solver": "sample"}, {"solver": "dense"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_find_the_ground_state_and_know_their_energies(kind, settings):
    problem = Problem(kind)
    settings = {"max_kl": 0.05, "damping": 1e-4, "max_backtracks": 30, **settings}
    settings["adapt_damping"] = "solver" in settings
    optimizer = NaturalCG(problem.params, **settings)
    for _ in range(40):
        before = problem.truth()[0]
        loss = optimizer.step(problem.closure)
        report = optimizer.last_step
        after = problem.truth()[0]
        assert_near(loss, before, 1e-10)
        assert abs(report.new_loss - after) < 1e-10
        assert after <= before + 1e-12
    assert after - torch.linalg.eigvalsh(H)[0] < 2e-3


def test_max_kl_bounds_the_infidelity():
    problem = Problem("complex")
    before = problem.log_psi(X).exp().detach()
    optimizer = NaturalCG(
        problem.params, max_kl=1e-4, trust_region="boundary", damping=1e-6, adapt_damping=False
    )
    optimizer.step(problem.closure)
    after = problem.log_psi(X).exp().detach()
    overlap = (before.conj() @ after).abs() ** 2 / (before.norm() * after.norm()) ** 2
    assert 1 - overlap == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_weighed_anew_at_trial_points(kind, caplog):
    """Of samples with the weights of the old state, the reported energy is that of the new one."""
    problem = Problem(kind)
    p = (2 * problem.log_psi(X).real.detach()).softmax(0)
    samples = torch.multinomial(p, 200_000, replacement=True)

    def closure():
        log_psi = problem.log_psi(X)
        with torch.no_grad():
            energy = problem.local_energy(log_psi)[samples]
        return variational_energy(log_psi[samples], energy)

    optimizer = NaturalCG(problem.params, max_kl=0.02, damping=1e-3)
    with caplog.at_level(logging.WARNING, "ngd_optim"):
        loss = optimizer.step(closure)
    assert not caplog.text  # the slope of so many samples is not quite the gradient
    after = problem.truth()[0]
    assert after < loss - 0.1
    assert optimizer.last_step.new_loss == pytest.approx(after.item(), abs=0.02)


def test_an_energy_that_cannot_be_replayed_is_refused():
    problem = Problem("real")

    def closure():
        with torch.no_grad():
            problem.params[0].clamp_(-5, 5)
        return problem.closure()

    with pytest.raises(RuntimeError, match="needs the closure's recording"):
        NaturalCG(problem.params).step(closure)


GOOD = torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((3.0, GOOD), TypeError, "log_psi must be a real or complex tensor, got float"),
        ((GOOD, GOOD.long()), TypeError, "local_energy must be a real or complex tensor"),
        ((GOOD[:2], GOOD), ValueError, "must have the same shape"),
        ((GOOD[:0], GOOD[:0]), ValueError, "must have the same shape"),
        ((GOOD[None], GOOD[None]), ValueError, "must have the same shape"),
        ((GOOD, GOOD, GOOD - 1), ValueError, "weights must be at least 0, got -1"),
        ((GOOD, GOOD, GOOD[:1]), ValueError, "weights must have the shape of log_psi"),
        ((GOOD, GOOD, [1, 2, 3]), TypeError, "weights must be a real tensor"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        variational_energy(*arguments)
