"""Small batches: thousands of steps on batches of 128 digits, and a language model that never sees a text twice.

    python benchmarks/minibatch.py

A CNN on the digits, a fifth of them held out: NaturalCG takes 2,000 steps for each of five seeds, and Adam and KFAC as
much CPU time, Adam with the best of three learning rates on the first seed, both decayed to zero. Then a small
transformer on fresh pieces of text: KFAC and Muon with all seeds, Adam, SOAP and NaturalCG with one for the same time,
and NaturalCG with the gradient of four batches at a time and the curvature of one. Writes results/minibatch.json, .md
and .png.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from methods import Loss, rates_of, steps_of
from tasks import CHARACTERS, CONTEXT, DIGIT, IMAGES, LanguageModel, next_character, small_cnn
from timing import machine
from torch import nn

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "Adam": "#E69F00",
    "Muon": "#CC79A7",
    "SOAP": "#009E73",
    "NaturalCG": "#0072B2",
    "KFAC": "#000000",
    "NaturalCG, 4 batches": "#56B4E9",
}
BATCH = 128


class Batches(NamedTuple):
    """Data that come in batches.

    Attributes:
        what: they are, and what the score is.
        make: the model.
        losses: for a seed, the loss of one batch after the other.
        score: of a model on held-out data.
        higher_is_better: what ``score`` means.
    """

    what: str
    make: Callable[[], nn.Module]
    losses: Callable[[int], Iterator[Loss]]
    score: Callable[[nn.Module], float]
    higher_is_better: bool


_ORDER = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))
_TRAINING, _HELD_OUT = _ORDER[: len(IMAGES) * 4 // 5], _ORDER[len(IMAGES) * 4 // 5 :]


def digits(seed: int) -> Iterator[Loss]:
    """Batches of 128, in a new order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = _TRAINING[torch.randperm(len(_TRAINING), generator=generator)]
        for batch in order.split(BATCH):
            if len(batch) == BATCH:
                yield lambda model, batch=batch: F.cross_entropy(model(IMAGES[batch]), DIGIT[batch])


_BORDER = len(CHARACTERS) * 9 // 10
"""The text from here on is held out."""


def text(seed: int) -> Iterator[Loss]:
    """128 random pieces of text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(_BORDER - CONTEXT, (BATCH,), generator=generator)
        yield lambda model, starts=starts: next_character(model, starts)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the held-out digits."""
    return (model(IMAGES[_HELD_OUT]).argmax(1) == DIGIT[_HELD_OUT]).float().mean().item()


@torch.no_grad()
def nats(model: nn.Module) -> float:
    """Cross-entropy per character of the held-out text."""
    return next_character(model, torch.arange(_BORDER, len(CHARACTERS) - CONTEXT - 1, 97)).item()


TASKS = {
    "digits": Batches("CNN on digits, accuracy", small_cnn, digits, accuracy, True),
    "text": Batches("language model, nats per character", LanguageModel, text, nats, False),
}


class Run(NamedTuple):
    """A training run.

    Attributes:
        curve: CPU seconds, steps and score on the held-out data along it.
        largest_loss: of the training losses after the first tenth of the steps.
    """

    task: str
    method: str
    seed: int
    lr: float
    curve: list[tuple[float, int, float]]
    largest_loss: float

    @property
    def final(self) -> float:
        """The score at the end."""
        return self.curve[-1][2]

    @property
    def seconds(self) -> float:
        """CPU seconds of all steps."""
        return self.curve[-1][0]


def train(
    task: str, method: str, seed: int, lr: float, seconds: float, steps: float = math.inf
) -> Run:
    """Until the time is up or all steps are taken. The score is measured some forty times, outside the time."""
    data = TASKS[task]
    torch.manual_seed(seed)
    model = data.make()
    walk = steps_of(method, lr, seconds, model, data.losses(seed))
    curve, losses, spent, due = [], [], 0.0, 0.0
    while spent < seconds and len(losses) < steps:
        start = process_time()
        losses.append(next(walk))
        spent += process_time() - start
        if (progress := max(spent / seconds, len(losses) / steps)) >= due:
            curve.append((spent, len(losses), data.score(model)))
            due = progress + 1 / 40
    curve.append((spent, len(losses), data.score(model)))
    return Run(task, method, seed, lr, curve, max(losses[len(losses) // 10 :]))


def tuned(task: str, method: str, seconds: float) -> float:
    """The best learning rate for a quarter of the time, on the first seed; NaN where there is none to choose."""
    trials = {lr: train(task, method, 0, lr, seconds / 4).final for lr in rates_of(method)}
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(
        trials,
        key=lambda lr: sign * trials[lr] if math.isfinite(trials[lr]) else -math.inf,
        default=math.nan,
    )


def run_digits(steps: int, seeds: int) -> Iterator[Run]:
    """NaturalCG for a number of steps, and Adam and KFAC for the same time."""
    seconds = 0.0
    for seed in range(seeds):
        yield (own := train("digits", "NaturalCG", seed, math.nan, math.inf, steps))
        seconds += own.seconds / seeds
    for method in ("Adam", "KFAC"):
        lr = tuned("digits", method, seconds)
        for seed in range(seeds):
            yield train("digits", method, seed, lr, seconds)


def run_text(seconds: float, seeds: int) -> Iterator[Run]:
    """Every method for the same time; those that are ahead with all seeds."""
    for method in ("KFAC", "Muon", "Adam", "SOAP", "NaturalCG", "NaturalCG, 4 batches"):
        lr = tuned("text", method, seconds)
        for seed in range(seeds if method in ("KFAC", "Muon") else 1):
            yield train("text", method, seed, lr, seconds)


def table(runs: list[Run]) -> str:
    """Markdown: a method per row."""
    lines = []
    for task in dict.fromkeys(run.task for run in runs):
        data = TASKS[task]
        lines += [
            f"| {data.what} | seeds | steps | CPU seconds | at the end | after a tenth of the time | largest loss |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for method in dict.fromkeys(run.method for run in runs if run.task == task):
            own = [run for run in runs if (run.task, run.method) == (task, method)]
            label = method if math.isnan(own[0].lr) else f"{method}, lr {own[0].lr:g}"
            early = [
                max((p for p in r.curve if p[0] <= r.seconds / 10), default=r.curve[0])[2]
                for r in own
            ]
            steps, seconds = (f"{mean(run.curve[-1][i] for run in own):,.0f}" for i in (1, 0))
            cells = [
                label,
                str(len(own)),
                steps,
                seconds,
                spread([run.final for run in own]),
                spread(early),
            ]
            lines.append(f"| {' | '.join(cells)} | {max(run.largest_loss for run in own):.3g} |")
        lines.append("")
    return "\n".join(lines)


def spread(scores: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(scores):.4f}" + (f" ± {stdev(scores):.4f}" if len(scores) > 1 else "")


def draw(runs: list[Run]) -> Figure:
    """Score against seconds, a panel per task and a line per run."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    tasks = list(dict.fromkeys(run.task for run in runs))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        data = TASKS[task]
        labelled: set[str] = set()
        for run in runs:
            if run.task == task:
                label = None if run.method in labelled else run.method
                labelled.add(run.method)
                score = [1 - s if data.higher_is_better else s for _, _, s in run.curve]
                axes.plot(
                    [t for t, _, _ in run.curve],
                    score,
                    label=label,
                    color=COLOURS[run.method],
                    alpha=0.7,
                )
        axes.set(title=data.what, xlabel="CPU seconds, one thread", xscale="log")
        if data.higher_is_better:
            axes.set_ylim(0, 0.1)
        axes.set_ylabel(
            "share of wrong digits, held out"
            if data.higher_is_better
            else "nats per character, held out"
        )
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(runs: list[Run], name: str) -> None:
    """Keep the runs, and show them, in files of this name."""
    kept: dict[str, Any] = {"machine": machine(), "runs": [run._asdict() for run in runs]}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept) + "\n")
    (RESULTS / f"{name}.md").write_text(table(runs))
    draw(runs).savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=2_000, help="of NaturalCG on the digits (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="on the digits (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of CPU time for text (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--name", default="minibatch", help="of the files in results/ (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = []
    tasks = {
        "digits": lambda: run_digits(arguments.steps, arguments.seeds),
        "text": lambda: run_text(arguments.seconds, arguments.seeds),
    }
    for run in chain.from_iterable(tasks[task]() for task in arguments.tasks):
        runs.append(run)
        print(
            f"{run.task}, seed {run.seed}: {run.method} {run.final:.4f} after {run.seconds:.0f} s",
            flush=True,
        )
        write(runs, arguments.name)
    print(table(runs))


if __name__ == "__main__":
    main()
