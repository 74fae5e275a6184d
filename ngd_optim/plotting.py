"""A picture of a run: what its steps did."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ngd_optim.report import KFACReport, StepReport
from ngd_optim.shown import show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "loss": "Loss before the step",
    "kl": "KL of the step, nats per sample (or ½ dᵀF d)",
    "reduction_ratio": "Reduction ratio: decrease found ÷ predicted",
    "damping": "Damping λ",
    "cg_iters": "CG iterations",
}
KFAC_PANELS = {
    "loss": "Loss before the step",
    "radius": "Radius δ of the step, ½ dᵀF d",
    "new_slope": "Slope along the last step on new data ÷ on its own",
    "step_norm": "Norm of the step",
    "grad_norm": "Norm of the gradient",
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""For runs: told apart by colour-blind readers too (Okabe & Ito 2008)."""

_BOUND = {"linestyle": "--", "linewidth": 1.2}
_RIGHT = {"color": "0.45", "linestyle": ":", "linewidth": 1.2}
_REJECTED = {"color": "black", "marker": "x", "linestyle": "none", "zorder": 3}
_STOP_MARKERS = "o^sDvP*"
_FEW = 60
_LONGEST_NAME = 32


Report = StepReport | KFACReport


def plot_history(reports: Sequence[Report] | Mapping[str, Sequence[Report]]) -> "Figure":
    """Draw a run, step by step: loss, KL, reduction ratio, damping and CG iterations.

    Of :class:`~ngd_optim.KFAC` it draws loss, radius, slope on new data, and the norms of step and
    gradient.

    A dashed line is the trust region, where there is one; a cross marks a rejected step; the
    markers of the CG iterations tell why each solve ended. Steps count from 1.

    Args:
        reports: the values of ``optimizer.last_step`` after each step; or some such lists by name,
            to compare runs.

    Returns:
        A matplotlib figure, which pyplot does not know of: ``figure.savefig("run.png")`` writes it,
        and a notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: these are no reports.
        ValueError: there are none.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG, plot_history
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer, reports = NaturalCG([x], max_kl=0.5), []
        >>> for _ in range(5):
        ...     loss = optimizer.step(lambda: (x**4).sum())
        ...     reports.append(optimizer.last_step)
        >>> plot_history(reports).savefig("run.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install matplotlib") from error
    runs = _runs(reports)
    kinds = {type(report) for run in runs.values() for report in run}
    titles = PANELS if kinds == {StepReport} else KFAC_PANELS
    figure = Figure(figsize=(12, 6), layout="constrained")
    *panels, key = figure.subplots(2, 3, sharex=True).flat
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        for colour, run in zip(_colours(runs), runs.values(), strict=True):
            _draw_field(axes, run, field, colour)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes = dict(zip(titles, panels, strict=True))
    if kinds == {KFACReport}:
        axes["new_slope"].axhline(0.0, **_RIGHT)
        _draw_key(key, runs, {}, set(), "the next batch has its lowest point there")
        return figure
    axes["reduction_ratio"].axhline(1.0, **_RIGHT)
    stops = _stops(runs)
    # One bound for all is drawn in black; bounds of their own in the colour of the run.
    bounds = {report.max_kl for run in runs.values() for report in run} - {math.inf}
    for colour, run in zip(_colours(runs), runs.values(), strict=True):
        _draw_stops(axes["cg_iters"], run, colour, stops)
        _draw_bound(axes["kl"], run, "black" if len(bounds) == 1 else colour)
    _draw_key(key, runs, stops, bounds, "the decrease was as predicted")
    return figure


def _runs(reports: Any) -> dict[str, list[Any]]:
    if isinstance(reports, Report) or not isinstance(reports, Iterable):
        raise TypeError(
            "plot_history needs the reports of all steps, as a list or lists by name, got "
            f"{show(reports)}"
        )
    named = reports if isinstance(reports, Mapping) else {"steps": reports}
    runs = {name: list(run) for name, run in named.items()}
    for run in runs.values():
        for report in run:
            if not isinstance(report, Report):
                raise TypeError(
                    f"plot_history needs values of optimizer.last_step, got {show(report)} among them"
                )
    if not any(runs.values()):
        raise ValueError("plot_history needs at least one report, got none")
    if len({type(report) for run in runs.values() for report in run}) > 1:
        raise TypeError(
            "plot_history compares runs of one optimizer, got some of NaturalCG and some of KFAC"
        )
    return runs


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _colours(runs: Mapping[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _stops(runs: Mapping[str, Sequence[StepReport]]) -> dict[str, str]:
    """The marker of each reason why a solve ended."""
    found: Iterable[str] = dict.fromkeys(report.cg_stop for run in runs.values() for report in run)
    return dict(zip(found, _STOP_MARKERS, strict=False))


def _draw_field(axes: Any, run: Sequence[Report], field: str, colour: str) -> None:
    values = [getattr(report, field) for report in run]
    dots = "." if len(run) <= _FEW and field != "cg_iters" else None
    axes.plot(range(1, len(run) + 1), values, color=colour, linewidth=1.3, marker=dots)
    rejected = [i for i, report in enumerate(run) if not report.accepted]
    size = 7 if len(rejected) <= _FEW else 3
    axes.plot(
        [i + 1 for i in rejected], [values[i] for i in rejected], **_REJECTED, markersize=size
    )
    if field in ("reduction_ratio", "new_slope"):
        if any(not -2 < value < 4 for value in values if value == value):
            axes.set_yscale("symlog", linthresh=1)
    elif field == "cg_iters":
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.08 * max(values, default=0), 1))
    elif _spans_decades(values, may_round_below_zero=field == "kl"):
        axes.set_yscale("log", nonpositive="mask")


def _spans_decades(values: Sequence[float], *, may_round_below_zero: bool) -> bool:
    positive = [value for value in values if value > 0]
    # Of NaN, which is where nothing is known, min() would tell nothing.
    is_signed = any(value < 0 for value in values)
    if not positive or (is_signed and not may_round_below_zero):
        return False
    return max(positive) > 20 * min(positive)


def _draw_stops(
    axes: Any, run: Sequence[StepReport], colour: str, stops: Mapping[str, str]
) -> None:
    for stop, marker in stops.items():
        steps = [i for i, report in enumerate(run, 1) if report.cg_stop == stop]
        values = [run[i - 1].cg_iters for i in steps]
        axes.plot(steps, values, marker, color=colour, markersize=5 if len(run) <= _FEW else 2.5)


def _draw_bound(axes: Any, run: Sequence[StepReport], colour: str) -> None:
    """The trust region, step by step, with gaps where there is none."""
    finite = [report.max_kl for report in run if math.isfinite(report.max_kl)]
    if not finite:
        return
    bounds = [report.max_kl if math.isfinite(report.max_kl) else math.nan for report in run]
    axes.stairs(
        bounds,
        [i + 0.5 for i in range(len(run) + 1)],
        baseline=None,
        color=colour,
        zorder=3,
        **_BOUND,
    )
    if axes.get_yscale() == "linear":  # else steps to the edge would fill the panel and hide it
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=min(0, low), top=max(high, 1.1 * max(finite)))


def _draw_key(
    axes: Any,
    runs: Mapping[str, Sequence[StepReport]],
    stops: Mapping[str, str],
    bounds: set[float],
    grey: str,
) -> None:
    """What lines and markers mean, in a place of its own."""
    axes.axis("off")
    if len(runs) > 1:
        for colour, name in zip(_colours(runs), runs, strict=True):
            axes.plot([], [], color=colour, linewidth=2, label=_short(str(name)))
    if not all(report.accepted for run in runs.values() for report in run):
        axes.plot([], [], **_REJECTED, label="rejected step")
    if bounds:
        value = f" = {min(bounds):g}" if len(bounds) == 1 else ""
        axes.plot([], [], color="black", **_BOUND, label=f"trust region, max_kl{value}")
    axes.plot([], [], **_RIGHT, label=grey)
    for stop, marker in stops.items():
        axes.plot([], [], marker, color="0.45", label=f"solve ended: {stop.replace('_', ' ')}")
    axes.legend(loc="center left", frameon=False)
