"""A run can be followed without code: reports are remembered, logged, and shown in notebooks."""

import copy
import logging
import pickle
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngd_optim import KFAC, NaturalCG

BOTH = pytest.mark.parametrize("make", [NaturalCG, KFAC])


def problem():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    return model, lambda: F.cross_entropy(model(x), y)


@BOTH
def test_reports_are_remembered_in_order_and_by_copies(make):
    model, closure = problem()
    optimizer = make(model.parameters())
    assert list(optimizer.history) == []
    reports = []
    for _ in range(3):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
    assert list(optimizer.history) == reports
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert list(map(repr, clone.history)) == list(map(repr, reports))  # some fields are NaN
        assert clone.history is not optimizer.history
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(optimizer.history) == reports


@BOTH
def test_a_step_that_raises_is_not_remembered(make):
    model, closure = problem()
    optimizer = make(model.parameters())
    optimizer.step(closure)

    def interrupted():
        closure()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert list(optimizer.history) == [optimizer.last_step]


def test_the_oldest_are_given_up():
    model, closure = problem()
    optimizer = KFAC(model.parameters())
    longest = optimizer.history.maxlen
    optimizer.history.extend([None] * longest)
    optimizer.step(closure)
    assert len(optimizer.history) == longest
    assert optimizer.history[-1] is optimizer.last_step


@BOTH
def test_each_step_is_a_line_of_the_log(make, caplog: pytest.LogCaptureFixture):
    model, closure = problem()
    optimizer = make(model.parameters())
    optimizer.step(closure)
    assert not caplog.records  # unless one asks for them
    with caplog.at_level(logging.INFO, logger="ngd_optim"):
        optimizer.step(closure)
    (line,) = caplog.messages
    assert f"{optimizer.last_step.loss:.6g}" in line
    assert line.endswith("accepted")
    assert "\n" not in line


class Cells(HTMLParser):
    """The texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@BOTH
def test_notebooks_show_settings_and_the_last_step(make):
    model, closure = problem()
    optimizer = make(model.parameters(), damping=0.03)

    def texts():
        cells = Cells()
        cells.feed(optimizer._repr_html_())
        return cells.texts

    assert f"{make.__name__}: 15 parameters" in texts()
    assert texts()[texts().index("damping") + 1] == "0.03"
    assert "reason" not in texts()
    optimizer.step(closure)
    assert set(optimizer.last_step.as_dict()) <= set(texts())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert f"{make.__name__}: 17 parameters in 2 groups; the first one's settings" in texts()


def test_html_is_escaped():
    model, _ = problem()

    def precondition(r):
        return r

    precondition.__qualname__ = "<script>"
    shown = NaturalCG(model.parameters(), preconditioner=precondition)._repr_html_()
    assert "<script>" not in shown


def test_a_line_has_no_loss_where_none_is_known():
    model, closure = problem()
    optimizer = KFAC(model.parameters())
    optimizer.step(closure)
    assert str(optimizer.last_step).startswith("loss 1.")
    with optimizer.watch():
        loss = closure()
    loss.backward()
    optimizer.step()
    assert str(optimizer.last_step).startswith("‖d‖ ")
