"""How a step grows with the number of parameters and with the batch: its time and its peak memory, beside a gradient's.

    python benchmarks/growth.py

A step is a trace, a gradient, ten products and one trial point, without a preconditioner and with Kronecker factors,
which are here renewed at every step. Its CPU time is measured in turns with the gradient's. Peak memory is the most
that tensors occupy at one time, beyond what there was before: parameters, data and, for a step, the last solution.
Slopes are those of straight lines through the logarithms: 1 is proportional growth. Writes results/growth.json, .md
and .png.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression, median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from models import mlp
from timing import interleaved, machine, ratios
from torch.profiler import ProfilerActivity, profile

from ngd_optim import NaturalCG

RESULTS = Path(__file__).parent / "results"
PRODUCTS = 10
COLOURS = {"gradient": "#999999", "step": "#0072B2", "preconditioned": "#E69F00"}
# Widths of five equal hidden layers for about 1e4, 1e5, 1e6 and 1e7 parameters.
WIDTHS = {10**4: 43, 10**5: 150, 10**6: 493, 10**7: 1574}
BATCHES = [10**2, 10**3, 10**4, 10**5]
SWEEPS = {
    "parameters": [(width, 256) for width in WIDTHS.values()],
    "batch": [(WIDTHS[10**5], batch) for batch in BATCHES],
}


def problem(width: int, batch: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """A gradient, a step and a preconditioned step on a six-layer network, and its number of parameters."""
    torch.manual_seed(0)
    model = mlp(64, *[width] * 5, 10)
    x, y = torch.randn(batch, 64), torch.randint(0, 10, (batch,))
    params = list(model.parameters())

    def closure() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    def stepping(preconditioner: Any) -> Callable[[], None]:
        # A tiny lr, so that all steps are taken at the same point.
        work = {
            "max_cg_iters": PRODUCTS,
            "cg_tol": 0.0,
            "cg_progress_tol": 0.0,
            "max_backtracks": 0,
        }
        optimizer = NaturalCG(params, solver="cg", preconditioner=preconditioner, lr=1e-6, **work)

        def step() -> None:
            optimizer.step(closure)
            assert optimizer.last_step is not None
            assert optimizer.last_step.cg_iters == PRODUCTS

        return step

    ways = {
        "gradient": lambda: torch.autograd.grad(closure(), params),
        "step": stepping(None),
        "preconditioned": stepping("kfac"),
    }
    return ways, sum(p.numel() for p in params)


def peak_memory(function: Callable[[], Any]) -> int:
    """The most bytes that tensors allocated by a call occupy at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Both sweeps: seconds of every repeat, and bytes."""
    results: dict[str, list[dict[str, Any]]] = {}
    for sweep, sizes in SWEEPS.items():
        results[sweep] = []
        for width, batch in sizes:
            ways, n = problem(width, batch)
            seconds = interleaved(ways, repeats)
            memory = {way: peak_memory(function) for way, function in ways.items()}
            results[sweep].append(
                {"parameters": n, "batch": batch, "seconds": seconds, "bytes": memory}
            )
            print(sweep, n, batch, {way: round(median(s), 4) for way, s in seconds.items()}, memory)
    return results


def slopes(points: list[dict[str, Any]], sweep: str, way: str) -> dict[str, float]:
    """Of the time, a line for each repeat: median and quartiles; and of the memory."""
    sizes = [math.log(point[sweep]) for point in points]
    repeats = zip(*(point["seconds"][way] for point in points), strict=True)
    times = [linear_regression(sizes, [math.log(t) for t in times]).slope for times in repeats]
    low, _, high = quantiles(times, n=4)
    memory = linear_regression(sizes, [math.log(point["bytes"][way]) for point in points]).slope
    return {"median": median(times), "low": low, "high": high, "memory": memory}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a size per row, then the slopes."""
    lines = [
        f"A step of {PRODUCTS} products ÷ one gradient; five hidden layers, float32, one thread.",
        "",
        "| parameters | batch | gradient, ms | step | preconditioned | gradient, MiB | step | preconditioned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in [point for points in results.values() for point in points]:
        times = ratios(point["seconds"], "gradient").values()
        times = [f"{r['median']:.1f} ({r['low']:.1f}–{r['high']:.1f})" for r in times]
        memory = [
            f"{size / point['bytes']['gradient']:.2f}" for size in list(point["bytes"].values())[1:]
        ]
        ms, mib = 1e3 * median(point["seconds"]["gradient"]), point["bytes"]["gradient"] / 2**20
        cells = [
            f"{point['parameters']:,}",
            f"{point['batch']:,}",
            f"{ms:.3g}",
            *times,
            f"{mib:.3g}",
            *memory,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| slope with | of | time | memory | time, last decade | memory |",
        "|---|---|---|---|---|---|",
    ]
    for sweep, points in results.items():
        for way in COLOURS:
            cells = []
            for part in (points, points[-2:]):
                s = slopes(part, sweep, way)
                cells += [
                    f"{s['median']:.2f} ({s['low']:.2f}–{s['high']:.2f})",
                    f"{s['memory']:.2f}",
                ]
            lines.append(f"| {sweep} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Time above, memory below; against parameters and against the batch."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (sweep, points) in enumerate(results.items()):
        sizes = [point[sweep] for point in points]
        for way, colour in COLOURS.items():
            seconds = [median(point["seconds"][way]) for point in points]
            mib = [point["bytes"][way] / 2**20 for point in points]
            slope = slopes(points, sweep, way)
            axes[0, column].loglog(
                sizes, seconds, "o-", color=colour, label=f"{way}, slope {slope['median']:.2f}"
            )
            axes[1, column].loglog(
                sizes, mib, "o-", color=colour, label=f"{way}, slope {slope['memory']:.2f}"
            )
        axes[1, column].set_xlabel(sweep)
        for row in (0, 1):
            axes[row, column].legend(frameon=False)
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("peak memory, MiB")
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="interleaved rounds (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments.repeats)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(
        json.dumps({"machine": machine(), **results}, indent=1) + "\n"
    )
    (RESULTS / "growth.md").write_text(table(results))
    draw(results).savefig(RESULTS / "growth.png", dpi=150)
    print(table(results))


if __name__ == "__main__":
    main()
