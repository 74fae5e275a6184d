"""Run a function in processes that talk by gloo, once for all the tests that look at what it did."""

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 150


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> None:
    """Save what ``function(rank)`` returns on each rank as ``folder/<rank>.pt``."""
    on_ranks(2, function, folder)


def on_ranks(n: int, function: Callable[[int], Any], folder: Path) -> None:
    """The same on ``n`` ranks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.spawn(_run, (function, folder, n), nprocs=n, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks did not end within {TIMEOUT} s")


def results_of(
    name: str, run: Callable[[Path], None], factory: pytest.TempPathFactory
) -> list[Any]:
    """What ``run(folder)`` saved as ``0.pt`` and ``1.pt``; among the workers of pytest-xdist, one runs it for all."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 2 * TIMEOUT
        while not (folder / "ended").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        try:
            run(folder)
        finally:
            (folder / "ended").touch()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def try_each(
    rank: int, scenario: Callable[[str, int], Any], names: Iterable[str]
) -> dict[str, Any]:
    """What ``scenario(name, rank)`` returns for each name; where it raises, an AssertionError that tells of it."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = scenario(name, rank)
        except BaseException:  # some raise a KeyboardInterrupt of their own
            results[name] = AssertionError(f"rank {rank}: {traceback.format_exc()}")
        dist.barrier()
    return results


def outcomes_of(name: str, results: Iterable[dict[str, Any]]) -> list[Any]:
    """What each rank returned; what one of them raised, raised here."""
    found = [result[name] for result in results]
    for outcome in found:
        if isinstance(outcome, AssertionError):
            raise outcome
    return found


def scenarios_on_two_ranks(
    what: str,
    scenario: Callable[[str, int], Any],
    names: Iterable[str],
    quick: Collection[str],
    request: pytest.FixtureRequest,
    factory: pytest.TempPathFactory,
) -> Callable[[str], list[Any]]:
    """What each rank returned in a scenario. The quick ones share a pair of processes, and the slow tests' another.

    Args:
        what: they are about, for a folder's name.
        scenario: a module's function of a name and a rank, which processes can import.
        names: of all scenarios.
        quick: of those that quick tests look at.
        request, factory: pytest's.
    """
    is_slow = request.node.get_closest_marker("slow") is not None
    chosen = [name for name in names if name not in quick] if is_slow else list(quick)
    run = partial(on_two_ranks, partial(try_each, scenario=scenario, names=chosen))
    results = results_of(f"{what}{', slow' if is_slow else ''}", run, factory)
    return lambda name: outcomes_of(name, results)


def mark_slow(names: Iterable[str], quick: Collection[str], prefix: str = "") -> list[Any]:
    """Parameters of a test, each with the marker of the scenario that it looks at."""
    return [
        pytest.param(name, marks=[] if prefix + name in quick else [pytest.mark.slow])
        for name in names
    ]


def _run(rank: int, function: Callable[[int], Any], folder: Path, n: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()
