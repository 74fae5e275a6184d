"""Code written for version 0.1.0 finds every public name, argument and attribute; what is deprecated says so."""

import ast
import importlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ngd_optim
from ngd_optim import LinearSolution, NaturalCG, conjugate_gradient, least_squares, linearize
from ngd_optim.testing import check_closure

NAMES = json.loads(
    (Path(__file__).parents[1] / "helpers" / "saved_by_0_1_0" / "names.json").read_text()
)
MORE_IS_SHOWN = {"ngd_lightning.NaturalCGCallback": {"progress_bar"}}
"""Arguments whose defaults have grown."""


def find(path: str) -> Any:
    package, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(importlib.import_module(package), name)


def point_of(closure, *parameters):
    return linearize(closure, parameters)


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.3]]))


@pytest.mark.parametrize("path", NAMES)
def test_arguments_are_there_with_their_defaults(path):
    now = inspect.signature(find(path)).parameters
    for name, default in NAMES[path]["arguments"].items():
        if default is None:
            assert now[name].default is inspect.Parameter.empty
        elif name in MORE_IS_SHOWN.get(path, ()):
            assert set(ast.literal_eval(default)) < set(now[name].default)
        else:
            assert repr(now[name].default) == default, name


@pytest.mark.parametrize("path", [path for path in NAMES if "attributes" in NAMES[path]])
def test_attributes_are_there(path, weight):
    optimizer = NaturalCG([weight])
    optimizer.step(lambda: (weight**2).sum())
    instances = {
        "NaturalCG": optimizer,
        "StepReport": optimizer.last_step,
        "CGResult": conjugate_gradient(lambda v: 2 * v, torch.ones(3)),
        "Linearization": point_of(lambda: (weight**2).sum(), weight),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in NAMES[path]["attributes"]:
            assert hasattr(instances[path.rpartition(".")[2]], name), name


def test_the_former_name_of_a_solution():
    with pytest.warns(DeprecationWarning, match="use ngd_optim.LinearSolution") as caught:
        former = ngd_optim.CGResult
    assert former is LinearSolution
    assert caught[0].filename == __file__
    solution = former(torch.ones(2), 1, 1, 0.0, "tolerance", 3.0, 1.0)  # as 0.1.0 was called
    assert solution.x_dot_ax == 2.0
    assert isinstance(conjugate_gradient(lambda v: v, torch.ones(2)), former)
    with pytest.raises(AttributeError, match="CGresult"):
        _ = ngd_optim.CGresult


def test_former_attributes_of_a_linearization_say_what_they_said(weight):
    x, y = torch.randn(9, 2), torch.randint(0, 2, (9,))
    unused = torch.nn.Parameter(torch.ones(1))
    point = point_of(lambda: F.cross_entropy(x @ weight.T, y), weight, unused)
    v = torch.randn(5)

    def former(name, use):
        with pytest.warns(DeprecationWarning, match=f"{name} is deprecated .+ use") as caught:
            value = getattr(point, name)
        assert use in str(caught[0].message)
        assert caught[0].filename == __file__
        return value

    torch.testing.assert_close(former("product", "curvature")(v), point.curvature(v))
    torch.testing.assert_close(former("quick_diagonal", "diagonal()")(), point.diagonal())
    assert former("rounding", "finfo") == 10 * torch.finfo(torch.float32).eps * point.loss.item()
    assert former("reached", "check_closure") == [True, False]
    assert former("used", "check_closure") == [True, False]
    report = check_closure(
        lambda: F.cross_entropy(x @ weight.T, y), [("weight", weight), ("unused", unused)]
    )
    assert report.unused == ("unused",)
    assert not former("has_kl", "measure()")
    assert point.measure()[1] is None
    assert not former("is_least_squares", "what the closure calls")
    with pytest.raises(AttributeError, match="'Linearization' object has no attribute 'rank'"):
        _ = point.rank


def test_former_attributes_where_they_are_true(weight):
    x = torch.randn(9, 2)
    fit = point_of(lambda: least_squares(x @ weight.T), weight)
    with pytest.warns(DeprecationWarning, match="is_least_squares"):
        assert fit.is_least_squares

    def policy():
        dist = torch.distributions.Categorical(logits=x @ weight.T)
        return -dist.log_prob(torch.ones(9)).mean(), dist

    with pytest.warns(DeprecationWarning, match="has_kl"):
        assert point_of(policy, weight).has_kl
