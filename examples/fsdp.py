"""NaturalCG on a model that is spread over processes: a transformer learns to write like Python's manual.

There is nothing to change: `fully_shard` (FSDP2) spreads the weights, `NaturalCG(model.parameters())` sees that. Each
process keeps its part of the weights and of the optimizer's state, and writes that to the checkpoint. To start it:

    python examples/fsdp.py --processes 2
    torchrun --nproc-per-node 2 examples/fsdp.py --checkpoint run/

By itself it trains three times: without interruption; until all processes are killed in the middle; and from the
checkpoint that these have left. Under torchrun it trains once, and goes on from the checkpoint if there is one.
"""

import argparse
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from ngd_optim import NaturalCG

CONTEXT, WIDTH, WINDOWS = 16, 24, 256


@dataclass
class Options:
    """How long to train, where the checkpoints are, and in which step to be killed, if at all."""

    steps: int
    checkpoint: Path
    killed_in: int | None = None


class Transformer(nn.Module):
    """Predicts each next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, text: Tensor) -> Tensor:
        """(batch, length) → (batch, length, 128)."""
        hidden = self.letters(text) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def make_model() -> Transformer:
    """The same weights in every process, and of them the part that is this one's."""
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def load_text() -> Tensor:
    """Windows of Python's manual, one letter longer than the context."""
    manual = "\n".join(topics.values()).encode("ascii", "replace")
    every = len(manual) // WINDOWS
    return torch.stack(
        [torch.tensor(list(manual[i * every :][: CONTEXT + 1])) for i in range(WINDOWS)]
    )


def train(rank: int, processes: int, options: Options) -> list[float]:
    """The loss before each step; from the checkpoint on, if there is one."""
    torch.set_num_threads(1)
    model = make_model()
    optimizer = NaturalCG(model.parameters())
    text = load_text()[rank::processes]

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = model(text[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        return loss

    losses: list[float] = []
    # Of a checkpoint that is not whole, because a process was killed, there are no metadata.
    checkpoints = sorted(path.parent for path in options.checkpoint.glob("*/.metadata"))
    if checkpoints:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "losses": losses}
        dcp.load(saved, checkpoint_id=checkpoints[-1])  # pyright: ignore[reportPrivateImportUsage]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        losses = saved["losses"]
        if rank == 0:
            print(f"goes on after step {len(losses)}", flush=True)
    while len(losses) < options.steps:
        if len(losses) + 1 == options.killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        losses.append(optimizer.step(closure).item())
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "losses": losses}
        folder = options.checkpoint / f"{len(losses):06}"
        dcp.save(saved, checkpoint_id=folder)  # pyright: ignore[reportPrivateImportUsage]
        if rank == 0:
            parameter: Any = model.head.weight
            print(
                f"step {len(losses)}: loss {losses[-1]:.4f} before it; this process has "
                f"{parameter.to_local().numel()} of the head's {parameter.numel()} weights",
                flush=True,
            )
    return losses


def draw(whole: list[float], resumed: list[float], killed_in: int, path: Path) -> None:
    """The losses against steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    steps = range(1, len(whole) + 1)
    ax.plot(steps, whole, color="#E69F00", linewidth=5, alpha=0.6, label="not interrupted")
    before, after = slice(0, killed_in - 1), slice(killed_in - 1, None)
    ax.plot(steps[before], resumed[before], "o-", color="#0072B2", label="until it is killed")
    ax.plot(steps[after], resumed[after], "s-", color="#009E73", label="from the checkpoint on")
    ax.axvline(killed_in - 0.5, color="0.5", linestyle=":")
    ax.set(xlabel="step", ylabel="training loss (nats per letter)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def spawned(rank: int, processes: int, folder: str, options: Options) -> None:
    """A process that this script started."""
    meeting = Path(folder, "meeting")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
    )
    losses = train(rank, processes, options)
    if rank == 0:
        torch.save(losses, Path(folder, "losses.pt"))
    dist.barrier()
    dist.destroy_process_group()


def run(processes: int, options: Options) -> list[float]:
    """Train in processes of its own; no losses if they were killed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(spawned, (processes, folder, options), nprocs=processes)
        except ProcessExitedException:
            print("all processes were killed", flush=True)
            return []
        return torch.load(Path(folder, "losses.pt"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, be killed, and go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="how many, without torchrun (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10, help="(%(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="the folder of all; without torchrun one that is removed again",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture"
    )
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.steps < 2:
        parser.error(
            f"--processes must be at least 1 and --steps at least 2, got {options.processes} and {options.steps}"
        )
    if "RANK" in os.environ:  # started by torchrun
        if options.checkpoint is None:
            parser.error("under torchrun, say where the checkpoint is: --checkpoint run/")
        dist.init_process_group("gloo")
        train(dist.get_rank(), dist.get_world_size(), Options(options.steps, options.checkpoint))
        dist.barrier()
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or Path(temporary, "checkpoint")
        whole = run(options.processes, Options(options.steps, folder))
        shutil.rmtree(folder)
        killed_in = options.steps // 2 + 1
        run(options.processes, Options(options.steps, folder, killed_in))
        resumed = run(options.processes, Options(options.steps, folder))
    print(
        f"the losses are those of the run that was not interrupted, bit for bit: {resumed == whole}"
    )
    draw(whole, resumed, killed_in, options.output)
    print(f"The curves are in {options.output}")


if __name__ == "__main__":
    main()
