"""What ``check_closure`` tells of closures that are right, odd and wrong."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, Problem
from helpers.scripts import run_python
from torch import nn
from torch.distributions import Categorical, Normal

from ngd_optim.check import main
from ngd_optim.testing import check_closure

X, Y = torch.linspace(-1, 1, 120).sin().view(24, 5), torch.arange(24) % 3


class RoundedStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (5 * x).round() / 5

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


def mlp(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Tanh(), nn.Linear(8, 3))


def named(model):
    return list(model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_models_of_every_kind_are_right(name):
    problem = Problem(CASES[name], "cross_entropy", torch.float64)
    report = check_closure(problem.closure, named(problem.model))
    assert report.ok, report
    assert report.recognised == ("cross_entropy",)
    assert report.is_repeatable
    assert report.gradient_error < 1e-4
    assert report.product_error < 1e-4
    assert report.asymmetry < 1e-12
    assert report.product_cost > 0


def test_what_is_recognised():
    model = mlp()
    closures = {
        ("ggn", ("mse_loss", "cross_entropy")): lambda: (
            F.mse_loss(model(X)[:, 0], X[:, 0]) + F.cross_entropy(model(X), Y)
        ),
        ("ggn", ("kinks",)): lambda: model(X).abs().mean(),
        ("fisher", ("Categorical", "Normal")): lambda: (
            model(X).square().mean(),
            [Categorical(logits=model(X)), Normal(model(X), 1.0)],
        ),
        ("fisher", ("kl",)): lambda: (
            model(X).square().mean(),
            (model(X) - model(X).detach()).square().mean(),
        ),
        ("hessian", ()): lambda: model(X).square().mean().exp(),
    }
    for (kind, recognised), closure in closures.items():
        report = check_closure(closure, named(model))
        assert (report.kind, report.recognised) == (kind, recognised)
        assert report.ok, report


def test_a_closure_by_backward_is_told_what_it_leaves_out():
    model, unused = mlp(nn.Dropout(0.5)), nn.Parameter(torch.ones(2))

    def closure():
        model.zero_grad()
        z = model(X)
        loss = F.cross_entropy(z, Y) + (z.detach() * z).mean()
        loss.backward()
        return loss.detach()

    report = check_closure(closure, [*named(model), ("temperature", unused)])
    assert report.ok, report
    assert report.unused == ("temperature",)
    assert report.held == ("detached",)
    assert report.draws
    assert report.is_repeatable
    shown = str(report)
    assert "closure: right" in shown
    assert "with the same random numbers" in shown
    assert "does not depend on temperature" in shown
    model.eval()
    assert not check_closure(closure, named(model)).draws


def other_slope():
    model = mlp()
    return lambda: F.mse_loss(RoundedStraightThrough.apply(model(X)), X[:, :3]), named(model)


def another_models():
    model = mlp()
    return lambda: F.cross_entropy(model(X), Y), [nn.Parameter(torch.ones(3))]


def no_graph():
    model = mlp()
    return lambda: F.cross_entropy(model(X), Y).detach(), named(model)


def not_finite():
    model = mlp()
    return lambda: F.cross_entropy(model(X), Y) / 0, named(model)


@pytest.mark.parametrize(
    ("make", "sentence"),
    {
        other_slope: "gradient says",
        another_models: "depends on none of these parameters",
        no_graph: "the loss has no graph to differentiate",
        not_finite: "not finite",
    }.items(),
)
def test_what_is_wrong_is_a_problem(make, sentence):
    report = check_closure(*make())
    assert not report.ok
    assert any(sentence in problem for problem in report.problems), report
    assert "problem: " in str(report)


def test_another_loss_each_time_is_noted():
    model, batches = mlp(), iter(range(1, 1000))
    report = check_closure(lambda: F.cross_entropy(model(X) / next(batches), Y), named(model))
    assert report.ok
    assert not report.is_repeatable
    assert "another loss each time" in str(report)


def test_nothing_is_left_changed():
    """Parameters, gradients (of other tensors too), buffers, and the random numbers of torch, Python and NumPy."""
    numpy = pytest.importorskip("numpy")
    model, critic = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3)), nn.Linear(3, 1)
    generator, noise = torch.Generator().manual_seed(3), nn.Parameter(torch.ones(3))
    frozen = model[-1].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(8, 5)
    critic.weight.grad = torch.ones(1, 3)

    def closure():
        model.zero_grad(set_to_none=False)
        drawn = torch.randn(3, generator=generator) * random.random() * numpy.random.rand()
        loss = F.cross_entropy(model(X) + noise * drawn, Y) + critic(model(X)).square().mean()
        loss.backward()
        return loss

    tensors = [*model.parameters(), *model.buffers(), *critic.parameters(), noise]

    def everything():
        gradients = [None if t.grad is None else (id(t.grad), t.grad.tolist()) for t in tensors]
        values = [t.tolist() for t in tensors]
        states = [torch.get_rng_state().tolist(), generator.get_state().tolist()]
        return values, gradients, states, random.getstate(), repr(numpy.random.get_state())

    before = everything()
    report = check_closure(closure, [*named(model), ("noise", noise)])
    assert everything() == before
    assert not frozen.requires_grad
    assert report.kind == "ggn"

    def broken():
        closure()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_closure(broken, named(model))
    assert everything() == before


@pytest.mark.parametrize(
    ("closure", "params", "sentence"),
    [
        (3.0, [nn.Parameter(torch.ones(1))], "closure must be a function"),
        (lambda: None, nn.Linear(2, 2), "got a Linear"),
        (lambda: None, [("weight", 3)], "params must be tensors, or pairs"),
        (lambda: None, [torch.ones(2)], "no parameter has requires_grad"),
    ],
)
def test_bad_arguments_are_refused(closure, params, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        check_closure(closure, params)


MODULE = """
import torch
model = torch.nn.Linear(3, 2)

def right():
    x = torch.ones(4, 3)
    return lambda: torch.nn.functional.mse_loss(model(x), x[:, :2]), model

def wrong():
    return lambda: model(torch.ones(4, 3)).mean().detach(), model.parameters()

def without_params():
    return lambda: None

def of_arguments(size):
    pass
"""


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [
        ("mine:right", 0, "Gauss-Newton matrix of mse_loss"),
        ("mine:wrong", 1, "problem: the loss has no graph"),
        ("mine:without_params", 2, "must return (closure, params)"),
        ("mine:of_arguments", 2, "needs size"),
        ("mine:nothing", 2, "has no function 'nothing'"),
        ("theirs:right", 2, "there is no module 'theirs'"),
        ("mine.py:right", 2, "must be module:function"),
    ],
)
def test_from_the_command_line(target, status, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main([target]) == status
    shown = capsys.readouterr()
    assert text in shown.out + shown.err


def test_as_a_module_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    shown = run_python("-m", "ngd_optim.check", "mine:right", folder=tmp_path)
    assert shown.startswith("closure: right")
