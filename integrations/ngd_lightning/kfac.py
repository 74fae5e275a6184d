"""KFAC under Lightning: a plain optimizer, whose losses are watched batch by batch."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ngd_lightning.plugin import NaturalCGPlugin
from ngd_optim import KFAC


class KFACBridge(Callback):
    """Lets the KFAC optimizers of a run see the losses of each batch.

    Where Lightning hands over a closure they see those of its last batch by themselves; here also those
    of batches that it accumulates, and of manual optimization.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to watch; nothing happens unless factors are due."""
        self._open.close()  # of a batch that was skipped
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, KFAC):
                self._open.enter_context(optimizer.watch())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The batch is over."""
        self._open.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """It ended in an error."""
        self._open.close()


class KFACPlugin(NaturalCGPlugin):
    """Trainer plugin that puts :class:`~ngd_optim.KFAC` in the place of the optimizer that the model configures.

    ``Trainer(plugins=[KFACPlugin()])``. All else is as in :class:`NaturalCGPlugin`.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"64-true"``.
        **options: those of :class:`~ngd_optim.KFAC`.

    Raises:
        ValueError: another precision, or an option that is out of range; when training starts,
            several optimizers.
        TypeError: KFAC has no such option.

    Examples:
        >>> from lightning import Trainer
        >>> from ngd_lightning import KFACPlugin
        >>> trainer = Trainer(plugins=[KFACPlugin("bf16-mixed", momentum=0.9)], logger=False)
    """

    optimizer_class = KFAC
