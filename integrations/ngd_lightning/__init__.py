"""NaturalCG under Lightning.

``configure_optimizers`` may return ``ngd_optim.NaturalCG`` as it is: Lightning finds this package
by itself.
"""

from typing import Any

from ngd_lightning.callback import LightningBridge, NaturalCGCallback
from ngd_lightning.kfac import KFACBridge, KFACPlugin
from ngd_lightning.plugin import NaturalCGPlugin
from ngd_optim import NaturalCG

__all__ = ["KFACPlugin", "NaturalCGCallback", "NaturalCGPlugin"]


def callbacks() -> list[Any]:
    """What Lightning adds to every Trainer, by the entry point ``lightning.pytorch.callbacks_factory``."""
    return [LightningBridge(), KFACBridge()]


def refusals() -> list[Any]:
    """What the twin package ``pytorch_lightning`` adds to every Trainer: its classes are not those of ``lightning``."""
    from pytorch_lightning import Callback, LightningModule, Trainer

    class Refusal(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if any(isinstance(optimizer, NaturalCG) for optimizer in trainer.optimizers):
                raise TypeError(
                    "NaturalCG works under lightning's Trainer: import lightning.pytorch as pl, "
                    "in place of import pytorch_lightning as pl"
                )

    return [Refusal()]
