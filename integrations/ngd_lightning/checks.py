"""What NaturalCG cannot do under a Trainer, and what to do instead."""

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn

from ngd_optim import KFAC, NaturalCG

_SMALL_LR = 0.05


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse Trainer options under which NaturalCG's steps would be wrong.

    Raises:
        MisconfigurationException: the option, why it cannot work, and what replaces it.
    """
    for problem in _problems(trainer):
        raise MisconfigurationException(f"NaturalCG: {problem}")


def warn_of_optimizers(trainer: pl.Trainer) -> None:
    """Warn of optimizers that are likely not what was meant."""
    optimizers = [o for o in trainer.optimizers if isinstance(o, NaturalCG | KFAC)]
    if not optimizers:
        names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
        rank_zero_warn(
            f"NaturalCGCallback has nothing to show: configure_optimizers returned {names}; "
            "return NaturalCG or KFAC, or use Trainer(plugins=[NaturalCGPlugin()])"
        )
    for optimizer in optimizers:
        lr = min(float(group["lr"]) for group in optimizer.param_groups)
        if lr < _SMALL_LR and not trainer.lr_scheduler_configs:
            rank_zero_warn(
                f"{type(optimizer).__name__}'s lr is {lr:g}, as for a first-order optimizer; it "
                "multiplies a step that already has the right length, so the usual value is 1.0, "
                f"and {'radius' if isinstance(optimizer, KFAC) else 'max_kl'} limits the step"
            )


def _problems(trainer: pl.Trainer) -> Iterator[str]:
    if trainer.gradient_clip_val:
        yield (
            f"gradient_clip_val={trainer.gradient_clip_val} would change the gradient but not the "
            "curvature; a trust region limits the step instead: NaturalCG(..., max_kl=...)"
        )
    if str(trainer.precision) in ("16-mixed", "16-true"):
        yield (
            f"precision={trainer.precision!r}: float16 has too little range for curvature "
            "products; use 'bf16-mixed', '32-true' or '64-true'"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        yield (
            f"{type(trainer.strategy).__name__} keeps weights in a form that cannot be differentiated "
            "twice; use ModelParallelStrategy with fully_shard in configure_model, strategy='ddp' or a "
            "single device"
        )
