"""KFAC under Lightning's Trainer takes the steps of a plain loop."""

import csv
import logging
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_modules import QUIET
from helpers.problems import assert_near, dataset, flatten
from lightning.pytorch.loggers import CSVLogger
from ngd_lightning import KFACPlugin, NaturalCGCallback
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from ngd_optim import KFAC

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*treespec",
)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

SETTINGS = {"renew_every": 3, "weight_decay": 1e-3}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return KFAC(self.parameters(), **SETTINGS)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class WithAdam(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def loader():
    return DataLoader(dataset(), batch_size=8)


def fit(module, **options):
    L.Trainer(**{**QUIET, "max_epochs": 2, **options}).fit(module, loader())
    return flatten(module.net.parameters())


def plain(accumulate=1, clip=None):
    net = make_net()
    optimizer = KFAC(net.parameters(), **SETTINGS)
    for _ in range(2):
        for i, (x, y) in enumerate(loader()):
            with optimizer.watch():
                loss = F.cross_entropy(net(x), y) / accumulate
            if i % accumulate == 0:
                optimizer.zero_grad()
            loss.backward()
            if (i + 1) % accumulate == 0:
                if clip:
                    clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
    return flatten(net.parameters())


@pytest.mark.parametrize("make", [Classifier, Manual])
def test_the_steps_of_a_plain_loop(make):
    assert torch.equal(fit(make()), plain())


def test_accumulated_batches():
    assert_near(fit(Classifier(), accumulate_grad_batches=3), plain(3), 1e-6)


def test_clipped_gradients():
    assert_near(fit(Classifier(), gradient_clip_val=0.1), plain(clip=0.1), 1e-6)
    assert not torch.equal(plain(), plain(clip=0.1))


def test_plugin():
    assert torch.equal(fit(WithAdam(), plugins=[KFACPlugin(**SETTINGS)]), plain())
    with pytest.raises(TypeError, match="KFAC has no option max_kl; it has adapt_radius"):
        KFACPlugin(max_kl=0.1)


def test_bfloat16():
    assert fit(Classifier(), precision="bf16-mixed").isfinite().all()


def test_the_callback_logs_and_draws(tmp_path):
    callback = NaturalCGCallback(["radius"], picture=tmp_path / "run.png")
    logger = CSVLogger(tmp_path)
    fit(Classifier(), callbacks=[callback], logger=logger, log_every_n_steps=1)
    reports = callback.runs["ngd"]
    assert len(reports) == 12
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["ngd/radius"]]
    assert [float(row["ngd/radius"]) for row in rows] == pytest.approx([r.radius for r in reports])
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert not math.isnan(reports[-1].loss)
