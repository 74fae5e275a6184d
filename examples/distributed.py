"""NaturalCG on several processes: each has a part of the images, and all take the step of the whole batch.

There is nothing to change: the optimizer sees that the closure runs a DistributedDataParallel module, and averages
losses, gradients and curvature products over the processes. Start it either way:

    python examples/distributed.py --processes 2
    torchrun --nproc-per-node 2 examples/distributed.py

It trains a classifier of handwritten digits, then again in one process on all images, and draws how far the two are
apart: by rounding errors, which truncated solves amplify from step to step.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from ngd_optim import NaturalCG


@dataclass
class Run:
    """The loss before each step, and the parameters after it."""

    losses: list[float]
    parameters: list[Tensor]


def make_model() -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Run:
    """Some steps on all of the images given."""
    optimizer = NaturalCG(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    run = Run([], [])
    for _ in range(steps):
        run.losses.append(optimizer.step(closure).item())
        run.parameters.append(parameters_to_vector(model.parameters()).detach().clone())
    return run


def work(rank: int, processes: int, steps: int, output: Path) -> None:
    """What each process does, once they can talk to each other."""
    torch.set_num_threads(1)
    pixels, targets = load_digits(return_X_y=True)
    n = len(pixels) // processes * processes  # equal parts: each process counts the same
    images, labels = torch.tensor(pixels[:n]) / 16, torch.tensor(targets[:n])

    model = DistributedDataParallel(make_model())
    together = train(model, images[rank::processes], labels[rank::processes], steps)

    everyones = [torch.empty_like(together.parameters[-1]) for _ in range(processes)]
    dist.all_gather(everyones, together.parameters[-1])
    if rank == 0:
        identical = all(torch.equal(everyones[0], other) for other in everyones)
        alone = train(make_model(), images, labels, steps)
        distances = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(together.parameters, alone.parameters, strict=True)
        ]
        print(f"{processes} processes: loss {together.losses[-1]:.6g} before step {steps}")
        print(f"one process:  loss {alone.losses[-1]:.6g}")
        print(f"parameters are bit-identical on all processes: {identical}")
        print(
            f"relative distance to the parameters of one process: {distances[0]:.1e} after the first step"
        )
        draw(processes, together, alone, distances, output)
        print(f"The curves are in {output}")


def draw(processes: int, together: Run, alone: Run, distances: list[float], path: Path) -> None:
    """The losses against steps, and the distance between the parameters."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(len(alone.losses))
    left.plot(
        steps,
        alone.losses,
        color="#E69F00",
        linewidth=5,
        alpha=0.6,
        label="one process, all images",
    )
    left.plot(
        steps,
        together.losses,
        color="#0072B2",
        linewidth=1.5,
        label=f"{processes} processes, a part each",
    )
    left.set(yscale="log", ylabel="training loss", xlabel="steps")
    left.legend(frameon=False)
    right.plot(range(1, len(distances) + 1), distances, "o-", color="0.3", markersize=4)
    right.set(
        yscale="log",
        ylabel="‖θ − θ₁‖ / ‖θ₁‖",
        xlabel="steps",
        title="Distance of the parameters (float64): rounding",
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def spawned(rank: int, processes: int, meeting: str, steps: int, output: Path) -> None:
    """A process that this script started."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
    )
    work(rank, processes, steps, output)
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train in several processes and in one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="how many, without torchrun (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("figures/distributed.png"))
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.steps < 1:
        parser.error(
            f"--processes and --steps must be at least 1, got {options.processes} and {options.steps}"
        )
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        work(dist.get_rank(), dist.get_world_size(), options.steps, options.figure)
        dist.barrier()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            shared = (options.processes, f"{folder}/meeting", options.steps, options.figure)
            spawn(spawned, shared, nprocs=options.processes)


if __name__ == "__main__":
    main()
