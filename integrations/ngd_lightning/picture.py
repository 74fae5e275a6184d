"""A run of NaturalCG in four panels."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ngd_optim import StepReport

_PANELS = {
    "loss": "Loss before the step",
    "kl": "KL of the step (nats per sample)",
    "damping": "Damping λ",
    "cg_iters": "CG iterations",
}


def draw(runs: Mapping[str, Sequence[StepReport]]) -> Figure:
    """Loss, KL, damping and CG iterations against steps; a cross marks a rejected step.

    Args:
        runs: the steps of each optimizer, by its name.
    """
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for axes, (field, title) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS.items(), strict=True):
        for number, (name, reports) in enumerate(runs.items()):
            _draw_field(axes, reports, field, name, f"C{number}")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    if len(figure.axes[0].get_legend_handles_labels()[0]) > 1:
        figure.axes[0].legend(frameon=False)
    return figure


def _draw_field(axes: Axes, reports: Sequence[StepReport], field: str, name: str, color: str) -> None:
    steps = range(1, len(reports) + 1)
    values = [getattr(report, field) for report in reports]
    axes.plot(steps, values, color=color, linewidth=1.3, label=name, marker="." if len(reports) <= 60 else None)
    rejected = [i for i, report in enumerate(reports) if not report.accepted]
    if rejected:
        axes.plot([i + 1 for i in rejected], [values[i] for i in rejected], "x", color="0.3", label=f"{name}: rejected")
    positive = [value for value in values if value > 0]
    if field != "cg_iters" and positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
