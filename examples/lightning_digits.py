"""Adam and NaturalCG on the same LightningModule: one line differs.

An autoencoder squeezes handwritten digits through 16 numbers. Both optimizers start from the same weights, see all
training images in every step, decay the weights alike and get the same time. Run it, and look at the details in
TensorBoard:

    pip install '.[lightning,examples]' tensorboard
    python examples/lightning_digits.py
    python examples/lightning_digits.py --data mnist --seconds 60
    tensorboard --logdir lightning_logs
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from ngd_lightning import NaturalCGCallback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ngd_optim import NaturalCG

MNIST_IMAGES = 10_000
STEPS_PER_EPOCH = 5
COLORS = {"Adam": "#E69F00", "NaturalCG": "#0072B2"}


class Autoencoder(L.LightningModule):
    """Written for Adam."""

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        widths = [pixels, 256, 128, 16, 128, 256, pixels]
        layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])

    def loss(self, images: Tensor) -> Tensor:
        """Cross-entropy in nats per image."""
        return F.binary_cross_entropy_with_logits(self.net(images), images, reduction="sum") / len(
            images
        )

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        loss = self.loss(images)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, images: Tensor, batch_idx: int) -> None:  # noqa: D102
        self.log("val_loss", self.loss(images), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.Adam(self.parameters(), lr=3e-3, weight_decay=1e-3)


class AutoencoderWithNaturalCG(Autoencoder):
    """The one line."""

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return NaturalCG(self.parameters(), weight_decay=1e-3)


class Curve(L.Callback):
    """The training loss before each step and the validation loss, with the seconds that training has taken."""

    def __init__(self) -> None:
        self.train: list[tuple[int, float, float]] = []
        self.validation: list[tuple[int, float, float]] = []
        self.seconds = 0.0

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self.start = perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:  # noqa: D102
        loss = float(trainer.callback_metrics["train_loss"])
        self.train.append((trainer.global_step - 1, self.seconds, loss))
        self.seconds += perf_counter() - self.start

    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:  # noqa: D102
        self.validation.append(
            (trainer.global_step, self.seconds, float(trainer.callback_metrics["val_loss"]))
        )


def load_images(name: str) -> tuple[Tensor, Tensor]:
    """Training and validation images with values in [0, 1]: ``digits`` (8×8) or ``mnist`` (28×28)."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        images = MNIST(root="data", download=True).data[:MNIST_IMAGES].flatten(1) / 255
    else:
        images = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation = images[order].split([len(images) - len(images) // 5, len(images) // 5])
    return train, validation


def fit(
    module: L.LightningModule,
    name: str,
    train: Tensor,
    validation: Tensor,
    seconds: float,
    logs: Path,
) -> Curve:
    """Train for some time."""
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_time=timedelta(seconds=seconds),
        callbacks=[curve, NaturalCGCallback(), TQDMProgressBar(refresh_rate=1)]
        if isinstance(module, AutoencoderWithNaturalCG)
        else [curve, TQDMProgressBar(refresh_rate=STEPS_PER_EPOCH)],
        logger=TensorBoardLogger(logs, name="digits", version=name),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = DataLoader([train] * STEPS_PER_EPOCH, batch_size=None)  # pyright: ignore[reportArgumentType]
    trainer.fit(module, batches, DataLoader([validation], batch_size=None))  # pyright: ignore[reportArgumentType]
    return curve


def draw(curves: dict[str, Curve], floor: float, path: Path) -> None:
    """The losses above their floor, against steps and against seconds."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column, label in zip(axes, (0, 1), ("steps", "seconds of training"), strict=True):
        for name, curve in curves.items():
            for points, style, what in (
                (curve.train, "-", "training"),
                (curve.validation, ":", "validation"),
            ):
                x, y = [p[column] for p in points], [p[2] - floor for p in points]
                ax.plot(x, y, style, color=COLORS[name], linewidth=2, label=f"{name}, {what}")
        ax.set_xscale("symlog", linthresh=1, linscale=0.4)
        ax.set(yscale="log", xlabel=label, xlim=(0, None))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"nats per image − {floor:.2f}, the least possible")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", choices=("digits", "mnist"), default="digits", help="mnist needs torchvision"
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="for each optimizer (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("lightning_logs"),
        help="TensorBoard's folder (%(default)s)",
    )
    parser.add_argument("--figure", type=Path, default=Path("figures/lightning_digits.png"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    train, validation = load_images(options.data)
    curves = {}
    for name, make_module in {"Adam": Autoencoder, "NaturalCG": AutoencoderWithNaturalCG}.items():
        module = make_module(train.shape[1], options.seed)
        curves[name] = fit(module, name, train, validation, options.seconds, options.logs)
        steps, seconds, loss = curves[name].train[-1]
        print(f"{name}: training loss {loss:.3f} after {steps} steps in {seconds:.0f} s")
    floor = F.binary_cross_entropy(train, train, reduction="sum").item() / len(train)
    draw(curves, floor, options.figure)
    print(f"The curves are in {options.figure}; the logs in {options.logs}")


if __name__ == "__main__":
    main()
