"""Models whose weights ``parallelize_module`` has spread over ranks: the steps of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import assert_near
from helpers.ranks import on_ranks
from helpers.sharded import CLASSES, data_of, make_mlp, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ngd_optim import KFAC

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "differences": {"backend": "differences"},
    "momentum": {"momentum": 0.5, "preconditioner": "auto", "weight_decay": 0.01},
}
REFUSED = {
    "use backend='auto'": {"backend": "torch.func"},
    "use preconditioner='auto'": {"preconditioner": "kfac"},
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))) + x)


def make() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


def two_ranks(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    x, y = data_of(make_mlp)
    results: dict[str, Any] = {
        name: (
            train(make(), x, y, **options),
            train(parallelize_module(make(), mesh, PLAN), x, y, **options),
        )
        for name, options in OPTIONS.items()
    }
    model = parallelize_module(make(), mesh, PLAN)
    try:
        KFAC(model.parameters()).step(lambda: model(x).square().mean())
    except ValueError as error:
        results["use fully_shard alone"] = str(error)
    for sentence, options in REFUSED.items():
        try:
            train(parallelize_module(make(), mesh, PLAN), x, y, **options)
        except (RuntimeError, ValueError) as error:
            results[sentence] = str(error)
    return results


def four_ranks(rank: int) -> Any:
    """Each two have a part of the data, and of each weight."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    x, y = data_of(make_mlp)
    model = parallelize_module(make(), mesh["tensor"], PLAN)
    for module in (model.up, model):  # pyright: ignore[reportAttributeAccessIssue]
        fully_shard(module, mesh=mesh["data"])
    half = mesh["data"].get_local_rank()
    return train(make(), x, y), train(model, x[half::2], y[half::2])


def run(n: int, function: Any, folder: Path) -> list[Any]:
    on_ranks(n, function, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def assert_same_steps(results: list[Any], rtol: float) -> None:
    for one, found in results:
        assert_near(found[0], one[0], rtol=rtol)
        assert_near(found[1], one[1], rtol=100 * rtol)
        assert torch.equal(found[0], results[0][1][0])
        assert [r.reason for r in found[2]] == [r.reason for r in one[2]]
        assert [r.damping for r in found[2]] == [r.damping for r in one[2]]


@pytest.mark.slow
def test_rows_and_columns_of_weights_on_two_ranks(tmp_path: Path):
    results = run(2, two_ranks, tmp_path)
    for name in OPTIONS:
        rtol = 1e-8 if name == "differences" else 1e-10
        assert_same_steps([result[name] for result in results], rtol)
    for sentence in (*REFUSED, "use fully_shard alone"):
        assert all(sentence in result[sentence] for result in results)


@pytest.mark.slow
def test_sharded_and_tensor_parallel_at_once(tmp_path: Path):
    assert_same_steps(run(4, four_ranks, tmp_path), 1e-10)
