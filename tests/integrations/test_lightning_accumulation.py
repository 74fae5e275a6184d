"""``accumulate_grad_batches``: a step is that of all its batches, and everything else is as for another optimizer."""

import gc
import random
import weakref
from collections import Counter
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_modules import Classifier, fit, loader, same_steps, vector
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from ngd_lightning import NaturalCGCallback, NaturalCGPlugin
from torch import Tensor, nn
from torch.distributions import Categorical
from torchmetrics.classification import MulticlassAccuracy

from ngd_optim import NaturalCG

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*treespec"
)
BATCHES = [(x, y) for x, y in loader()]  # three


class Watched(Classifier):
    """Notes what a user can see; with buffers, random numbers, metrics and hooks."""

    def __init__(self, optimizer_class: Any = NaturalCG, lr: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 4)
        )
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.optimizer_class, self.lr = optimizer_class, lr
        self.seen: list[tuple[str, Any]] = []
        self.gradients: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        assert torch.is_grad_enabled()
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self.net(batch[0]).detach(), batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer_class(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_before_zero_grad(self, optimizer):
        self.seen.append(("before_zero_grad", self.trainer.global_step))

    def on_before_backward(self, loss):
        self.seen.append(("before_backward", self.trainer.global_step))

    def on_after_backward(self):
        self.seen.append(("after_backward", all(p.grad is not None for p in self.parameters())))

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(("before_optimizer_step", self.trainer.global_step))
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters()]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.random = torch.get_rng_state()
        self.seen.append(("batch_end", (self.trainer.global_step, self.trainer.is_last_batch)))


def progress(trainer: L.Trainer) -> dict[str, Any]:
    loop = trainer.fit_loop.epoch_loop
    return {
        "global_step": trainer.global_step,
        "optimizer": loop.automatic_optimization.optim_progress.state_dict(),
        "batches": loop.batch_progress.state_dict(),
        "schedulers": loop.scheduler_progress.state_dict(),
        "rates": [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs],
        "that stepped": loop._batches_that_stepped,
    }


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_everything_beside_the_step_is_as_for_sgd(batches: int) -> None:
    """At a rate of zero, so that both see the same parameters."""
    runs = []
    for optimizer_class in (NaturalCG, torch.optim.SGD):
        module = Watched(optimizer_class)
        trainer, _ = fit(module, accumulate_grad_batches=batches, max_epochs=2)
        runs.append((module, trainer))
    (module, trainer), (expected, other) = runs
    assert module.seen == expected.seen
    assert progress(trainer) == progress(other)
    for name, value in other.callback_metrics.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value)
    for buffer, value in zip(module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, value)
    # The last window of an epoch has 3 % batches of them, and Lightning divides by all.
    for i, (found, gradient) in enumerate(zip(module.gradients, expected.gradients, strict=True)):
        steps = -(-3 // batches)
        is_last = i % steps == steps - 1
        share = (3 % batches or batches) / batches if is_last else 1.0
        torch.testing.assert_close(found * share, gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(module.random, expected.random)


def windows(batches: int) -> list[list[int]]:
    return [list(range(3))[i : i + batches] for i in range(0, 3, batches)]


def expected_steps(plain: Classifier, batches: int, closure_of: Any, epochs: int = 2) -> list[Any]:
    optimizer, reports = NaturalCG(plain.parameters()), []
    for _ in range(epochs):
        for window in windows(batches):
            # Its last batch first: a mean, but for rounding.
            closures = [closure_of(*BATCHES[i]) for i in (window[-1], *window[:-1])]
            optimizer.step(closures if len(closures) > 1 else closures[0])
            reports.append(optimizer.last_step)
    return reports


def steps_of(reports: list[Any]) -> list[Any]:
    """Lightning's callback sees the last step after every batch."""
    return [
        r for r, before in zip(reports, [None, *reports], strict=False) if r is not before and r
    ]


@pytest.mark.parametrize("batches", [2, 3, 4])
@pytest.mark.parametrize("plugin", [False, True])
def test_steps_are_those_of_a_list_of_closures(batches: int, plugin: bool) -> None:
    class WithAdam(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    options = {"plugins": [NaturalCGPlugin()]} if plugin else {}
    module, plain = (WithAdam if plugin else Classifier)(), Classifier()
    _, reports = fit(module, accumulate_grad_batches=batches, **options)
    expected = expected_steps(plain, batches, lambda x, y: lambda: F.cross_entropy(plain.net(x), y))
    if batches == 3:  # Lightning's division by three, and back, rounds
        torch.testing.assert_close(vector(module), vector(plain), rtol=1e-3, atol=1e-3)
    else:
        assert same_steps(steps_of(reports), expected)
        assert torch.equal(vector(module), vector(plain))


def test_one_step_is_that_of_the_whole_batch() -> None:
    class Solved(Classifier):
        options = {"cg_tol": 1e-12, "cg_progress_tol": 0.0, "preconditioner": None}  # noqa: RUF012

    parts, whole = Solved(), Solved()
    fit(parts, accumulate_grad_batches=3, precision="64-true", max_epochs=4)
    fit(whole, loader_=loader(48), precision="64-true", max_epochs=4)
    torch.testing.assert_close(vector(parts), vector(whole), rtol=0, atol=1e-7)


def test_distributions_of_several_batches() -> None:
    class WithDistribution(Classifier):
        def training_step(self, batch, batch_idx):
            distribution = Categorical(logits=self.net(batch[0]))
            return {"loss": -distribution.log_prob(batch[1]).mean(), "distribution": distribution}

    def likelihood(x: Tensor, y: Tensor) -> Any:
        def closure() -> Any:
            distribution = Categorical(logits=plain.net(x))
            return -distribution.log_prob(y).mean(), distribution

        return closure

    module, plain = WithDistribution(), Classifier()
    _, reports = fit(module, accumulate_grad_batches=2)
    assert same_steps(steps_of(reports), expected_steps(plain, 2, likelihood))
    assert all(0 < report.kl <= 0.01 for report in steps_of(reports))


def test_dropout_is_that_of_each_batch() -> None:
    class WithDropout(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.Dropout(0.5))

        def on_train_batch_start(self, batch, batch_idx) -> None:
            torch.manual_seed(batch_idx)

    module, plain = WithDropout(), WithDropout()

    def loss(x: Tensor, y: Tensor, seed: int) -> Any:
        def closure() -> Tensor:
            torch.manual_seed(seed)
            return F.cross_entropy(plain.net(x), y)

        return closure

    _, reports = fit(module, accumulate_grad_batches=4, max_epochs=1)
    optimizer = NaturalCG(plain.parameters())
    optimizer.step([loss(*BATCHES[i], seed=i) for i in (2, 0, 1)])
    assert same_steps(steps_of(reports), [optimizer.last_step])


def test_one_graph_is_in_memory_at_a_time() -> None:
    class Heavy(Classifier):
        alive: Any = weakref.WeakSet()  # noqa: RUF012
        most = 0

        def training_step(self, batch, batch_idx):
            z = self.net(batch[0])
            self.alive.add(z)
            gc.collect()
            Heavy.most = max(Heavy.most, len(self.alive))
            return F.cross_entropy(z, batch[1])

    fit(Heavy(), accumulate_grad_batches=3, max_epochs=2)
    assert Heavy.most <= 2  # the one before may still be a local variable


def test_batches_without_a_loss_are_left_out() -> None:
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    class SkippingTheLast(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    module, plain = Skipping(), Classifier()
    _, reports = fit(module, accumulate_grad_batches=4, max_epochs=1)
    optimizer = NaturalCG(plain.parameters())
    optimizer.step(
        [lambda i=i: F.cross_entropy(plain.net(BATCHES[i][0]), BATCHES[i][1]) for i in (2, 0)]
    )
    assert same_steps(steps_of(reports), [optimizer.last_step])
    with pytest.raises(ValueError, match="training_step returned None"):
        fit(SkippingTheLast(), accumulate_grad_batches=3)


def test_an_exception_in_a_step_leaves_everything_as_it_was() -> None:
    runs: list[int] = []

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            runs.append(batch_idx)
            if len(runs) == 5:  # an earlier batch, in the step
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx) -> None:
            if batch_idx == 2:
                self.before = [p.grad.clone() for p in self.parameters()]

    module = Failing()
    start = vector(module).clone()
    with pytest.raises(KeyError, match="broken"):
        fit(module, accumulate_grad_batches=3)
    assert torch.equal(vector(module), start)
    for p, gradient in zip(module.parameters(), module.before, strict=True):
        assert torch.equal(p.grad, gradient)
    _, reports = fit(module, accumulate_grad_batches=3)  # the same module in another fit
    assert [r.accepted for r in steps_of(reports)] == [True, True]


def test_the_number_of_batches_may_change_between_epochs() -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})
    trainer, reports = fit(Classifier(), scheduler, max_epochs=3)
    assert trainer.global_step == len(steps_of(reports)) == 3 + 1 + 2


def test_the_rest_of_an_epoch_is_skipped() -> None:
    class Stopping(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 and self.current_epoch == 0 else None

    module, plain = Stopping(), Classifier()
    _, reports = fit(module, accumulate_grad_batches=2, max_epochs=2)
    assert same_steps(
        steps_of(reports),
        expected_steps(plain, 2, lambda x, y: lambda: F.cross_entropy(plain.net(x), y), epochs=1),
    )


def test_resuming_is_bit_identical(tmp_path: Any) -> None:
    whole, half, resumed = Classifier(), Classifier(), Classifier()
    fit(whole, accumulate_grad_batches=2, max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(half, checkpoint, accumulate_grad_batches=2, max_epochs=2)
    fit(resumed, accumulate_grad_batches=2, max_epochs=4, ckpt_path=checkpoint.best_model_path)
    assert torch.equal(vector(resumed), vector(whole))


def test_the_callback_notes_each_step_once() -> None:
    callback = NaturalCGCallback()
    trainer, reports = fit(Classifier(), callback, accumulate_grad_batches=2, log_every_n_steps=1)
    assert callback.runs == {"ngd": steps_of(reports)}
    assert len(callback.runs["ngd"]) == trainer.global_step == 4
    assert float(trainer.callback_metrics["ngd/kl"]) == pytest.approx(reports[-1].kl, nan_ok=True)


def test_nothing_is_left_when_the_run_is_over() -> None:
    module = Classifier()
    trainer, _ = fit(module, accumulate_grad_batches=2)
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    assert not {"_make_step_fn", "_optimizer_step"} & vars(loop).keys()
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# What training_step does beside its loss


class Halving(Classifier):
    """The plain form of the others."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(0.5 * batch[0]), batch[1])


class HalvingInPlace(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].mul_(0.5)), batch[1])


class TakingApart(Classifier):
    def training_step(self, batch, batch_idx):
        y = batch.pop()
        return F.cross_entropy(self.net(0.5 * batch.pop()), y)


class FromAnIterator(Classifier):
    def training_step(self, dataloader_iter):
        (x, y), _, _ = next(dataloader_iter)
        return F.cross_entropy(self.net(0.5 * x), y)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("module_class", [HalvingInPlace, TakingApart, FromAnIterator])
@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_batch_is_what_it_was_at_each_run(module_class: Any, batches: int) -> None:
    module, plain = module_class(), Halving()
    _, reports = fit(module, accumulate_grad_batches=batches)
    _, expected = fit(plain, accumulate_grad_batches=batches)
    assert same_steps(steps_of(reports), steps_of(expected))
    assert torch.equal(vector(module), vector(plain))


class Remembering(Classifier):
    """Adds the mean of the last batch's output, and counts; buffers are replaced, not written to."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Any = 0.0
        self.count = 0
        self.register_buffer("average", None)

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0]) + self.hidden
        self.hidden = 3 * z.detach().mean(0)
        mean = batch[0].mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        self.count += 1
        loss = F.cross_entropy(z, batch[1])
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def test_attributes_are_those_of_each_batch() -> None:
    module = Remembering()
    with pytest.warns() as caught:
        _, reports = fit(module, accumulate_grad_batches=3, max_epochs=1)
    assert not [w for w in caught if "ran again" in str(w.message)]
    (report,) = steps_of(reports)
    assert report.loss == pytest.approx(sum(module.losses) / 3, rel=1e-5)
    assert report.accepted
    assert module.count == len(module.losses) == 3
    x = [batch[0].mean(0) for batch in BATCHES]
    torch.testing.assert_close(module.average, 0.81 * x[0] + 0.09 * x[1] + 0.1 * x[2])


def test_random_numbers_of_python_and_numpy_are_those_of_each_batch() -> None:
    class Mixing(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            share = random.random() * np.random.beta(0.4, 0.4)  # noqa: NPY002
            loss = F.cross_entropy(self.net(share * x + (1 - share) * x.flip(0)), y)
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return loss

    numbers = []
    for optimizer_class in (NaturalCG, torch.optim.SGD):
        Mixing.configure_optimizers = lambda self, o=optimizer_class: o(self.parameters(), lr=0.0)
        L.seed_everything(0, verbose=False)
        module = Mixing()
        _, reports = fit(module, accumulate_grad_batches=3, max_epochs=1)
        numbers.append((module.losses, random.random(), np.random.random()))  # noqa: NPY002
        if optimizer_class is NaturalCG:
            assert reports[-1].loss == pytest.approx(sum(module.losses) / 3, rel=1e-5)
    assert numbers[0] == numbers[1]


def test_a_loss_that_cannot_be_found_again_is_told() -> None:
    runs: list[int] = []

    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            runs.append(batch_idx)
            return F.cross_entropy(self.net(batch[0]), batch[1]) * len(runs)

    with pytest.warns(UserWarning, match="training_step gave a loss of .* when it ran again"):
        fit(Counting(), accumulate_grad_batches=3, max_epochs=1)


# What Lightning does with accumulation by itself


@pytest.mark.parametrize("batches", [1, 2])
def test_averaged_weights_get_their_batch_statistics(batches: int) -> None:
    runs = []
    for optimizer_class in (NaturalCG, torch.optim.SGD):
        module = Watched(optimizer_class)
        average = StochasticWeightAveraging(1e-9, swa_epoch_start=2)
        trainer, _ = fit(module, average, max_epochs=4, accumulate_grad_batches=batches)
        assert trainer.accumulate_grad_batches == batches
        runs.append((module, trainer))
    (module, trainer), (expected, other) = runs
    assert progress(trainer)["global_step"] == progress(other)["global_step"]
    for buffer, value in zip(module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, value, rtol=1e-3, atol=1e-4)


def test_the_last_pass_of_averaging_moves_nothing() -> None:
    class Averaged(Watched):
        def on_train_epoch_start(self) -> None:
            self.start = vector(self).clone()

    module = Averaged(lr=1.0)
    fit(module, StochasticWeightAveraging(1.0, swa_epoch_start=1), max_epochs=3)
    assert torch.equal(module.start, vector(module))


def test_training_step_has_gradients_on_at_every_run() -> None:
    modes: Counter[bool] = Counter()

    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            modes[torch.is_grad_enabled()] += 1
            z = self.net(batch[0])
            if z.detach().max() > 1e6:  # a question to the parameters: trial points run it again
                return z.sum()
            return F.cross_entropy(z, batch[1]) + 0 * z.sum().item()

    fit(Noting())
    fit(Noting(), accumulate_grad_batches=2)
    assert modes[True] > 6
    assert not modes[False]
