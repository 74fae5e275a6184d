"""NaturalCG under Lightning.

``configure_optimizers`` may return ``ngd_optim.NaturalCG`` as it is: Lightning finds this package by itself.
"""

from ngd_lightning.callback import LightningBridge, NaturalCGCallback
from ngd_lightning.plugin import NaturalCGPlugin

__all__ = ["NaturalCGCallback", "NaturalCGPlugin"]


def callbacks() -> list[LightningBridge]:
    """What Lightning adds to every Trainer, by the entry point ``lightning.pytorch.callbacks_factory``."""
    return [LightningBridge()]
