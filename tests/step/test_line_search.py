"""The line search, by tables of functions."""

import math

import pytest

from ngd_optim.step.line_search import line_search


def search(objective_at, kl_at=lambda fraction: None, **settings):
    """A line search from objective 1 with slope −1, and the fractions that it tried."""
    tried = []

    def evaluate(fraction):
        tried.append(fraction)
        return objective_at(fraction), kl_at(fraction)

    defaults = {"max_kl": 0.1, "max_backtracks": 10, "backtrack_ratio": 0.5}
    return line_search(evaluate, 1.0, -1.0, **(defaults | settings)), tried


ACCEPTED = [
    # objective(fraction), kl(fraction), settings, fraction accepted
    (lambda f: 0.5, lambda f: None, {}, 1.0),
    (lambda f: 0.5, lambda f: 0.1, {}, 1.0),
    (lambda f: 0.5, lambda f: 100.0, {"max_kl": None}, 1.0),
    (lambda f: 0.5, lambda f: 0.35 * f, {}, 0.25),
    (lambda f: 2.0 if f > 0.3 else 0.9, lambda f: None, {}, 0.25),
    (lambda f: math.nan if f > 0.2 else 0.9, lambda f: None, {}, 0.125),
    (lambda f: math.inf if f > 0.2 else 0.9, lambda f: None, {}, 0.125),
    (lambda f: -math.inf if f > 0.6 else 0.9, lambda f: None, {}, 0.5),
    (lambda f: 0.9, lambda f: math.nan if f > 0.6 else 0.0, {}, 0.5),
    (lambda f: 0.9, lambda f: math.nan if f > 0.6 else 0.0, {"max_kl": None}, 0.5),
    # Sufficient decrease, 1e-4 of the slope: 1 − 0.5e-4 falls, and not enough for the full step.
    (lambda f: 1 - 0.5e-4, lambda f: None, {}, 0.5),
    (lambda f: 2.0, lambda f: 9.0, {"max_backtracks": 0, "requires_decrease": False}, 1.0),
    (lambda f: f - 1 if f < 0.4 else 3.0, lambda f: None, {"backtrack_ratio": 0.8}, 0.8**5),
]


@pytest.mark.parametrize(("objective", "kl", "changed", "fraction"), ACCEPTED)
def test_accepts_the_first_good_point(objective, kl, changed, fraction):
    trial, tried = search(objective, kl, **changed)
    ratio = changed.get("backtrack_ratio", 0.5)
    assert tried == [ratio**i for i in range(len(tried))]
    assert trial.accepted
    assert (trial.fraction, tried[-1]) == (fraction, fraction)
    assert trial.backtracks == len(tried) - 1
    assert (trial.objective, trial.kl) == (objective(fraction), kl(fraction))
    said = {0: "accepted", 1: "accepted after 1 backtrack"}
    assert trial.reason == said.get(
        trial.backtracks, f"accepted after {trial.backtracks} backtracks"
    )


REJECTED = [
    (lambda f: 1.5, lambda f: None, {}, "its loss 1.5 is above 1"),
    (
        lambda f: 1.0,
        lambda f: None,
        {},
        "its loss falls by 0, less than 0.0001 of what the slope promises",
    ),
    (lambda f: math.nan, lambda f: None, {}, "its loss is nan"),
    (
        lambda f: math.nan,
        lambda f: None,
        {"max_backtracks": 0, "requires_decrease": False},
        "its loss is nan",
    ),
    (
        lambda f: math.inf,
        lambda f: None,
        {"max_backtracks": 0, "requires_decrease": False},
        "its loss is inf",
    ),
    (
        lambda f: 0.5,
        lambda f: math.nan,
        {"max_backtracks": 0, "requires_decrease": False},
        "its KL is nan",
    ),
    (lambda f: 0.5, lambda f: 0.2, {"max_backtracks": 3}, "its KL 0.2 is above max_kl=0.1"),
]


@pytest.mark.parametrize(("objective", "kl", "changed", "reason"), REJECTED)
def test_rejects_when_no_point_is_good(objective, kl, changed, reason):
    trial, tried = search(objective, kl, **changed)
    assert not trial.accepted
    assert len(tried) == trial.backtracks == changed.get("max_backtracks", 10) + 1
    assert trial.fraction == tried[-1]
    points = "1 trial point" if len(tried) == 1 else f"{len(tried)} trial points"
    assert trial.reason.startswith(f"rejected after {points}, the last one because ")
    assert reason in trial.reason


@pytest.mark.parametrize(
    ("objective", "slope", "reason"),
    [
        (math.nan, -1.0, "the loss is nan"),
        (math.inf, -1.0, "the loss is inf"),
        (1.0, 1e-3, "its slope is 0.001"),
        (1.0, math.nan, "its slope is nan"),
    ],
)
def test_tries_nothing_where_nothing_can_be_gained(objective, slope, reason):
    def evaluate(fraction):
        raise AssertionError("tried a point")

    trial = line_search(
        evaluate, objective, slope, max_kl=1.0, max_backtracks=3, backtrack_ratio=0.5
    )
    assert (trial.accepted, trial.fraction, trial.backtracks, trial.kl) == (False, 0.0, 0, None)
    assert math.isnan(trial.objective)
    assert trial.reason.startswith("rejected: ")
    assert reason in trial.reason
