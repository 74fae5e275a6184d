"""NaturalCG beside Adam and L-BFGS on scikit-learn's handwritten digits: a classifier and an autoencoder.

All methods start from the same weights, see every training image in each step and get the same CPU time on one
thread, so that other work on the machine does not decide. It prints a table per task and draws the loss against
steps, work and time. Run it:

    python examples/quickstart.py
    python examples/quickstart.py --data mnist --seconds 60
"""

import argparse
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ngd_optim import NaturalCG

MNIST_IMAGES = 10_000
TRIAL_SHARE = (
    1 / 4
)  # part of the time that each of several settings is tried for, before the best runs in full
SOLVED = 1e-6  # what is left above the loss's floor is float32 rounding: stop
NEWS = 5  # so many CPU seconds between two lines of progress where the output is no terminal
BUSY = 1.5  # the wall clock may run so many times as fast as the CPU's before we say so


@dataclass(frozen=True)
class Task:
    """Something to learn: the untrained model, its loss and, for a classifier, its accuracy on unseen images."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    floor: float = 0.0  # no model's loss is below it
    accuracy: Callable[[nn.Module], float] | None = None


@dataclass
class Step:
    """The loss before something that an optimizer did, and what that took."""

    loss: float
    steps: int = 1
    gradients: int = 1
    products: int = 0
    work: float = 1.0  # in gradient evaluations
    seconds: float = 0.0  # of CPU time


@dataclass
class History:
    """A training run. The last step is empty: it holds the final loss."""

    label: str
    steps: list[Step] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def total_before(self, what: str) -> list[float]:
        """The running total of one of the steps' attributes, before each step."""
        return list(accumulate((getattr(step, what) for step in self.steps), initial=0))[:-1]


def adam_step(optimizer: Any, closure: Callable[[], Tensor]) -> list[Step]:
    """One step, one gradient."""
    return [Step(optimizer.step(closure).item())]


def lbfgs_step(optimizer: Any, closure: Callable[[], Tensor]) -> list[Step]:
    """Up to 20 steps, each a line search. The loss at a point tried is the lowest of this call so far."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    steps, losses = [], []

    def recorded() -> Tensor:
        steps.append(state["n_iter"])
        losses.append(closure())
        return losses[-1]

    optimizer.step(recorded)
    lowest = accumulate((loss.item() for loss in losses), min)
    reached = pairwise([*steps, state["n_iter"]])
    return [Step(loss, end - start) for loss, (start, end) in zip(lowest, reached, strict=True)]


def natural_cg_step(optimizer: Any, closure: Callable[[], Tensor]) -> list[Step]:
    """One step: a gradient, curvature products, and a forward pass for each point that the line search tries."""
    optimizer.step(closure)
    report = optimizer.last_step
    forwards = report.backtracks + report.accepted
    return [Step(report.loss, products=report.n_product, work=1 + report.n_product + forwards / 3)]


METHODS = {  # the optimizer, a call of its step, and the settings to choose from
    "Adam": (torch.optim.Adam, adam_step, [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)]),
    "L-BFGS": (
        torch.optim.LBFGS,
        lbfgs_step,
        [{"line_search_fn": "strong_wolfe", "history_size": 10}],
    ),
    "NaturalCG": (NaturalCG, natural_cg_step, [{}]),
}
STYLES = {  # colours by Okabe and Ito, which the colour-blind can tell apart
    "Adam": {"color": "#E69F00", "ls": "--"},
    "L-BFGS": {"color": "#009E73", "ls": "-."},
    "NaturalCG": {"color": "#0072B2", "lw": 2.5, "marker": "o", "ms": 4},
}


def run(
    task: Task, method: str, settings: dict[str, Any], seconds: float, progress: Progress
) -> History:
    """Train a copy of the model until the time is up or the loss is solved; measuring accuracy is off the clock."""
    model = deepcopy(task.model)
    make_optimizer, take_step, _ = METHODS[method]
    optimizer = make_optimizer(model.parameters(), **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model)
        loss.backward()
        return loss

    numbers = [f"{name} {value}" for name, value in settings.items() if not isinstance(value, str)]
    history = History(", ".join([method, *(numbers or ["defaults"])]))
    bar = progress.add_task(history.label, total=seconds, loss=math.nan)
    spent, duration, loss, news = 0.0, 0.0, math.inf, NEWS
    while spent + duration < seconds and loss - task.floor >= SOLVED:
        start = process_time()
        steps = take_step(optimizer, closure)
        duration = process_time() - start
        for step in steps:
            step.seconds = duration / len(steps)
        history.steps += steps
        spent, loss = spent + duration, steps[-1].loss
        if task.accuracy is not None:
            history.accuracies.append(task.accuracy(model))
        progress.update(bar, completed=spent, loss=loss)
        if spent > news and not progress.console.is_terminal:
            progress.console.print(
                f"{history.label}: {spent:.0f} of {seconds:g} s, loss {loss:.4g}"
            )
            news += NEWS
    history.steps.append(Step(task.loss(model).item(), 0, 0, work=0))
    progress.update(bar, total=spent, loss=history.steps[-1].loss)
    return history


def run_best(task: Task, method: str, seconds: float, progress: Progress) -> History:
    """Try each of the method's settings for a part of the time, then run the best for all of it from the start."""
    *_, settings = METHODS[method]
    run(
        task, method, settings[0], 1e-9, Progress(disable=True)
    )  # one step: torch loads parts at first use
    if len(settings) > 1:
        trials = [
            run(task, method, setting, TRIAL_SHARE * seconds, progress) for setting in settings
        ]
        losses = [trial.steps[-1].loss for trial in trials]
        settings = [settings[losses.index(min(losses))]]
    return run(task, method, settings[0], seconds, progress)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make_tasks(X: Tensor, y: Tensor, seed: int) -> dict[str, Task]:
    """The two tasks on images ``X`` of shape ``(n, pixels)`` with values in [0, 1] and labels ``y``."""
    n, pixels = X.shape
    torch.manual_seed(seed)
    train, test = torch.randperm(n).tensor_split([4 * n // 5])
    X_train, y_train, X_test, y_test = X[train], y[train], X[test], y[test]
    return {
        "classifier": Task(
            mlp(pixels, 64, 64, 10),
            lambda model: F.cross_entropy(model(X_train), y_train),
            accuracy=lambda model: (model(X_test).argmax(1) == y_test).float().mean().item(),
        ),
        "autoencoder": Task(
            nn.Sequential(mlp(pixels, 256, 128, 16), mlp(16, 128, 256, pixels)),
            lambda model: F.binary_cross_entropy_with_logits(model(X), X, reduction="sum") / n,
            floor=F.binary_cross_entropy(X, X, reduction="sum").item() / n,
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
    table = Table(
        "method",
        title=task,
        caption="accuracy on unseen images",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in (
        "training\nloss",
        "accuracy\nbest, last",
        "seconds",
        "steps",
        "gradients",
        "products",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for h in histories.values():
        accuracy = f"{max(h.accuracies):.1%} {h.accuracies[-1]:.1%}" if h.accuracies else "-"
        totals = [
            h.total_before(what)[-1] for what in ("seconds", "steps", "gradients", "products")
        ]
        table.add_row(
            h.label,
            f"{h.steps[-1].loss:.5g}",
            accuracy,
            *(f"{round(total, 1):,}" for total in totals),
        )
    return table


def summarise(tasks: dict[str, Task], results: dict[str, dict[str, History]]) -> str:
    """Two sentences: who went lowest on each task, or was first where several have solved it."""
    sentences = []
    for name, histories in results.items():
        floor = tasks[name].floor
        left = {method: h.steps[-1].loss - floor for method, h in histories.items()}
        spent = {method: h.total_before("seconds")[-1] for method, h in histories.items()}
        solved = [method for method, rest in left.items() if rest < SOLVED]
        if len(solved) > 1:
            first = min(solved, key=lambda method: spent[method])
            sentences.append(
                f"On the {name} {', '.join(solved)} came within {SOLVED:g} of the least possible loss; {first} "
                f"was first, after {spent[first]:.1f} s."
            )
        else:
            best, second = sorted(left, key=lambda method: left[method])[:2]
            sentences.append(
                f"On the {name} {best} went lowest: it is {left[best]:.1e} above the least possible loss, "
                f"{second} {left[second]:.1e}."
            )
    return " ".join(sentences)


def draw(tasks: dict[str, Task], results: dict[str, dict[str, History]], path: Path) -> None:
    """A row of plots per task: the loss against steps, work and seconds."""
    work = "gradient evaluations\n(a curvature product counts as 1, a forward pass as 1/3)"
    labels = {"steps": "steps", "work": work, "seconds": "CPU seconds"}
    figure = Figure(figsize=(13, 0.6 + 3.8 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), len(labels), sharey="row", squeeze=False)
    for axes, (name, histories) in zip(rows, results.items(), strict=True):
        floor = tasks[name].floor
        for ax, (what, label) in zip(axes, labels.items(), strict=True):
            for method, h in histories.items():
                losses = [step.loss - floor for step in h.steps]
                ax.plot(h.total_before(what), losses, label=method, **STYLES[method])
            ax.set_xscale("symlog", linthresh=0.1 if what == "seconds" else 1, linscale=0.4)
            ax.set(yscale="log", xlim=(0, None), xlabel=label)
            ax.grid(alpha=0.3)
        axes[0].set_ylabel(
            f"{name}: training loss" + (f" − {floor:.2f}, its floor" if floor else "")
        )
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", choices=("digits", "mnist"), default="digits", help="mnist needs torchvision"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="CPU time of each method on each task (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the split (%(default)s)"
    )
    parser.add_argument("--figure", type=Path, default=Path("figures/quickstart.png"))
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be a number above 0, got {options.seconds}")
    if options.figure.suffix != ".png":
        parser.error(f"--figure must be a .png file, got {options.figure}")
    torch.set_num_threads(1)  # threads of a small network wait for each other where others run
    began = perf_counter(), process_time()
    console, status = Console(), TextColumn("{task.completed:.1f} s, loss {task.fields[loss]:.4g}")
    tasks = make_tasks(*load_images(options.data), options.seed)
    results = {}
    for name, task in tasks.items():
        console.rule(name)
        with Progress(
            TextColumn("{task.description:24}"), BarColumn(20), status, console=console
        ) as progress:
            results[name] = {m: run_best(task, m, options.seconds, progress) for m in METHODS}
        console.print(make_table(name, results[name]))
    draw(tasks, results, options.figure)
    console.print(summarise(tasks, results), highlight=False)
    wall, cpu = perf_counter() - began[0], process_time() - began[1]
    if wall > BUSY * cpu:
        console.print(
            f"The machine was busy: {cpu:.0f} s of CPU time took {wall:.0f} s. What shares its caches is slowed "
            "down, but not always alike: look at steps and gradients, or run it again on a quiet machine."
        )
    print(f"The curves are in {options.figure}")


if __name__ == "__main__":
    main()
