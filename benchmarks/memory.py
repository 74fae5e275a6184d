"""What each of several processes has in memory for the optimizer, and what it exchanges, beside the parameters.

    python benchmarks/memory.py

1, 2 and 4 processes on gloo train six equal layers on eight samples each, so that graph and data are small. A step of
NaturalCG has ten products and one trial point; Kronecker factors are renewed in it, and in one of KFAC. Kept is what
tensors occupy after two steps more than before the optimizer was made: its state and what it holds on to. The peak is
what the process occupies at most within the third step, more than after the second, as the kernel sees it (Linux).
Exchanged is what goes in and out of a process in that step: twice the size of an all-reduce, once that of what is
gathered, scattered or sent. All are of the rank that has most, and in units of the parameters' size. Writes
results/memory.json and .md.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import mlp
from timing import machine
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ngd_optim import KFAC, NaturalCG

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4)
WIDTH, LAYERS, BATCH, PRODUCTS = 512, 6, 8, 10
WORK = {"max_cg_iters": PRODUCTS, "cg_tol": 0.0, "cg_progress_tol": 0.0, "max_backtracks": 0}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "NaturalCG, no preconditioner": lambda params, **options: NaturalCG(
        params, preconditioner=None, lr=1e-6, **WORK, **options
    ),
    "NaturalCG, Kronecker factors": lambda params, **options: NaturalCG(
        params, preconditioner="kfac", lr=1e-6, **WORK, **options
    ),
    "KFAC": KFAC,
}
ENGINES = ("DistributedDataParallel", "the same, shard_state=True", "fully_shard")
# By name, how many times its largest argument a rank sends and receives.
EXCHANGES = {
    "all_reduce": 2,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_to_all_single": 1,
    "broadcast": 1,
}


def wrap(engine: str) -> nn.Module:
    """The model."""
    torch.manual_seed(0)
    model = mlp(*[WIDTH] * (LAYERS + 1))
    if engine != "fully_shard":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def live_bytes() -> int:
    """What all tensors of this process occupy."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """What the process occupies at most in a call, more than before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@contextmanager
def exchanged() -> Iterator[list[int]]:
    """How many bytes go in and out of this rank."""
    found: list[int] = []
    before = {name: getattr(dist, name) for name in EXCHANGES if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [v for v in (*args, *options.values()) if isinstance(v, Tensor)]
            found.append(EXCHANGES[name] * max(t.nbytes for t in tensors))
            return before[name](*args, **options)

        return call

    for name in before:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def train(name: str, engine: str, rank: int) -> list[float]:
    """What is kept, the peak and what is exchanged, in units of the parameters' size."""
    model = wrap(engine)
    size = 4 * sum(p.numel() for p in model.parameters())
    x, y = (
        torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(rank)),
        torch.arange(BATCH),
    )

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = live_bytes()
    options = {"shard_state": True} if engine == ENGINES[1] else {}
    optimizer = OPTIMIZERS[name](model.parameters(), **options)
    for _ in range(2):
        optimizer.step(closure)
        optimizer.zero_grad()
    kept = live_bytes() - before
    with exchanged() as bytes_moved:
        peak = peak_bytes(lambda: optimizer.step(closure))
    return [kept / size, peak / size, sum(bytes_moved) / size]


def measure(rank: int, ranks: int, folder: str) -> None:
    """One process: each engine with each optimizer."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks
    )
    results: dict[str, dict[str, list[float]]] = {}
    for name in OPTIMIZERS:
        for engine in ENGINES:
            found = torch.tensor(train(name, engine, rank))
            dist.all_reduce(found, dist.ReduceOp.MAX)
            results.setdefault(name, {})[engine] = found.tolist()
            if rank == 0:
                print(ranks, name, engine, [round(v, 2) for v in found.tolist()], flush=True)
    if rank == 0:
        Path(f"{folder}/{ranks}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each optimizer and engine."""
    n = sum(p.numel() for p in mlp(*[WIDTH] * (LAYERS + 1)).parameters())
    header = " | ".join(
        f"{what}, {ranks}" for what in ("kept", "peak", "exchanged") for ranks in RANKS
    )
    lines = [
        f"Of {n:,} parameters in {LAYERS} layers; by 1, 2 and 4 processes.",
        "",
        f"| | | {header} |",
        "|---" * (2 + 3 * len(RANKS)) + "|",
    ]
    for name in OPTIMIZERS:
        for engine in ENGINES:
            columns = zip(*(results[str(ranks)][name][engine] for ranks in RANKS), strict=True)
            cells = [f"{value:.1f}" for column in columns for value in column]
            lines.append(f"| {name} | {engine} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, and write."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # what is freed goes back to the system
    argparse.ArgumentParser(description=__doc__).parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            multiprocessing.spawn(measure, (ranks, folder), nprocs=ranks)  # pyright: ignore
            results[str(ranks)] = json.loads(Path(f"{folder}/{ranks}.json").read_text())
    RESULTS.joinpath("memory.json").write_text(
        json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
    )
    RESULTS.joinpath("memory.md").write_text(table(results))


if __name__ == "__main__":
    main()
