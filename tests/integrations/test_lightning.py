"""LightningModules under a real Trainer: everything that a user of Lightning knows happens once per optimizer step."""

import csv
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_modules import QUIET, Classifier, fit, loader, same_steps, vector
from helpers.mnist_files import write_mnist
from helpers.problems import dataset
from helpers.scripts import EXAMPLES, load_script
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from ngd_lightning import NaturalCGCallback, NaturalCGPlugin
from torch import Tensor, nn
from torch.distributions import Categorical
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import MeanSquaredError

from ngd_optim import NaturalCG, StepReport

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*torch.jit.script",
    "ignore:.*treespec",
)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class LitAutoEncoder(L.LightningModule):
    """As Lightning's documentation writes it (Lightning in 15 minutes), for Adam."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def plain_training(
    module: Classifier,
    make_closure: Callable[[Tensor, Tensor], Callable[[], Any]],
    epochs: int = 2,
    **options: Any,
) -> list[StepReport]:
    """The same steps without Lightning."""
    optimizer = NaturalCG(module.parameters(), **options)
    reports = []
    for _ in range(epochs):
        for x, y in loader():
            optimizer.step(make_closure(x, y))
            assert optimizer.last_step is not None
            reports.append(optimizer.last_step)
    return reports


# Automatic optimization


def test_lightning_finds_the_package_by_itself() -> None:
    (entry,) = entry_points(group="lightning.pytorch.callbacks_factory", name="ngd_optim")
    assert entry.value == "ngd_lightning:callbacks", (
        "install the package again: its entry point is missing"
    )


def test_a_module_of_the_documentation_trains_after_changing_one_line() -> None:
    class WithNaturalCG(LitAutoEncoder):
        def configure_optimizers(self):
            return NaturalCG(self.parameters())

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8))
    trainer, reports = fit(WithNaturalCG(encoder, decoder), loader_=loader(48), max_epochs=6)
    assert trainer.global_step == len(reports) == 6
    assert all(report.accepted for report in reports)
    assert reports[-1].new_loss < 0.6 * reports[0].loss


def test_the_steps_are_those_of_a_plain_training_loop() -> None:
    module, plain = Classifier(), Classifier()
    _, reports = fit(module)
    expected = plain_training(plain, lambda x, y: lambda: F.cross_entropy(plain.net(x), y))
    assert same_steps(reports, expected)
    assert torch.equal(vector(module), vector(plain))
    assert {report.backend for report in reports} == {"double-backward"}


def test_a_distribution_makes_a_natural_gradient_step() -> None:
    class WithDistribution(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            distribution = Categorical(logits=self.net(x))
            return {"loss": -distribution.log_prob(y).mean(), "distribution": distribution}

    def likelihood(x: Tensor, y: Tensor) -> Callable[[], Any]:
        def closure() -> Any:
            distribution = Categorical(logits=plain.net(x))
            return -distribution.log_prob(y).mean(), distribution

        return closure

    module, plain = WithDistribution(), Classifier()
    _, reports = fit(module)
    assert same_steps(reports, plain_training(plain, likelihood))
    assert torch.equal(vector(module), vector(plain))
    assert all(0 < report.kl <= 0.01 for report in reports)


def test_what_training_step_logs_is_logged_once_at_the_point_before_the_step(
    tmp_path: Path,
) -> None:
    class Counting(Classifier):
        runs = 0

        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(4, average="micro")
            self.scores = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])
            self.error = MeanSquaredError()

        def training_step(self, batch, batch_idx):
            self.runs += 1
            x, y = batch
            logits = self.net(x)
            self.accuracy(logits, y)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log_dict(self.scores(logits, y))
            self.error.update(logits, F.one_hot(y, 4).float())
            self.log(
                "correct",
                (logits.argmax(1) == y).sum().float(),
                reduce_fx="sum",
                on_step=False,
                on_epoch=True,
            )
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.seen = int(self.error.total), self.accuracy._update_count, self.error._update_count
            self.error.reset()

    module = Counting()
    trainer, reports = fit(module, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2)
    assert module.runs <= len(reports) + 2  # the first step with a closure checks it
    assert {report.backend for report in reports} == {"double-backward"}
    assert module.seen == (48 * 4, 3, 3)
    last_epoch = [report.loss for report in reports[3:]]
    assert trainer.callback_metrics["train_loss_epoch"] == pytest.approx(sum(last_epoch) / 3)
    assert trainer.callback_metrics["correct"] == pytest.approx(
        48 * float(trainer.callback_metrics["accuracy"])
    )
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").open()))
    logged = [float(row["train_loss_step"]) for row in rows if row.get("train_loss_step")]
    assert logged == pytest.approx([report.loss for report in reports], rel=1e-6)


class Hooks(L.Callback):
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls["zero_grad"] += 1

    def on_before_backward(self, trainer, pl_module, loss):
        self.calls["before_backward"] += 1

    def on_after_backward(self, trainer, pl_module):
        self.calls["after_backward"] += all(p.grad is not None for p in pl_module.parameters())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.calls["optimizer_step"] += 1


def test_hooks_and_global_step_happen_once_per_step_and_see_the_gradient() -> None:
    class Looking(Classifier):
        worst = 0.0

        def on_after_backward(self) -> None:
            self.at = vector(self).clone()

        def on_before_optimizer_step(self, optimizer) -> None:
            assert torch.equal(self.at, vector(self))
            x, y = dataset()[
                16 * (self.trainer.global_step % 3) : 16 * (self.trainer.global_step % 3) + 16
            ]
            expected = torch.autograd.grad(F.cross_entropy(self.net(x), y), list(self.parameters()))
            for p, gradient in zip(self.parameters(), expected, strict=True):
                assert p.grad is not None
                self.worst = max(self.worst, float((p.grad - gradient).abs().max()))
            self.log(
                "grad_norm",
                torch.stack(
                    [p.grad.norm() for p in self.parameters() if p.grad is not None]
                ).norm(),
            )

    module, hooks = Looking(), Hooks()
    trainer, reports = fit(module, hooks)
    assert trainer.global_step == len(reports) == 6
    assert set(hooks.calls.values()) == {6}
    assert len(hooks.calls) == 4
    assert module.worst < 1e-6
    assert trainer.callback_metrics["grad_norm"] == pytest.approx(reports[-1].grad_norm, rel=1e-5)


def test_buffers_and_random_numbers_move_once_per_step() -> None:
    class WithBatchNorm(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 4)
            )

    module = WithBatchNorm()
    _, reports = fit(module)
    assert module.net[1].num_batches_tracked == len(reports)
    assert sum(report.accepted for report in reports) >= 5


def test_learning_rate_schedulers_work() -> None:
    class Scheduled(Classifier):
        rates: list[float]

        def configure_optimizers(self):
            optimizer = NaturalCG(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

        def on_before_optimizer_step(self, optimizer) -> None:
            self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]

    module = Scheduled()
    fit(module)
    assert module.rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_validation_early_stopping_and_overfit_batches() -> None:
    trainer, reports = fit(
        Classifier(),
        EarlyStopping("val_loss", min_delta=0.01, patience=2),
        val_loader=loader(48),
        max_epochs=200,
    )
    assert trainer.current_epoch < 199
    assert len(reports) == trainer.global_step == 3 * trainer.current_epoch
    trainer, reports = fit(Classifier(), overfit_batches=1, max_epochs=8)
    assert len(reports) == 8
    assert reports[-1].new_loss < 0.5 * reports[0].loss


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(precision: Any) -> None:
    class Typed(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.dtypes = {self.net(batch[0]).dtype, next(self.parameters()).dtype}
            return loss

    module = Typed()
    _, reports = fit(module, precision=precision, max_epochs=4)
    assert module.dtypes == (
        {torch.bfloat16, torch.float32} if precision == "bf16-mixed" else {torch.float64}
    )
    assert reports[-1].new_loss < reports[0].loss
    if precision == "64-true":
        plain = Classifier().double()
        expected = plain_training(
            plain, lambda x, y: lambda: F.cross_entropy(plain.net(x.double()), y), epochs=4
        )
        assert same_steps(reports, expected)


def test_resuming_from_a_checkpoint_is_bit_identical(tmp_path: Path) -> None:
    class WithDropout(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 4))

        def on_train_batch_start(self, batch, batch_idx) -> None:
            torch.manual_seed(self.global_step)

    whole = WithDropout()
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    _, all_reports = fit(whole, max_epochs=4)
    half = WithDropout()
    half.load_state_dict(start)
    checkpoint = ModelCheckpoint(tmp_path, filename="half")
    _, first_reports = fit(half, checkpoint, max_epochs=2)
    resumed = WithDropout()
    _, second_reports = fit(resumed, max_epochs=4, ckpt_path=checkpoint.best_model_path)
    assert same_steps([*first_reports, *second_reports], all_reports)
    assert torch.equal(vector(resumed), vector(whole))


# What cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.5}, "gradient_clip_val=0.5.*max_kl"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, "16-mixed.*bf16-mixed"),
        ({"precision": "16-true"}, "16-true.*bf16-mixed"),
    ],
)
def test_options_that_cannot_work_are_refused_when_fit_starts(options: Any, message: str) -> None:
    module = Classifier()
    start = vector(module).clone()
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, **options)
    assert torch.equal(vector(module), start.to(vector(module).dtype))


def test_options_that_cannot_work_are_no_concern_of_other_optimizers() -> None:
    class WithSGD(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer, _ = fit(WithSGD(), accumulate_grad_batches=3, gradient_clip_val=1.0)
    assert trainer.global_step == 2


def test_gradients_changed_in_a_hook_are_refused() -> None:
    class Clipping(Classifier):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
        ):
            nn.utils.clip_grad_norm_(self.parameters(), 1e-3)

    module = Clipping()
    start = vector(module).clone()
    with pytest.raises(RuntimeError, match=r"a hook changed the gradients.*max_kl"):
        fit(module)
    assert torch.equal(vector(module), start)


def test_a_skipped_batch_is_refused() -> None:
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(ValueError, match="training_step returned None"):
        fit(Skipping())


# Manual optimization


class TwoPlayers(L.LightningModule):
    """Two optimizers, as in Lightning's documentation of manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)
        self.evaluations = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()

        def closure_first():
            self.evaluations += 1
            loss = F.cross_entropy(self.first(x), y)
            self.log("first", loss, on_step=False, on_epoch=True)
            first.zero_grad()
            self.manual_backward(loss)

        def closure_second():
            loss = F.mse_loss(self.second(x), self.first(x).detach())
            self.log("second", loss, on_step=False, on_epoch=True)
            return loss

        first.step(closure=closure_first)
        second.step(closure=closure_second)

    def configure_optimizers(self):
        return NaturalCG(self.first.parameters()), NaturalCG(self.second.parameters(), damping=0.1)


class ManualReports(L.Callback):
    def __init__(self) -> None:
        self.reports: list[list[StepReport]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reports.append([optimizer.last_step for optimizer in trainer.optimizers])


def manual_fit(module: L.LightningModule, *callbacks: L.Callback) -> L.Trainer:
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, loader())
    return trainer


def test_two_optimizers_under_manual_optimization() -> None:
    module, noted, hooks = TwoPlayers(), ManualReports(), Hooks()
    hooks.on_after_backward = lambda trainer, pl_module: hooks.calls.update(["after_backward"])
    trainer = manual_fit(module, noted, hooks)
    plain = TwoPlayers()
    first, second = plain.configure_optimizers()
    expected = []
    for x, y in loader():
        first.step(lambda x=x, y=y: F.cross_entropy(plain.first(x), y))
        second.step(lambda x=x: F.mse_loss(plain.second(x), plain.first(x).detach()))
        expected.append([first.last_step, second.last_step])
    assert all(same_steps(a, b) for a, b in zip(noted.reports, expected, strict=True))
    assert torch.equal(vector(module), vector(plain))
    assert trainer.global_step == 6
    assert module.evaluations == 3
    assert hooks.calls == {"before_backward": 3, "after_backward": 3, "optimizer_step": 6}
    for i, name in enumerate(["first", "second"]):
        assert trainer.callback_metrics[name] == pytest.approx(
            sum(row[i].loss for row in expected) / 3
        )


def test_manual_optimization_needs_a_closure() -> None:
    class WithoutClosure(TwoPlayers):
        def training_step(self, batch, batch_idx):
            first, _ = self.optimizers()
            self.manual_backward(F.cross_entropy(self.first(batch[0]), batch[1]))
            first.step()

    with pytest.raises(TypeError, match=r"optimizer\.step\(closure\)"):
        manual_fit(WithoutClosure())


def test_several_batches_in_one_step_under_manual_optimization() -> None:
    class Accumulating(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.batches = []

        def training_step(self, batch, batch_idx):
            self.batches.append(batch)
            if len(self.batches) == 3:
                closures = [lambda b=b: F.cross_entropy(self.net(b[0]), b[1]) for b in self.batches]
                NaturalCG(self.parameters(), preconditioner=None).step(closures)

    module, plain = Accumulating(), Classifier()
    manual_fit(module)
    x, y = dataset().tensors
    NaturalCG(plain.parameters(), preconditioner=None).step(
        lambda: F.cross_entropy(plain.net(x), y)
    )
    torch.testing.assert_close(vector(module), vector(plain), rtol=0, atol=1e-4)


# The callback


def test_a_picture_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ngd_lightning.callback.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        NaturalCGCallback(picture="run.png")


def test_the_callback_logs_every_field_and_draws_the_run(tmp_path: Path) -> None:
    callback = NaturalCGCallback(picture=tmp_path / "pictures" / "run.png")
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    trainer, reports = fit(Classifier(), callback, logger=loggers, log_every_n_steps=1)
    assert callback.runs == {"ngd": reports}
    rows = list(csv.DictReader((Path(trainer.loggers[0].log_dir) / "metrics.csv").open()))
    for field in fields(StepReport):
        values = [row[f"ngd/{field.name}"] for row in rows if row.get(f"ngd/{field.name}")]
        expected = [getattr(report, field.name) for report in reports]
        if isinstance(expected[0], str):
            assert values == expected
        else:
            assert [float(value) for value in values] == pytest.approx(
                [float(e) for e in expected], rel=1e-5, nan_ok=True
            )
    shown = {
        name.removeprefix("ngd/")
        for name in trainer.progress_bar_metrics
        if name.startswith("ngd/")
    }
    assert shown == {"kl", "cg_iters", "damping", "reduction_ratio", "accepted"}
    assert (tmp_path / "pictures" / "run.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.loggers[1].log_dir).Reload()
    assert [event.value for event in events.Scalars("ngd/kl")] == pytest.approx(
        [r.kl for r in reports], rel=1e-5
    )
    assert events.Tags()["images"] == ["ngd"]
    assert "ngd/reason/text_summary" in events.Tags()["tensors"]


def test_the_callback_names_several_optimizers() -> None:
    callback = NaturalCGCallback()
    trainer = manual_fit(TwoPlayers(), callback)
    assert [len(reports) for reports in callback.runs.values()] == [3, 3]
    assert {"ngd/0/kl", "ngd/1/kl"} <= trainer.callback_metrics.keys()


def test_the_callback_warns_once_of_steps_rejected_in_a_row() -> None:
    class Hopeless(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1]) * math.nan

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Hopeless(), NaturalCGCallback(warn_after=3), max_epochs=3)
    (message,) = [str(w.message) for w in caught if "did not move" in str(w.message)]
    assert "last 3 steps" in message
    assert "rejected: the loss is nan" in message


def test_the_callback_warns_of_what_was_likely_not_meant() -> None:
    class WithAdam(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    class SmallRate(Classifier):
        options = {"lr": 1e-3}  # noqa: RUF012

    with pytest.warns(UserWarning, match="configure_optimizers returned Adam"):
        fit(WithAdam(), NaturalCGCallback(), max_epochs=1)
    with pytest.warns(UserWarning, match="lr is 0.001"):
        fit(SmallRate(), NaturalCGCallback(), max_epochs=1)


def test_the_callback_checks_its_arguments() -> None:
    with pytest.raises(
        ValueError, match="progress_bar must name fields of StepReport or KFACReport, got kll"
    ):
        NaturalCGCallback(progress_bar=["kl", "kll"])
    with pytest.raises(ValueError, match="warn_after must be at least 1, got 0"):
        NaturalCGCallback(warn_after=0)


# The plugin


class AdamClassifier(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class NoOptimizer(Classifier):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("module_class", [AdamClassifier, NoOptimizer])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
def test_the_plugin_replaces_the_optimizer(module_class: type[Classifier], precision: Any) -> None:
    class WithNaturalCG(Classifier):
        options = {"max_kl": 0.1, "damping": 0.1}  # noqa: RUF012

    module, expected = module_class(), WithNaturalCG()
    trainer, reports = fit(module, plugins=[NaturalCGPlugin(precision, max_kl=0.1, damping=0.1)])
    _, expected_reports = fit(expected, precision=precision)
    assert same_steps(reports, expected_reports)
    assert torch.equal(vector(module), vector(expected))
    assert trainer.lr_scheduler_configs == []


def test_the_plugin_carries_distributions() -> None:
    class WithDistribution(AdamClassifier):
        def training_step(self, batch, batch_idx):
            distribution = Categorical(logits=self.net(batch[0]))
            return {"loss": -distribution.log_prob(batch[1]).mean(), "distribution": distribution}

    _, reports = fit(WithDistribution(), plugins=[NaturalCGPlugin(max_kl=0.02)])
    assert all(0.001 < report.kl <= 0.02 for report in reports)


def test_the_plugin_resumes(tmp_path: Path) -> None:
    whole, half, resumed = AdamClassifier(), AdamClassifier(), AdamClassifier()
    fit(whole, plugins=[NaturalCGPlugin()], max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(half, checkpoint, plugins=[NaturalCGPlugin()], max_epochs=2)
    fit(resumed, plugins=[NaturalCGPlugin()], max_epochs=4, ckpt_path=checkpoint.best_model_path)
    assert torch.equal(vector(resumed), vector(whole))


def test_the_plugin_checks_its_arguments() -> None:
    with pytest.raises(
        ValueError, match="precision must be '32-true', 'bf16-mixed' or '64-true', got '16-mixed'"
    ):
        NaturalCGPlugin("16-mixed")
    with pytest.raises(TypeError, match="NaturalCG has no option nesterov"):
        NaturalCGPlugin(nesterov=True)
    with pytest.raises(ValueError, match="max_kl must be a finite number above 0"):
        NaturalCGPlugin(max_kl=-1.0)


# The example


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_the_example_runs(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if data == "mnist":
        pytest.importorskip("torchvision")
        write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    load_script(EXAMPLES / "lightning_digits.py").main(
        ["--data", data, "--seconds", "0.3", "--figure", "curves.png", "--logs", "logs"]
    )
    assert "NaturalCG: training loss" in capsys.readouterr().out
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(Path("logs").glob("*/NaturalCG/events*"))


# Runs that are not one straight fit


@pytest.mark.parametrize("plugin", [False, True])
def test_hooks_and_refusals_outlive_a_resume(tmp_path: Path, plugin: bool) -> None:
    def options() -> dict[str, Any]:
        return {"plugins": [NaturalCGPlugin()]} if plugin else {}

    module_class = AdamClassifier if plugin else Classifier
    checkpoint = ModelCheckpoint(tmp_path, filename="half")
    fit(module_class(), checkpoint, max_epochs=1, **options())
    hooks = Hooks()
    trainer, _ = fit(
        module_class(), hooks, max_epochs=3, ckpt_path=checkpoint.best_model_path, **options()
    )
    assert trainer.global_step == 9
    assert set(hooks.calls.values()) == {6}

    class Clipping(module_class):
        def on_before_optimizer_step(self, optimizer) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 1e-4)

    with pytest.raises(RuntimeError, match="a hook changed the gradients"):
        fit(Clipping(), max_epochs=3, ckpt_path=checkpoint.best_model_path, **options())


def test_finders_run_hooks_as_often_as_for_other_optimizers(tmp_path: Path) -> None:
    class Finding(Classifier):
        def __init__(self, optimizer_class: Any) -> None:
            super().__init__()
            self.optimizer_class, self.lr, self.calls = optimizer_class, 0.1, Counter()

        def on_after_backward(self) -> None:
            self.calls["after_backward"] += 1

        def on_before_optimizer_step(self, optimizer) -> None:
            self.calls["optimizer_step"] += 1

        def configure_optimizers(self):
            return self.optimizer_class(self.parameters(), lr=self.lr)

    calls = []
    for optimizer_class in (NaturalCG, torch.optim.Adam):
        module = Finding(optimizer_class)
        finder = LearningRateFinder(min_lr=0.1, max_lr=1.0, num_training_steps=4, update_attr=False)
        fit(module, finder, max_epochs=1, default_root_dir=tmp_path)
        calls.append(module.calls)
    assert calls[0] == calls[1]
    assert calls[0]["optimizer_step"] > 3


def test_the_plugin_takes_over_what_the_optimizer_had() -> None:
    class Head(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net[2].parameters())

    module = Head()
    before = module.net[0].weight.detach().clone()
    head = module.net[2].weight.detach().clone()
    fit(module, plugins=[NaturalCGPlugin()])
    assert torch.equal(module.net[0].weight, before)
    assert not torch.equal(module.net[2].weight, head)


def test_the_plugin_says_that_it_leaves_out_schedulers() -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.warns(UserWarning, match="leaves out the learning-rate schedulers of Adam"):
        fit(Scheduled(), plugins=[NaturalCGPlugin()], max_epochs=1)


def test_the_twin_package_is_refused() -> None:
    import pytorch_lightning

    class Twin(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 4)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return self.optimizer_class(self.parameters())

    def fit_twin(optimizer_class: Any) -> None:
        module: Any = Twin()
        module.optimizer_class = optimizer_class
        options: Any = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        pytorch_lightning.Trainer(max_epochs=1, accelerator="cpu", **options).fit(module, loader())

    with pytest.raises(TypeError, match=r"import lightning\.pytorch as pl"):
        fit_twin(NaturalCG)
    fit_twin(torch.optim.Adam)


def test_an_interrupted_run_is_drawn(tmp_path: Path) -> None:
    class Interrupted(Classifier):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            if self.global_step == 3:
                raise RuntimeError("stop here")

    picture = tmp_path / "run.png"
    with pytest.raises(RuntimeError, match="stop here"):
        fit(Interrupted(), NaturalCGCallback("kl", picture=picture))
    assert picture.stat().st_size > 10_000
