"""Small batches: digits, and language models on text that comes again or never does.

    python benchmarks/minibatch.py --name minibatch-kfac-sources --tasks sources --methods KFAC Muon AdamW SOAP

Methods of first order have the best of their rates for a quarter of the time on the first seed, decayed to zero.
Methods take turns from seed to seed; KFAC and Muon run with all seeds, the others with one. On the CNN of the digits, a
fifth of them held out, NaturalCG takes 2,000 steps for each seed, and the others as much CPU time. Runs that the
file of results has already are not repeated. Writes results/NAME.json, .md and .png.
"""

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from methods import METHODS, Loss, rates_of, steps_of
from tasks import (
    CONTEXT,
    DIGIT,
    IMAGES,
    LanguageModel,
    Text,
    adapted,
    next_character,
    reference,
    residual_cnn,
    small_cnn,
    sources,
)
from timing import machine
from torch import nn

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "Adam": "#E69F00",
    "AdamW": "#999999",
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


def digits(batch: int, seed: int) -> Iterator[Loss]:
    """Full batches, in a new order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = _TRAINING[torch.randperm(len(_TRAINING), generator=generator)]
        for some in order.split(batch):
            if len(some) == batch:
                yield lambda model, some=some: F.cross_entropy(model(IMAGES[some]), DIGIT[some])


def random_pieces(text: Callable[[], Text], batch: int, seed: int) -> Iterator[Loss]:
    """Pieces of the text that begin anywhere."""
    characters, _, border = text()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(border - CONTEXT, (batch,), generator=generator)
        yield partial(next_character, starts=starts, characters=characters)


def new_pieces(text: Callable[[], Text], batch: int, seed: int) -> Iterator[Loss]:
    """Pieces of the text in a random order, none of which comes again before all have come."""
    characters, _, border = text()
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(border // (CONTEXT + 1), generator=generator) * (CONTEXT + 1)
        for starts in order.split(batch):
            if len(starts) == batch:
                yield partial(next_character, starts=starts, characters=characters)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the held-out digits."""
    model.eval()
    share = (model(IMAGES[_HELD_OUT]).argmax(1) == DIGIT[_HELD_OUT]).float().mean().item()
    model.train()
    return share


@torch.no_grad()
def nats(text: Callable[[], Text], every: int, model: nn.Module) -> float:
    """Cross-entropy per character of the held-out text."""
    characters, _, border = text()
    starts = torch.arange(border, len(characters) - CONTEXT - 1, every)
    return next_character(model, starts, characters).item()


def transformer(text: Callable[[], Text], width: int = 64) -> nn.Module:
    """In the symbols of a text."""
    return LanguageModel(width, heads=width // 16, symbols=text().symbols)


def on_digits(what: str, make: Callable[[], nn.Module], batch: int = BATCH) -> Batches:
    """Classify them."""
    return Batches(f"{what}, accuracy", make, partial(digits, batch), accuracy, True)


def on_sources(what: str, make: Callable[[], nn.Module], batch: int = BATCH) -> Batches:
    """Pieces of Python's sources that never come again."""
    losses = partial(new_pieces, sources, batch)
    return Batches(f"{what}, nats per character", make, losses, partial(nats, sources, 499), False)


_ON_SOURCES = partial(transformer, sources)
TASKS = {
    "digits": on_digits("CNN on digits", small_cnn),
    "residual": on_digits("residual CNN on digits", residual_cnn),
    "text": Batches(
        "language model, nats per character",
        partial(transformer, reference),
        partial(random_pieces, reference, BATCH),
        partial(nats, reference, 97),
        False,
    ),
    "sources": on_sources("language model on sources", _ON_SOURCES),
    "wide": on_sources("language model of width 256 on sources", partial(_ON_SOURCES, 256)),
    "adapters": on_sources("low-rank adapters on sources", adapted),
} | {
    f"sources, {n}": on_sources(f"language model on sources, batches of {n}", _ON_SOURCES, n)
    for n in (16, 512, 2048)
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
    task: str,
    method: str,
    seed: int,
    lr: float,
    seconds: float,
    steps: float = math.inf,
    points: int = 40,
) -> Run:
    """Until the time is up or all steps are taken. The score is measured at some points, outside the time."""
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
            due = progress + 1 / points
    curve.append((spent, len(losses), data.score(model)))
    return Run(task, method, seed, lr, curve, max(losses[len(losses) // 10 :]))


def tuned(task: str, method: str, seconds: float) -> float:
    """The best learning rate for a quarter of the time, on the first seed; NaN where there is none to choose."""
    trials = {
        lr: train(task, method, 0, lr, seconds / 4, points=1).final for lr in rates_of(method)
    }
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(
        trials,
        key=lambda lr: sign * trials[lr] if math.isfinite(trials[lr]) else -math.inf,
        default=math.nan,
    )


def run_digits(known: list[Run], steps: int, seeds: int) -> Iterator[Run]:
    """NaturalCG for a number of steps, and Adam and KFAC for the same time."""
    seconds = 0.0
    for seed in range(seeds):
        done = [r for r in known if (r.task, r.method, r.seed) == ("digits", "NaturalCG", seed)]
        own = done[0] if done else train("digits", "NaturalCG", seed, math.nan, math.inf, steps)
        seconds += own.seconds / seeds
        if not done:
            yield own
    yield from run_for(known, "digits", ["Adam", "KFAC"], seconds, seeds, {"Adam", "KFAC"})


def run_for(
    known: list[Run],
    task: str,
    methods: list[str],
    seconds: float,
    seeds: int,
    ahead: Collection[str] = ("KFAC", "Muon"),
) -> Iterator[Run]:
    """Every method for the same time, in turn; those that are ahead with all seeds."""
    rates = {run.method: run.lr for run in known if run.task == task}
    done = {(run.method, run.seed) for run in known if run.task == task}
    for seed in range(seeds):
        for method in methods:
            if (method, seed) not in done and (method in ahead or seed == 0):
                if method not in rates:
                    rates[method] = tuned(task, method, seconds)
                yield train(task, method, seed, rates[method], seconds)


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
    tasks = list(dict.fromkeys(run.task for run in runs))
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, task in zip(panels, tasks, strict=False):
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
        axes.set_title(data.what, fontsize=10)
        axes.set(xlabel="CPU seconds, one thread", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if data.higher_is_better:
            axes.set_ylim(0, 0.1)
        axes.set_ylabel(
            "share of wrong digits, held out"
            if data.higher_is_better
            else "nats per character, held out"
        )
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_axis_off()
    return figure


def write(runs: list[Run], name: str) -> None:
    """Keep the runs, and show them, in files of this name."""
    kept: dict[str, Any] = {"machine": machine(), "runs": [run._asdict() for run in runs]}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept) + "\n")
    (RESULTS / f"{name}.md").write_text(table(runs))
    draw(runs).savefig(RESULTS / f"{name}.png", dpi=110)


def known_runs(name: str) -> list[Run]:
    """Those that the file of results has."""
    path = RESULTS / f"{name}.json"
    return [Run(**run) for run in json.loads(path.read_text())["runs"]] if path.exists() else []


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=2_000, help="of NaturalCG on the digits (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of CPU time (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits", "text", "sources"])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["KFAC", "Muon", "Adam", "SOAP", "NaturalCG", "NaturalCG, 4 batches"],
        help="on all tasks but the digits",
    )
    parser.add_argument(
        "--name", default="minibatch", help="of the files in results/ (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = known_runs(arguments.name)
    known = list(runs)
    for run in chain.from_iterable(
        run_digits(known, arguments.steps, arguments.seeds)
        if task == "digits"
        else run_for(known, task, arguments.methods, arguments.seconds, arguments.seeds)
        for task in arguments.tasks
    ):
        runs.append(run)
        print(
            f"{run.task}, seed {run.seed}: {run.method} {run.final:.4f} after {run.seconds:.0f} s",
            flush=True,
        )
        write(runs, arguments.name)
    print(table(runs))


if __name__ == "__main__":
    main()
