"""Training loss against time, full batch, beside tuned first-order methods, L-BFGS and pytorch-minimize's Newton-CG.

    python benchmarks/training.py --seconds 40

The tasks are the digits autoencoder, with tanh and with rectified units, and a CNN on the digits. Every method starts
from the same weights and gets the same CPU time on one thread. The learning rate of each first-order method is the best
of a grid, each tried for a quarter of the time and decayed to zero over it. Writes results/training.json, .md and .png.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
import torchmin
from matplotlib.figure import Figure
from models import mlp
from sklearn.datasets import load_digits
from timing import machine
from torch import Tensor, nn

from ngd_optim import NaturalCG

RESULTS = Path(__file__).parent / "results"
Curve = list[tuple[float, float]]
DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data / 16, dtype=torch.float32)
DIGIT = torch.tensor(DIGITS.target)


def autoencoder(activation: Callable[[], nn.Module]) -> nn.Module:
    """64-256-128-16-128-256-64, linear code."""
    encoder, decoder = (mlp(*widths, activation=activation) for widths in ((64, 256, 128, 16), (16, 128, 256, 64)))
    return nn.Sequential(*encoder, *decoder)


def reconstruction(model: nn.Module) -> Tensor:
    """Binary cross-entropy of an image, in nats."""
    return F.binary_cross_entropy_with_logits(model(IMAGES), IMAGES, reduction="sum") / len(IMAGES)


def small_cnn() -> nn.Module:
    """Two convolutions and a linear head on 8×8 images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "autoencoder, tanh": (lambda: autoencoder(nn.Tanh), reconstruction),
    "autoencoder, ReLU": (lambda: autoencoder(nn.ReLU), reconstruction),
    "CNN": (small_cnn, lambda m: F.cross_entropy(m(IMAGES), DIGIT)),
}


ENTROPY = F.binary_cross_entropy(IMAGES, IMAGES, reduction="sum").item() / len(IMAGES)
FLOORS = {"autoencoder, tanh": ENTROPY, "autoencoder, ReLU": ENTROPY, "CNN": 0.0}
"""The lowest loss that there can be."""


def first_order(make: Callable[[nn.Module, float], list[torch.optim.Optimizer]], rates: list[float]) -> Any:
    """A method with its grid of learning rates."""
    return {"make": make, "rates": rates}


def muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, Adam for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.0), torch.optim.Adam(rest, lr=3e-3)]


METHODS: dict[str, Any] = {
    "Adam": first_order(lambda m, lr: [torch.optim.Adam(m.parameters(), lr=lr)], [1e-3, 3e-3, 1e-2]),
    "AdamW": first_order(lambda m, lr: [torch.optim.AdamW(m.parameters(), lr=lr)], [1e-3, 3e-3, 1e-2]),
    "Muon": first_order(muon, [5e-3, 2e-2, 5e-2]),
    "L-BFGS": lambda m, loss: by_lbfgs(m, loss),
    "pytorch-minimize Newton-CG": lambda m, loss: by_newton_cg(m, loss),
    "NaturalCG": lambda m, loss: by_natural_cg(m, loss),
}


def by_natural_cg(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Iterator[float]:
    """The defaults."""
    optimizer = NaturalCG(model.parameters())
    while True:
        optimizer.step(lambda: loss(model))
        assert optimizer.last_step is not None
        yield optimizer.last_step.new_loss


def by_lbfgs(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Iterator[float]:
    """Strong Wolfe line search, 20 iterations a call."""
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", history_size=20)
    seen: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        seen.append(value.item())
        return value

    while True:
        seen.clear()
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        yield min(seen)


def by_newton_cg(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Iterator[float]:
    """One outer iteration a call."""
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    x = torch.cat([p.detach().flatten() for p in params])

    def function(flat: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), params, strict=True)]
        return loss(lambda z: torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (z,)))  # pyright: ignore[reportArgumentType]

    while True:
        result = torchmin.minimize(function, x, method="newton-cg", max_iter=1)
        x = result.x
        yield float(result.fun)


def by_first_order(method: Any, rate: float, model: nn.Module, loss: Any, seconds: float) -> Iterator[float]:
    """Cosine decay of the learning rate over the time."""
    optimizers = method["make"](model, rate)
    start, base = process_time(), [[g["lr"] for g in o.param_groups] for o in optimizers]
    while True:
        share = min(1.0, (process_time() - start) / seconds)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.zero_grad()
        value = loss(model)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        yield value.item()


def curve(steps: Iterator[float], seconds: float) -> Curve:
    """(seconds, loss) after each step."""
    start, points = process_time(), []
    for value in steps:
        points.append((process_time() - start, value))
        if points[-1][0] > seconds:
            return points
    return points


def train(task: str, method: str, seconds: float) -> tuple[str, Curve]:
    """A label with the chosen rate, and the curve."""
    make, loss = TASKS[task]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return make()

    way = METHODS[method]
    if callable(way):
        return method, curve(way(fresh(), loss), seconds)
    trials = {}
    for rate in way["rates"]:
        points = curve(by_first_order(way, rate, fresh(), loss, seconds / 4), seconds / 4)
        trials[rate] = points[-1][1] if math.isfinite(points[-1][1]) else math.inf
    best = min(trials, key=lambda rate: trials[rate])
    return f"{method}, lr {best:g}", curve(by_first_order(way, best, fresh(), loss, seconds), seconds)


def lowest(points: Curve) -> float:
    """The lowest loss on a curve."""
    return min((value for _, value in points if math.isfinite(value)), default=math.nan)


def table(results: dict[str, dict[str, Curve]]) -> str:
    """Markdown: loss at the end and steps, a method per row."""
    lines = []
    for task, curves in results.items():
        lines += [f"| {task} | training loss | steps | seconds |", "|---|---|---|---|"]
        for label, points in sorted(curves.items(), key=lambda item: lowest(item[1])):
            lines.append(f"| {label} | {lowest(points):.5g} | {len(points)} | {points[-1][0]:.0f} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Curve]]) -> Figure:
    """Loss against seconds, a panel per task."""
    colours = ["#E69F00", "#999999", "#CC79A7", "#009E73", "#D55E00", "#0072B2"]
    figure = Figure(figsize=(5.2 * len(results), 4.4), layout="constrained")
    for axes, (task, curves) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        floor = FLOORS[task]
        for (label, points), colour in zip(curves.items(), colours, strict=False):
            values = [value - floor for value in accumulate((value for _, value in points), min)]
            seconds = [second for second, _ in points]
            axes.plot(seconds, values, label=label, color=colour, lw=2.5 if "NaturalCG" in label else 1.4)
        what = f"training loss − {floor:.2f}, its floor" if floor else "training loss"
        axes.set(title=task, xlabel="CPU seconds, one thread", ylabel=f"{what}; lowest so far", yscale="log")
        axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of CPU time for each run (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Curve]] = {}
    for task in TASKS:
        results[task] = {}
        for method in METHODS:
            label, points = train(task, method, arguments.seconds)
            results[task][label] = points
            print(f"{task}: {label}: {lowest(points):.5g} after {len(points)} steps", flush=True)
    RESULTS.mkdir(exist_ok=True)
    thinned = {t: {k: c[:: max(1, len(c) // 200)] + c[-1:] for k, c in curves.items()} for t, curves in results.items()}
    (RESULTS / "training.json").write_text(json.dumps({"machine": machine(), "curves": thinned}) + "\n")
    (RESULTS / "training.md").write_text(table(results))
    draw(results).savefig(RESULTS / "training.png", dpi=150)
    print(table(results))


if __name__ == "__main__":
    main()
