"""NaturalCG beside Adam and L-BFGS on scikit-learn's handwritten digits: a classifier and an autoencoder.

All methods start from the same weights, see every training image in each step and get the same time. Run it:

    python examples/quickstart.py
    python examples/quickstart.py --data mnist --seconds 60

It prints a table per task and draws the training loss against steps, against work and against time.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ngd_optim import NaturalCG

MNIST_IMAGES = 10_000
TRAIN_SHARE = 0.8
TRIAL_SHARE = 1 / 8  # part of the time that each of several settings is tried for, before the best runs in full
SOLVED = 1e-6  # a loss below this is float32 rounding: stop

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Task:
    """Something to learn: how to make the model, its loss and, for a classifier, its accuracy on unseen images."""

    model: Callable[[], nn.Module]
    loss: Loss
    accuracy: Callable[[nn.Module], float] | None = None


@dataclass
class Step:
    """The loss before something that an optimizer did, and what that took."""

    loss: float
    steps: int = 1
    gradients: int = 1
    products: int = 0
    forwards: int = 0
    seconds: float = 0.0

    @property
    def work(self) -> float:
        """In gradient evaluations: a forward and a backward pass, twice as dear as the forward pass."""
        return self.gradients + self.products + self.forwards / 3


@dataclass
class History:
    """A training run."""

    label: str
    steps: list[Step] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    final_loss: float = math.nan

    def total_before(self, what: str) -> list[float]:
        """The running total of one of the steps' attributes: before each step, and at the end."""
        return list(accumulate((getattr(step, what) for step in self.steps), initial=0))


def ordinary_closure(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss) -> Callable[[], Any]:
    """What any torch optimizer takes, and all three methods get."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


def train_adam(model: nn.Module, loss: Loss, **settings: Any) -> Iterator[list[Step]]:
    """Adam."""
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    closure = ordinary_closure(optimizer, model, loss)
    while True:
        value: Any = optimizer.step(closure)
        yield [Step(value.item())]


def train_lbfgs(model: nn.Module, loss: Loss, **settings: Any) -> Iterator[list[Step]]:
    """L-BFGS. One call makes up to 20 steps, each a line search; the loss is the lowest of all points tried so far."""
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **settings)
    closure = ordinary_closure(optimizer, model, loss)
    state = optimizer.state[next(model.parameters())]
    lowest, tried = math.inf, []

    def recorded() -> Any:
        nonlocal lowest
        value = closure()
        lowest = min(lowest, value.item())
        tried.append((state["n_iter"], lowest))
        return value

    while True:
        tried.clear()
        optimizer.step(recorded)
        tried.append((state["n_iter"], lowest))
        yield [Step(before, steps=end - start) for (start, before), (end, _) in pairwise(tried)]


def train_natural_cg(model: nn.Module, loss: Loss, **settings: Any) -> Iterator[list[Step]]:
    """NaturalCG. A step takes a gradient, curvature products, and a forward pass for each point of the line search."""
    optimizer = NaturalCG(model.parameters(), **settings)
    closure = ordinary_closure(optimizer, model, loss)
    while True:
        optimizer.step(closure)
        report: Any = optimizer.last_step
        yield [Step(report.loss, products=report.n_product, forwards=report.backtracks + report.accepted)]


# Each way to train and the settings to choose from; colours by Okabe and Ito, which the colour-blind can tell apart.
METHODS = {
    "Adam": (train_adam, [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)]),
    "L-BFGS": (train_lbfgs, [{"history_size": 10}]),
    "NaturalCG": (train_natural_cg, [{"max_kl": 1, "damping": 0.1, "cg_progress_tol": 0.005}]),
}
STYLES = {
    "Adam": {"color": "#E69F00", "ls": "--"},
    "L-BFGS": {"color": "#009E73", "ls": "-."},
    "NaturalCG": {"color": "#0072B2", "lw": 2.5, "marker": "o", "ms": 4},
}


def run(task: Task, method: str, settings: dict[str, float], seconds: float, seed: int, progress: Progress) -> History:
    """Train from the seed's weights until the time is up or the loss is solved; measuring accuracy is off the clock."""
    torch.manual_seed(seed)
    model = task.model()
    history = History(", ".join([method, *(f"{name} {value:g}" for name, value in settings.items())]))
    bar = progress.add_task(history.label, total=seconds, loss=math.nan)
    calls = METHODS[method][0](model, task.loss, **settings)
    spent, loss = 0.0, math.inf
    while spent < seconds and loss >= SOLVED:
        start = perf_counter()
        steps = next(calls)
        duration = perf_counter() - start
        for step in steps:
            step.seconds = duration / len(steps)
        history.steps += steps
        spent, loss = spent + duration, steps[-1].loss
        if task.accuracy is not None:
            history.accuracies.append(task.accuracy(model))
        progress.update(bar, completed=spent, loss=loss)
    with torch.no_grad():
        history.final_loss = task.loss(model).item()
    progress.update(bar, total=spent, loss=history.final_loss)
    return history


def run_best(task: Task, method: str, seconds: float, seed: int, progress: Progress) -> History:
    """Try each of the method's settings for a part of the time, then run the best for all of it from the start."""
    train, settings = METHODS[method]
    next(train(task.model(), task.loss, **settings[0]))  # torch loads parts of itself at first use
    if len(settings) > 1:
        trials = [run(task, method, setting, TRIAL_SHARE * seconds, seed, progress).final_loss for setting in settings]
        settings = [settings[trials.index(min(trials))]]
    return run(task, method, settings[0], seconds, seed, progress)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make_tasks(X: Tensor, y: Tensor, seed: int) -> dict[str, Task]:
    """The two tasks on images ``X`` of shape ``(n, pixels)`` with values in [0, 1] and labels ``y``."""
    n, pixels = X.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([int(TRAIN_SHARE * n)])
    X_train, y_train, X_test, y_test = X[train], y[train], X[test], y[test]

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return (model(X_test).argmax(1) == y_test).float().mean().item()

    return {
        "classifier": Task(
            lambda: mlp(pixels, 64, 64, 10), lambda model: F.cross_entropy(model(X_train), y_train), accuracy
        ),
        "autoencoder": Task(
            lambda: nn.Sequential(mlp(pixels, 256, 128, 16), mlp(16, 128, 256, pixels)),
            lambda model: F.binary_cross_entropy_with_logits(model(X), X, reduction="sum") / n,
        ),
    }


def load_images(name: str) -> tuple[Tensor, Tensor]:
    """Images of shape ``(n, pixels)`` with values in [0, 1], and labels: ``digits`` (8×8) or ``mnist`` (28×28)."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        mnist = MNIST(root="data", download=True)
        return mnist.data[:MNIST_IMAGES].flatten(1) / 255, mnist.targets[:MNIST_IMAGES]
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def make_table(task: str, histories: dict[str, History]) -> Table:
    """One row per method."""
    caption = f"accuracy on unseen images; a run ends early at a loss below {SOLVED:g}"
    table = Table("method", title=task, caption=caption, box=box.SIMPLE_HEAD)
    for header in ("training\nloss", "accuracy\nbest, last", "seconds", "steps", "gradients", "products"):
        table.add_column(header, justify="right", no_wrap=True)
    for h in histories.values():
        accuracy = f"{max(h.accuracies):.1%} {h.accuracies[-1]:.1%}" if h.accuracies else "-"
        seconds, *counts = (h.total_before(what)[-1] for what in ("seconds", "steps", "gradients", "products"))
        table.add_row(h.label, f"{h.final_loss:.4g}", accuracy, f"{seconds:.1f}", *(f"{count:,}" for count in counts))
    return table


def draw(results: dict[str, dict[str, History]], path: Path) -> None:
    """A row of plots per task: the loss against steps, work and seconds."""
    work = "gradient evaluations\n(a curvature product counts as 1, a forward pass as 1/3)"
    columns = {"steps": "steps", "work": work, "seconds": "seconds"}
    figure = Figure(figsize=(13, 0.6 + 3.8 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), len(columns), sharey="row", squeeze=False)
    for axes, (task, histories) in zip(rows, results.items(), strict=True):
        for ax, (what, label) in zip(axes, columns.items(), strict=True):
            for method, h in histories.items():
                losses = [step.loss for step in h.steps] + [h.final_loss]
                ax.plot(h.total_before(what), losses, label=method, **STYLES[method])
            ax.set_xscale("symlog", linthresh=0.1 if what == "seconds" else 1)
            ax.set_xlim(left=0)
            ax.set_xlabel(label)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
        axes[0].set_ylabel(f"{task}: training loss")
        low, high = axes[0].get_ylim()
        if high < 10 * low:  # matplotlib labels decades; here the numbers between them are wanted
            axes[0].yaxis.set(major_locator=MaxNLocator(8), major_formatter="{x:g}", minor_locator=NullLocator())
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="mnist needs torchvision")
    parser.add_argument("--seconds", type=float, default=20, help="for each method on each task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the split (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be a number above 0, got {options.seconds}")
    if options.output.suffix != ".png" or not options.output.parent.is_dir():
        parser.error(f"--output must be a .png file in a folder that exists, got {options.output}")
    bar = (
        TextColumn("{task.description}", table_column=Column(max_width=30, no_wrap=True)),
        BarColumn(20),
        TextColumn("{task.completed:.1f} s, loss {task.fields[loss]:.4g}"),
    )
    console = Console()
    results = {}
    for name, task in make_tasks(*load_images(options.data), options.seed).items():
        console.rule(name)
        with Progress(*bar, console=console) as progress:
            results[name] = {m: run_best(task, m, options.seconds, options.seed, progress) for m in METHODS}
        console.print(make_table(name, results[name]))
    draw(results, options.output)
    console.print(f"The curves are in {options.output}")


if __name__ == "__main__":
    main()
