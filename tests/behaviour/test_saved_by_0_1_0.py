"""What version 0.1.0 saved can be loaded, and training goes on from there."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import mlp
from helpers.problems import assert_near, flatten
from helpers.scripts import run_python

from ngd_optim import Diagonal, NaturalCG, Nystrom, StepReport, conjugate_gradient
from ngd_optim.kronecker import sampling

SAVED = Path(__file__).parents[1] / "helpers" / "saved_by_0_1_0"
PRECONDITIONERS = {"kfac": "kfac", "diagonal": Diagonal(probes=3), "nystrom": Nystrom(rank=2)}


def load_state_dicts():
    return torch.load(SAVED / "state_dicts.pt", weights_only=True)


def load_pickle():
    return pickle.loads((SAVED / "optimizer.pkl").read_bytes())


def draw_class_as_0_1_0(p, generator):
    return torch.multinomial(p, 1, generator=generator)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_a_state_dict_takes_the_step_that_came_next(name, monkeypatch):
    # That step renewed its factors.
    monkeypatch.setattr(sampling, "_draw_class", draw_class_as_0_1_0)
    saved = load_state_dicts()
    model = mlp(3, 4, 2).double()
    model.load_state_dict(saved[name]["model"])
    optimizer = NaturalCG(model.parameters(), lr=0.1, damping=7.0, preconditioner=None)
    optimizer.load_state_dict(saved[name]["optimizer"])
    assert optimizer.param_groups[0]["preconditioner"] == PRECONDITIONERS[name]
    before = flatten(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(saved["x"]), saved["y"]))
    step = flatten(saved[name]["next"].values()) - before
    assert_near(flatten(model.parameters()) - before, step, rtol=1e-10)
    assert optimizer.last_step.preconditioner == name


def test_the_step_that_came_next_needs_the_state():
    saved = load_state_dicts()
    model = mlp(3, 4, 2).double()
    model.load_state_dict(saved["nystrom"]["model"])
    before = flatten(model.parameters())
    optimizer = NaturalCG(model.parameters(), preconditioner=Nystrom(rank=2), damping=0.2)
    optimizer.step(lambda: F.cross_entropy(model(saved["x"]), saved["y"]))
    step = flatten(saved["nystrom"]["next"].values()) - before
    assert (flatten(model.parameters()) - before - step).norm() > 1e-3 * step.norm()


def test_a_pickled_optimizer_takes_the_step_that_came_next():
    saved, data = load_pickle(), load_state_dicts()
    model, optimizer = saved["model"], saved["optimizer"]
    assert type(optimizer) is NaturalCG
    assert optimizer.param_groups[0]["preconditioner"] == Diagonal(probes=3)
    before = flatten(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(data["x"]), data["y"]))
    step = flatten(data["diagonal"]["next"].values()) - before
    assert_near(flatten(model.parameters()) - before, step, rtol=1e-10)


def test_pickled_results_have_what_they_had():
    saved = load_pickle()
    report, solution = saved["report"], saved["solution"]
    assert type(report) is StepReport
    assert report.accepted
    assert report.preconditioner == "diagonal"
    assert report.as_dict().keys() == StepReport.__dataclass_fields__.keys()
    assert type(solution) is type(conjugate_gradient(lambda v: 2 * v, torch.ones(3)))
    assert torch.equal(solution.solution, torch.full((3,), 0.5))
    assert (solution.stop, solution.iterations) == ("tolerance", 1)


def test_a_pickle_is_loaded_where_nothing_was_imported_yet():
    load = (
        f"import pickle; pickle.load(open({str(SAVED / 'optimizer.pkl')!r}, 'rb'))['solution'].stop"
    )
    run_python("-c", load)
