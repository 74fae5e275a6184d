"""Training loss against time, full batch, beside tuned first-order methods, K-FAC, L-BFGS and Newton-CG.

    python benchmarks/training.py --seconds 20

The tasks are autoencoders of the digits with tanh and with rectified units, a CNN on the digits and a small transformer
on characters. Every method starts from the same weights and gets the same CPU time on one thread. The learning rate of
each first-order method is the best of three, each tried for a quarter of the time and decayed to zero over it. SOAP and
Shampoo are pytorch-optimizer's, K-FAC is SINGD's. Writes results/training.json, .md and .png.
"""

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from itertools import accumulate, repeat
from pathlib import Path
from time import process_time
from typing import Any

import torch
from matplotlib.figure import Figure
from methods import METHODS, rates_of, steps_of
from tasks import TASKS
from timing import machine

RESULTS = Path(__file__).parent / "results"
OURS = ("NaturalCG", "KFAC")
Curve = list[tuple[float, float]]
COLOURS = {  # Okabe & Ito 2008; two greys
    "Adam": "#E69F00",
    "AdamW": "#999999",
    "Muon": "#CC79A7",
    "SOAP": "#009E73",
    "Shampoo": "#56B4E9",
    "SINGD (K-FAC)": "#F0E442",
    "L-BFGS": "#D55E00",
    "pytorch-minimize Newton-CG": "#444444",
    "NaturalCG": "#0072B2",
    "KFAC": "#000000",
}


def curve(steps: Iterator[float], seconds: float) -> Curve:
    """(seconds, loss) after each step; empty where a method cannot do the task."""
    start, points = process_time(), []
    try:
        for value in steps:
            points.append((process_time() - start, value))
            if points[-1][0] > seconds or not math.isfinite(value):
                break
    except RuntimeError as error:
        print(error)
    return points


def train(task: str, method: str, seconds: float) -> tuple[str, Curve]:
    """A label with the chosen rate, and the curve."""

    def run(lr: float, seconds: float) -> Curve:
        torch.manual_seed(0)
        return curve(
            steps_of(method, lr, seconds, TASKS[task].make(), repeat(TASKS[task].loss)), seconds
        )

    rates = rates_of(method)
    if not rates:
        return method, run(math.nan, seconds)
    trials = {lr: [math.inf, *(value for _, value in run(lr, seconds / 4))][-1] for lr in rates}
    best = min(trials, key=lambda lr: trials[lr] if math.isfinite(trials[lr]) else math.inf)
    return f"{method}, lr {best:g}", run(best, seconds)


def lowest(points: Curve) -> float:
    """The lowest loss on a curve."""
    return min((value for _, value in points if math.isfinite(value)), default=math.inf)


def table(results: dict[str, dict[str, Curve]]) -> str:
    """Markdown: loss at the end and steps, a method per row."""
    lines = []
    for task, curves in results.items():
        lines += [f"| {task} | training loss | steps | seconds |", "|---|---|---|---|"]
        for label, points in sorted(curves.items(), key=lambda item: lowest(item[1])):
            cells = (
                f"{lowest(points):.5g} | {len(points)} | {points[-1][0]:.0f}"
                if points
                else "cannot | – | –"
            )
            lines.append(f"| {label} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Curve]]) -> Figure:
    """Loss against seconds, a panel per task."""
    figure = Figure(figsize=(14, 4.2 * math.ceil(len(results) / 3) + 0.6), layout="constrained")
    handles: dict[str, Any] = {}
    axes_of = figure.subplots(math.ceil(len(results) / 3), 3, squeeze=False).flat
    for axes in axes_of[len(results) :]:
        axes.set_axis_off()
    for axes, (task, curves) in zip(axes_of, results.items(), strict=False):
        floor = TASKS[task].floor
        for label, points in curves.items():
            method = label.partition(", lr")[0]
            values = [
                value - floor
                for value in accumulate((v for _, v in points if math.isfinite(v)), min)
            ]
            seconds = [second for second, value in points if math.isfinite(value)]
            width = 2.5 if method in OURS else 1.4
            (handles[method],) = axes.plot(seconds, values, color=COLOURS[method], lw=width)
        what = f"training loss − {floor:.2f}, its floor" if floor else "training loss"
        axes.set(
            title=task,
            xlabel="CPU seconds, one thread",
            ylabel=f"{what}; lowest so far",
            yscale="log",
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def write(results: dict[str, dict[str, Curve]], name: str) -> None:
    """Keep the curves, and show them, in files of this name."""
    RESULTS.mkdir(exist_ok=True)
    thinned = {
        t: {k: c[:: max(1, len(c) // 200)] + c[-1:] for k, c in curves.items()}
        for t, curves in results.items()
    }
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "curves": thinned}) + "\n"
    )
    (RESULTS / f"{name}.md").write_text(table(results))
    draw(results).savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="of CPU time for each run (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    compared = [name for name in METHODS if name != "NaturalCG, 4 batches"]
    parser.add_argument("--methods", nargs="+", choices=compared, default=compared)
    parser.add_argument(
        "--name", default="training", help="of the files in results/ (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="singd|torch.autograd|pytorch_optimizer")
    results: dict[str, dict[str, Curve]] = {}
    for task in arguments.tasks:
        results[task] = {}
        for method in arguments.methods:
            label, points = train(task, method, arguments.seconds)
            results[task][label] = points
            print(f"{task}: {label}: {lowest(points):.5g} after {len(points)} steps", flush=True)
    write(results, arguments.name)
    print(table(results))


if __name__ == "__main__":
    main()
