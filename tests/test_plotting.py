"""The picture of a run shows what the reports say."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ngd_optim import KFAC, NaturalCG, StepReport, plot_history
from ngd_optim.plotting import KFAC_PANELS, PANELS


@pytest.fixture(scope="module")
def reports() -> list[StepReport]:
    """Steps on Rosenbrock's function; some are rejected."""
    x = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))
    optimizer, reports = NaturalCG([x], max_kl=0.5, max_backtracks=1), []
    for _ in range(12):
        optimizer.step(lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    reports[4] = replace(
        reports[4], accepted=False, cg_stop="max_iters", reduction_ratio=float("nan")
    )
    return reports


def lines(axes: Any, marker: str | None = None) -> list[tuple[Sequence[float], Sequence[float]]]:
    return [line.get_data() for line in axes.lines if marker is None or line.get_marker() == marker]


def test_every_panel_draws_its_field_and_crosses_rejected_steps(reports: list[StepReport]) -> None:
    figure = plot_history(reports)
    rejected = [i for i, report in enumerate(reports) if not report.accepted]
    assert rejected
    for axes, field in zip(figure.axes, PANELS, strict=False):
        values = [getattr(report, field) for report in reports]
        drawn_steps, drawn = lines(axes)[0]
        np.testing.assert_array_equal(drawn_steps, range(1, len(reports) + 1))
        np.testing.assert_array_equal(drawn, values)
        ((crossed, crosses),) = lines(axes, "x")
        np.testing.assert_array_equal(crossed, [i + 1 for i in rejected])
        np.testing.assert_array_equal(crosses, [values[i] for i in rejected])


def test_the_key_explains_all_that_is_drawn(reports: list[StepReport]) -> None:
    figure = plot_history({"one": reports, "two": reports[:3], "none": []})
    explained = {text.get_text() for text in figure.axes[-1].get_legend().get_texts()}
    assert {"one", "two", "none", "rejected step", "trust region, max_kl = 0.5"} < explained
    assert {f"solve ended: {report.cg_stop.replace('_', ' ')}" for report in reports} < explained


def test_decades_get_a_logarithmic_axis_and_negative_losses_do_not(
    reports: list[StepReport],
) -> None:
    falling = [
        replace(reports[0], loss=10.0**-i, kl=-1e-9 if i == 2 else 10.0**-i) for i in range(6)
    ]
    assert [axes.get_yscale() for axes in plot_history(falling).axes[:2]] == ["log", "log"]
    surrogate = [replace(report, loss=-report.loss) for report in falling]
    assert plot_history(surrogate).axes[0].get_yscale() == "linear"
    assert (
        plot_history([replace(reports[0], reduction_ratio=-50.0)]).axes[2].get_yscale() == "symlog"
    )


def test_pyplot_does_not_keep_the_figure(reports: list[StepReport]) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot_history(reports)
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("nothing", [[], {}, {"run": []}])
def test_no_reports_are_refused(nothing: Any) -> None:
    with pytest.raises(ValueError, match="at least one report"):
        plot_history(nothing)


def test_the_trust_region_is_drawn_as_it_was_in_each_step(reports: list[StepReport]) -> None:
    bounds = [0.5, 0.25, float("inf")]
    run = [replace(report, max_kl=bound) for report, bound in zip(reports, bounds, strict=False)]
    figure = plot_history(run)
    (stairs,) = figure.axes[1].patches
    values, edges, _ = stairs.get_data()
    np.testing.assert_array_equal(values, [0.5, 0.25, np.nan])
    np.testing.assert_array_equal(edges, [0.5, 1.5, 2.5, 3.5])
    assert "trust region, max_kl" in {
        text.get_text() for text in figure.axes[-1].get_legend().get_texts()
    }
    without = plot_history([replace(report, max_kl=float("inf")) for report in reports])
    assert not without.axes[1].patches
    assert not any(
        "max_kl" in text.get_text() for text in without.axes[-1].get_legend().get_texts()
    )


@pytest.mark.parametrize("wrong", [[None], [1, 2], {"run": [None]}, 3, None])
def test_what_is_no_report_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="plot_history needs"):
        plot_history(wrong)


def test_one_report_is_no_list(reports: list[StepReport]) -> None:
    with pytest.raises(TypeError, match="the reports of all steps"):
        plot_history(reports[0])  # pyright: ignore[reportArgumentType]


def test_steps_to_the_edge_leave_room_for_the_bound_and_a_generator_will_do(
    reports: list[StepReport],
) -> None:
    edge = (replace(report, kl=0.0499, max_kl=0.05, accepted=True) for report in reports)
    figure = plot_history(edge)  # pyright: ignore[reportArgumentType]
    low, high = figure.axes[1].get_ylim()
    assert low == 0
    assert high >= 0.055
    assert "rejected step" not in {
        text.get_text() for text in figure.axes[-1].get_legend().get_texts()
    }


def test_without_matplotlib_the_error_says_what_to_install(
    reports: list[StepReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_history(reports)


def test_long_names_are_shortened_and_runs_are_kept_apart(reports: list[StepReport]) -> None:
    name = "results/autoencoder/deeper/with/a/long/path/seed-"
    figure = plot_history({name + "1": reports, name + "2": reports[:4]})
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata()) in (4, 12)]) >= 2
    texts = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert sum(text.startswith("results/autoencoder") for text in texts) == 2
    assert all(len(text) <= 32 for text in texts if text.startswith("results"))


def test_kfac_has_panels_of_its_own(reports: list[StepReport]) -> None:
    layer = nn.Linear(2, 1)
    optimizer, own = KFAC(layer.parameters()), []
    for _ in range(3):
        optimizer.step(lambda: nn.functional.mse_loss(layer(torch.eye(2)), torch.ones(2, 1)))
        own.append(optimizer.last_step)
    optimizer.step(lambda: math.nan * nn.functional.mse_loss(layer(torch.eye(2)), torch.ones(2, 1)))
    own.append(optimizer.last_step)
    figure = plot_history({"a": own, "b": own[:2]})
    for axes, (field, title) in zip(figure.axes, KFAC_PANELS.items(), strict=False):
        assert axes.get_title(loc="left") == title
        drawn = axes.lines[0].get_ydata()
        assert list(drawn) == pytest.approx([getattr(r, field) for r in own], nan_ok=True)
    # It has both signs, and begins with NaN.
    assert figure.axes[list(KFAC_PANELS).index("new_slope")].get_yscale() != "log"
    assert "rejected step" in [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    with pytest.raises(TypeError, match="runs of one optimizer"):
        plot_history({"a": own, "b": reports})
