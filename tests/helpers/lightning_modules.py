"""A small LightningModule, and a Trainer that notes its steps, writes nothing and prints nothing."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from helpers.problems import dataset
from ngd_optim import NaturalCG, StepReport

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(L.LightningModule):
    """A small classifier; subclasses change one thing."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return NaturalCG(self.parameters(), **self.options)


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(dataset(), batch_size)


class Reports(L.Callback):
    """Notes what each step did."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(trainer.optimizers[0], NaturalCG):
            self.reports.append(trainer.optimizers[0].last_step)


def fit(
    module: L.LightningModule,
    *callbacks: L.Callback,
    loader_: DataLoader | None = None,
    **options: Any,
) -> tuple[L.Trainer, list[StepReport]]:
    noted = Reports()
    settings: dict[str, Any] = {
        **QUIET,
        "max_epochs": 2,
        "enable_checkpointing": any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ),
        **options,
    }
    val_loader = settings.pop("val_loader", None)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=[noted, *callbacks], **settings)
    trainer.fit(module, loader_ or loader(), val_loader, ckpt_path=ckpt_path)
    return trainer, noted.reports


def vector(module: nn.Module) -> Tensor:
    return parameters_to_vector(module.parameters()).detach()


def same_steps(a: list[StepReport], b: list[StepReport]) -> bool:
    return [(r.loss, r.new_loss, r.kl, r.cg_iters, r.damping) for r in a] == [
        (r.loss, r.new_loss, r.kl, r.cg_iters, r.damping) for r in b
    ]
