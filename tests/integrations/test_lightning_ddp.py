"""``Trainer(strategy="ddp", devices=2)``: this file runs itself as the script that Lightning starts on two ranks."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers.torchvision_schemas  # noqa: F401  (the script needs it too, before Lightning)
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_modules import QUIET
from helpers.problems import dataset
from helpers.ranks import TIMEOUT, results_of
from helpers.scripts import make_environment
from lightning.pytorch.strategies import ModelParallelStrategy
from ngd_lightning import NaturalCGCallback, NaturalCGPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Subset, TensorDataset

from ngd_optim import NaturalCG, StepReport

pytestmark = pytest.mark.slow  # two processes that import Lightning
# As in test_distributed, but for the preconditioner, whose random draws differ and show in float32's last digits.
SOLVED = {"damping": 0.3, "cg_tol": 1e-14, "cg_progress_tol": 0.0, "preconditioner": None}
Result = tuple[Tensor, list[StepReport], dict[str, Any]]


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        self.hooks = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        self.hooks += 1
        self.grad = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self):
        return NaturalCG(self.parameters(), **SOLVED)


class WithBatchNorm(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(12))


class Sharded(Classifier):
    """``fully_shard`` over both ranks, which ``ModelParallelStrategy`` leaves to the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net.double()  # the strategy does not take precision="64-true"
        self.hooks = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x.double(), y), batch_idx)

    def configure_model(self):
        if not any(isinstance(module, FSDPModule) for module in self.modules()):
            mesh = self.device_mesh["data_parallel"]  # pyright: ignore
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def on_before_optimizer_step(self, optimizer) -> None:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        for p, weight in zip(given, self.parameters(), strict=True):
            assert isinstance(p.grad, DTensor)
            assert weight.grad is not None
            assert weight.grad.any()


class WithAdam(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class TwoPlayers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()

        def closure_first():
            loss = F.cross_entropy(self.first(x), y)
            self.log("train_loss", loss, sync_dist=True)
            first.zero_grad()
            self.manual_backward(loss)

        first.step(closure=closure_first)
        second.step(closure=lambda: F.mse_loss(self.second(x), self.first(x).detach()))

    def configure_optimizers(self):
        return NaturalCG(self.first.parameters(), **SOLVED), NaturalCG(
            self.second.parameters(), **SOLVED
        )


class Noting(L.Callback):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        last = [optimizer.last_step for optimizer in trainer.optimizers]
        self.reports += [report for report in last if report and report not in self.reports]
        self.logged.append(float(trainer.callback_metrics["train_loss"]))


def fit(
    module: L.LightningModule, loader: DataLoader, *callbacks: L.Callback, **options: Any
) -> Result:
    noted = Noting()
    trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[noted, *callbacks], **options)
    trainer.fit(module, loader)
    extra = {
        "logged": noted.logged,
        "global_step": trainer.global_step,
        "hooks": getattr(module, "hooks", None),
        "grad": getattr(module, "grad", None),
        "buffers": [buffer.clone() for buffer in module.buffers()],
    }
    if isinstance(module, Sharded):
        trainer.save_checkpoint(options["default_root_dir"])
    whole = [getattr(p.detach(), "full_tensor", p.detach)() for p in module.parameters()]
    return parameters_to_vector(whole), noted.reports, extra


def parts(rank: int) -> DataLoader:
    """Every rank's own half of each joined batch of 16."""
    return DataLoader(Subset(dataset(), range(rank, 48, 2)), batch_size=8)


def sharded(folder: Path) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    folder = folder / "sharded"
    return {
        "strategy": strategy,
        "devices": 2,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
    }


def resume(module: L.LightningModule, loader: DataLoader, folder: Path) -> Any:
    """What Lightning's distributed checkpoint has, and goes on with."""
    noted = Noting()
    options = {**QUIET, **sharded(folder), "max_epochs": 3, "callbacks": [noted]}
    L.Trainer(**options).fit(module, loader, ckpt_path=folder / "sharded", weights_only=False)
    whole = [p.detach().full_tensor() for p in module.parameters()]  # pyright: ignore
    return parameters_to_vector(whole), noted.reports, {}


def joined() -> DataLoader:
    return DataLoader(dataset(), batch_size=16)


class Spoilt(TensorDataset):
    """Data with a NaN on rank 1."""

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x * (math.nan if os.environ["LOCAL_RANK"] == "1" else 1), y


def main(folder: Path) -> None:
    """Runs on each rank."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ddp = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    results = {
        "64-true": fit(Classifier(), parts(rank), precision="64-true", **ddp),
        "32-true": fit(
            Classifier(), parts(rank), NaturalCGCallback(picture=folder / "run.png"), **ddp
        ),
        "manual": fit(TwoPlayers(), parts(rank), precision="64-true", **ddp),
        "plugin": fit(
            WithAdam(), parts(rank), plugins=[NaturalCGPlugin("64-true", **SOLVED)], **ddp
        ),
        "batch norm": fit(WithBatchNorm(), parts(rank), **ddp),
        "accumulated": fit(
            Classifier(), parts(rank), precision="64-true", accumulate_grad_batches=2, **ddp
        ),
        "accumulated batch norm": fit(
            WithBatchNorm(), parts(rank), accumulate_grad_batches=2, **ddp
        ),
        "nan": fit(Classifier(), DataLoader(Spoilt(*dataset().tensors), batch_size=16), **ddp),
        "sharded": fit(Sharded(), parts(rank), **sharded(folder)),
        "resumed": resume(Sharded(), parts(rank), folder),
        "sampler": fit(
            Classifier(),
            DataLoader(dataset(), batch_size=8),
            **{**ddp, "use_distributed_sampler": True},
        ),
    }
    torch.save(results, folder / f"{rank}.pt")


def run_this_file(folder: Path) -> None:
    """As a user starts a script; Lightning starts the second rank."""
    ranks = ("LOCAL_", "MASTER_", "NODE_", "WORLD_")
    environment = {k: v for k, v in make_environment().items() if not k.startswith(ranks)}
    output = folder / "output.txt"
    with output.open("w") as file:
        command = [sys.executable, __file__, str(folder)]
        run = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            run.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # with the rank that it started
            run.wait()
    assert run.returncode == 0, output.read_text()
    assert (folder / "run.png").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    return results_of("lightning_ddp", run_this_file, tmp_path_factory)


def steps(reports: list[StepReport]) -> list[Any]:
    return [repr(report.as_dict()) for report in reports]  # repr, because nan != nan


NAMES = [
    "64-true",
    "32-true",
    "manual",
    "plugin",
    "batch norm",
    "nan",
    "sampler",
    "sharded",
    "resumed",
]
NAMES += ["accumulated", "accumulated batch norm"]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_stay_bit_identical_and_decide_alike(ranks: Any, name: str) -> None:
    (theta, reports, _), (other, other_reports, _) = (rank[name] for rank in ranks)
    assert torch.equal(theta, other)
    assert steps(reports) == steps(other_reports)
    assert theta.isfinite().all()


@pytest.mark.parametrize(
    ("name", "module_class", "precision", "tolerance"),
    [
        ("64-true", Classifier, "64-true", 1e-10),
        ("32-true", Classifier, "32-true", 1e-5),  # six steps, the last with a damping of 0.005
        ("manual", TwoPlayers, "64-true", 1e-10),
        ("plugin", Classifier, "64-true", 1e-10),
        ("sharded", Classifier, "64-true", 1e-10),
        ("accumulated", Classifier, "64-true", 1e-10),
    ],
)
def test_the_steps_are_those_of_one_process_on_the_joined_batch(
    ranks: Any, name: str, module_class: type[L.LightningModule], precision: Any, tolerance: float
) -> None:
    theta, reports, extra = ranks[0][name]
    batches = 2 if name == "accumulated" else 1
    expected, expected_reports, expected_extra = fit(
        module_class(), joined(), precision=precision, accumulate_grad_batches=batches
    )
    assert (theta - expected).norm() <= tolerance * expected.norm()
    assert len(reports) == len(expected_reports)
    assert all(report.accepted for report in reports)
    assert extra["global_step"] == expected_extra["global_step"] == len(reports)
    assert extra["hooks"] in (None, expected_extra["hooks"])
    assert extra["logged"] == pytest.approx(expected_extra["logged"], rel=max(1e-6, tolerance))
    if extra["grad"] is not None:  # the hook saw the global gradient
        torch.testing.assert_close(
            extra["grad"], expected_extra["grad"], rtol=0, atol=10 * tolerance
        )


def test_buffers_follow_rank_0_and_move_once_per_step(ranks: Any) -> None:
    for rank in ranks:
        _, reports, extra = rank["batch norm"]
        assert reports[-1].backend == "double-backward"
        assert extra["buffers"][2] == len(reports) == 6
        _, reports, extra = rank["accumulated batch norm"]
        assert len(reports) == 4
        assert extra["buffers"][2] == 6


def test_a_sharded_run_goes_on_from_lightnings_distributed_checkpoint(ranks: Any) -> None:
    theta, reports, _ = ranks[0]["resumed"]
    trainer = L.Trainer(**QUIET, max_epochs=3, precision="64-true")
    module = Classifier()
    trainer.fit(module, joined())
    expected = parameters_to_vector(module.parameters()).detach()
    assert (theta - expected).norm() <= 1e-10 * expected.norm()
    assert len(reports) == 3


def test_nan_on_one_rank_is_rejected_by_all(ranks: Any) -> None:
    theta, reports, _ = ranks[0]["nan"]
    assert not any(report.accepted for report in reports)
    assert torch.equal(theta, parameters_to_vector(Classifier().parameters()).detach())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
