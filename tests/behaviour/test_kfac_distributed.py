"""KFAC on two processes: the steps of one process that has all of the data."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.problems import assert_near, flatten
from helpers.ranks import on_two_ranks, outcomes_of, results_of, try_each
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngd_optim import KFAC

STEPS = 5
PARTS = (slice(0, 8), slice(8, 16))


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any, y: Any) -> Any:
        return F.mse_loss(self.model(x), y)


def make_model() -> nn.Module:
    """With one output, so that signs of draws do not matter: all draws give the same factors."""
    torch.manual_seed(0)
    return WithLoss(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))).double()


def batch(step: int, part: slice) -> tuple[Any, Any]:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x[part], x[part, :1].sin()


def by_closure(optimizer: KFAC, model: Any, step: int, part: slice) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(*batch(step, part))
        loss.backward()
        return loss

    optimizer.step(closure)


def by_loss(optimizer: KFAC, model: Any, step: int, part: slice) -> None:
    optimizer.step(lambda: model(*batch(step, part)))


def by_watch(optimizer: KFAC, model: Any, step: int, part: slice) -> None:
    optimizer.zero_grad()
    with optimizer.watch():
        loss = model(*batch(step, part))
    loss.backward()
    optimizer.step()


def by_module(optimizer: KFAC, model: Any, step: int, part: slice) -> None:
    optimizer.zero_grad()
    model(*batch(step, part)).backward()
    optimizer.step()


def run(rank: int) -> dict[str, Any]:
    results = {}
    for name, way in {
        "closure": by_closure,
        "loss": by_loss,
        "watch": by_watch,
        "module": by_module,
    }.items():
        model = make_model()
        ddp = DistributedDataParallel(model)
        optimizer = KFAC(model.parameters(), renew_every=2)
        if name == "module":
            optimizer.watch(ddp)
        for step in range(STEPS):
            way(optimizer, ddp, step, PARTS[rank])
        results[name] = flatten(model.parameters())
    for name, way in {"group": by_loss, "group and watch": by_watch}.items():
        model = make_model()
        optimizer = KFAC(model.parameters(), renew_every=2, process_group=dist.group.WORLD)
        for step in range(STEPS):
            way(optimizer, model, step, PARTS[rank])
        results[name] = flatten(model.parameters())
    optimizer.step(lambda: model(*batch(9, PARTS[rank])) * (math.nan if rank else 1.0))
    results["refused"] = not optimizer.last_step.accepted, flatten(model.parameters())
    for name, without in {"one parameter": 1, "all": 4}.items():
        with optimizer.watch():
            model(*batch(9, PARTS[rank])).backward()
        for p in list(model.parameters())[: without * rank]:
            p.grad = None
        optimizer.step()
        results[name] = flatten(model.parameters())

    def fails_on_rank_1() -> Any:
        if rank == 1:
            raise KeyError("no such batch")
        return model(*batch(9, PARTS[rank]))

    try:
        optimizer.step(fails_on_rank_1)
    except Exception as error:
        results["error"] = repr(error), flatten(model.parameters())
    by_loss(optimizer, model, 9, PARTS[rank])
    results["after the error"] = flatten(model.parameters())
    model = make_model()
    ddp, optimizer = DistributedDataParallel(model), KFAC(model.parameters())
    optimizer.watch(model)  # and not ddp
    try:
        by_module(optimizer, ddp, 0, PARTS[rank])
    except RuntimeError as error:
        results["unseen"] = str(error)
    return results


def differ(name: str, rank: int) -> tuple[str, bool]:
    """What is told where rank 1 does otherwise after one step, and whether nothing has moved."""
    model = make_model()
    optimizer = KFAC(model.parameters(), process_group=dist.group.WORLD)
    first, *_, last = model.parameters()

    def closure() -> Any:
        if name == "raises" and rank:
            raise KeyboardInterrupt
        return model(*batch(0, PARTS[rank]))

    if name != "raises":
        optimizer.step(closure)
    if rank:
        if name == "rate":
            optimizer.param_groups[0]["lr"] *= 2
        if name == "parameters":
            first.data.add_(1e-9)
        if name == "state":
            saved = optimizer.state_dict()
            saved["state"][0]["momentum"] = 2 * saved["state"][0]["momentum"]
            optimizer.load_state_dict(saved)
        if name == "frozen":
            last.requires_grad_(False)
    before = flatten(model.parameters())
    try:
        optimizer.step(closure)
    except (KeyboardInterrupt, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", torch.equal(flatten(model.parameters()), before)
    return "no error", False


DIFFERENT = {
    "raises": "rank 1 raised an exception in this step",
    "rate": "ValueError: the settings differ between the ranks",
    "parameters": "ValueError: the parameters differ between the ranks",
    "state": "ValueError: the optimizer's state differs between the ranks",
    "frozen": "ValueError: the ranks of the process group have different parameters, or froze",
}


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    def both(folder: Path) -> None:
        on_two_ranks(try_all, folder)

    return results_of("kfac-different", both, tmp_path_factory)


def try_all(rank: int) -> dict[str, Any]:
    return try_each(rank, differ, DIFFERENT)


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_differ_are_told_and_stay_where_they_are(name, different):
    said = outcomes_of(name, different)
    assert all(stayed for _, stayed in said)
    assert DIFFERENT[name] in said[0][0]
    assert said[1][0] == "KeyboardInterrupt: " if name == "raises" else said[1] == said[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    def both(folder: Path) -> None:
        on_two_ranks(run, folder)

    return results_of("kfac", both, tmp_path_factory)


@pytest.fixture(scope="module")
def alone() -> Any:
    model = make_model()
    optimizer = KFAC(model.parameters(), renew_every=2)
    for step in range(STEPS):
        optimizer.step([lambda part=part, step=step: model(*batch(step, part)) for part in PARTS])
    return flatten(model.parameters())


@pytest.mark.parametrize("name", ["closure", "loss", "watch", "module", "group", "group and watch"])
def test_two_ranks_take_the_steps_of_one_process(name, ranks, alone):
    assert torch.equal(ranks[0][name], ranks[1][name])
    assert_near(ranks[0][name], alone, 1e-9)


def test_a_rank_whose_loss_is_not_finite_makes_all_skip_the_step(ranks):
    for result in ranks:
        refused, theta = result["refused"]
        assert refused
        assert torch.equal(theta, result["group and watch"])


@pytest.mark.parametrize("name", ["one parameter", "all"])
def test_parameters_that_one_rank_alone_has_reached_move_on_all(name, ranks):
    assert torch.equal(ranks[0][name], ranks[1][name])
    assert (ranks[0][name] != ranks[0]["group and watch"]).all()


def test_an_error_on_one_rank_stops_all(ranks):
    for result, said in zip(ranks, ("rank 1 raised an exception", "no such batch"), strict=True):
        message, theta = result["error"]
        assert said in message
        assert torch.equal(theta, result["all"])
        assert (result["after the error"] != theta).all()
    assert torch.equal(ranks[0]["after the error"], ranks[1]["after the error"])


def test_a_group_that_was_not_seen_is_asked_for(ranks):
    assert all("watch that module" in result["unseen"] for result in ranks)
