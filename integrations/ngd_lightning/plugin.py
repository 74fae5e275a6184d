"""Train any LightningModule with NaturalCG, whatever optimizer it configures."""

import inspect
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ngd_lightning.callback import LightningBridge
from ngd_optim import NaturalCG


class NaturalCGPlugin(Precision):
    """Trainer plugin that puts NaturalCG in the place of the optimizer that the model configures.

    ``Trainer(plugins=[NaturalCGPlugin(max_kl=0.1)])``. It takes over that optimizer's parameters,
    in their groups; all trainable ones if ``configure_optimizers`` returns None (Lightning wants
    the method itself to be there). Learning-rate schedulers are left out with that optimizer, and a
    warning says so. The plugin stands for the Trainer's precision, so that is set here.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"64-true"``.
        **options: those of :class:`~ngd_optim.NaturalCG`.

    Raises:
        ValueError: another precision, or an option that is out of range; when training starts,
            several optimizers.
        TypeError: NaturalCG has no such option.

    Examples:
        >>> from lightning import Trainer
        >>> from ngd_lightning import NaturalCGPlugin
        >>> trainer = Trainer(plugins=[NaturalCGPlugin("bf16-mixed", max_kl=0.1)], logger=False)
    """

    optimizer_class: Any = NaturalCG

    def __init__(self, precision: str = "32-true", **options: Any) -> None:
        if precision not in ("32-true", "bf16-mixed", "64-true"):
            raise ValueError(
                f"precision must be '32-true', 'bf16-mixed' or '64-true', got {precision!r}"
            )
        self._name = self.optimizer_class.__name__
        known = set(inspect.signature(self.optimizer_class).parameters) - {"params"}
        unknown = options.keys() - known
        if unknown:
            raise TypeError(
                f"{self._name} has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(known))}"
            )
        # Out of range: better said here than when training starts.
        self.optimizer_class([nn.Parameter()], **options)
        self.precision = precision  # pyright: ignore[reportAttributeAccessIssue]
        self._options = options
        self._inner: Precision = DoublePrecision() if precision == "64-true" else Precision()

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Called by the Trainer when the model and its optimizers are set up."""
        if self.precision == "bf16-mixed":
            self._inner = MixedPrecision("bf16-mixed", next(model.parameters()).device.type)
        if not optimizers:  # the Trainer only validates, tests or predicts
            return model, optimizers, lr_schedulers
        if len(optimizers) > 1:
            raise ValueError(
                f"{self._name}Plugin replaces one optimizer, and the model configures "
                f"{len(optimizers)}; return {self._name} from configure_optimizers for those that it "
                "should replace"
            )
        (replaced,) = optimizers
        rank_zero_info(f"{self._name} takes the place of {type(replaced).__name__}")
        if lr_schedulers:
            rank_zero_warn(
                f"{self._name}Plugin leaves out the learning-rate schedulers of "
                f"{type(replaced).__name__}"
            )
        if isinstance(replaced, _MockOptimizer):  # configure_optimizers returned None
            params: Any = [p for p in model.parameters() if p.requires_grad]
        else:
            params = [{"params": group["params"]} for group in replaced.param_groups]
        optimizer = self.optimizer_class(params, **self._options)
        module: Any = model.module if isinstance(model, DistributedDataParallel) else model
        callbacks: list[Any] = module.trainer.callbacks
        if not any(isinstance(callback, LightningBridge) for callback in callbacks):
            callbacks.insert(0, LightningBridge())
        return model, [optimizer], []

    def convert_module(self, module: nn.Module) -> nn.Module:  # noqa: D102
        return self._inner.convert_module(module)

    def convert_input(self, data: Any) -> Any:  # noqa: D102
        return self._inner.convert_input(data)

    def convert_output(self, data: Any) -> Any:  # noqa: D102
        return self._inner.convert_output(data)

    def tensor_init_context(self) -> AbstractContextManager:  # noqa: D102
        return self._inner.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager:  # noqa: D102
        return self._inner.module_init_context()

    def forward_context(self) -> AbstractContextManager:  # noqa: D102
        return self._inner.forward_context()
