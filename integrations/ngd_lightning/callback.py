"""Callbacks: what makes NaturalCG work under a Trainer, and what shows how it does."""

from collections.abc import Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ngd_lightning.checks import check_trainer, warn_of_optimizers
from ngd_lightning.step import attach
from ngd_lightning.window import Window
from ngd_optim import KFAC, KFACReport, NaturalCG, StepReport, plot_history

PROGRESS_BAR = ("kl", "cg_iters", "damping", "radius", "reduction_ratio", "accepted")


class LightningBridge(Callback):
    """Lets the NaturalCG optimizers of a run understand Lightning's closures; for other optimizers it does nothing."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go first: other callbacks, such as LearningRateFinder, train in their own ``on_fit_start``."""
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the Trainer's options and attach."""
        self._detach()  # from a run that ended in an exception
        self._attached = ExitStack()
        optimizers = _find_optimizers(trainer)
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        is_first = next(c for c in callbacks if isinstance(c, LightningBridge)) is self
        if not (optimizers and is_first):
            return
        check_trainer(trainer)
        window = Window(trainer)
        self._attached.enter_context(window.open())
        for optimizer in optimizers:
            for handle in attach(optimizer, window):
                self._attached.callback(handle.remove)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        self.__dict__.pop("_attached", ExitStack()).close()


class NaturalCGCallback(LightningBridge):
    """Shows what NaturalCG, or KFAC, does in a run.

    Every field of :class:`~ngd_optim.StepReport`, or of :class:`~ngd_optim.KFACReport`, goes to the
    Trainer's loggers, numbers as metrics and words as text (TensorBoard and CSV), under ``ngd/``, or
    ``ngd/0/``, ``ngd/1/``, … where several such optimizers are used.

    Args:
        progress_bar: the fields that the progress bar shows.
        warn_after: warn once when so many steps in a row were rejected.
        picture: where to write a picture of the run at its end, as PNG, by
            :func:`~ngd_optim.plot_history`; it also goes to TensorBoard. None: no picture.

    Raises:
        ValueError: ``progress_bar`` names something that is not a field of StepReport, or
            ``warn_after`` is below 1.
        ImportError: a picture is asked for, and matplotlib is not installed.

    Examples:
        >>> from lightning import Trainer
        >>> from ngd_lightning import NaturalCGCallback
        >>> trainer = Trainer(callbacks=[NaturalCGCallback(["kl", "damping"], picture="run.png")], logger=False)
    """

    def __init__(
        self,
        progress_bar: str | Iterable[str] = PROGRESS_BAR,
        *,
        warn_after: int = 10,
        picture: str | Path | None = None,
    ) -> None:
        self._progress_bar = {progress_bar} if isinstance(progress_bar, str) else set(progress_bar)
        fields = {*StepReport.__dataclass_fields__, *KFACReport.__dataclass_fields__}
        unknown = self._progress_bar - fields
        if unknown:
            raise ValueError(
                f"progress_bar must name fields of StepReport or KFACReport, got {', '.join(sorted(unknown))}"
            )
        if warn_after < 1:
            raise ValueError(f"warn_after must be at least 1, got {warn_after}")
        if picture is not None and find_spec("matplotlib") is None:
            raise ImportError("picture needs matplotlib: pip install matplotlib")
        self._warn_after = warn_after
        self._picture = picture
        self._warned = False
        self._logged: dict[str, StepReport] = {}
        self.runs: dict[str, list[Any]] = {}
        """The steps of each NaturalCG optimizer in the last call of ``fit``, by its name in the logs."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the configuration, and note every step from now on."""
        super().on_fit_start(trainer, pl_module)
        warn_of_optimizers(trainer)
        optimizers = [o for o in trainer.optimizers if isinstance(o, NaturalCG | KFAC)]
        names = ["ngd"] if len(optimizers) == 1 else [f"ngd/{i}" for i in range(len(optimizers))]
        self.runs = {name: [] for name in names}
        self._warned = False
        for name, optimizer in zip(names, optimizers, strict=True):
            handle = optimizer.register_step_post_hook(self._noting(name))
            self._attached.callback(handle.remove)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the last step of each optimizer."""
        for name, reports in self.runs.items():
            if reports and reports[-1] is not self._logged.get(name):
                self._logged[name] = reports[-1]
                self._log(trainer, pl_module, name, reports[-1])
                self._warn_if_rejected(reports)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the run."""
        self._draw(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is of a run that was interrupted."""
        self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer) -> None:
        if self._picture is not None and any(self.runs.values()):
            figure = plot_history(self.runs)
            Path(self._picture).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self._picture, dpi=150)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("ngd", figure, trainer.global_step)

    def _noting(self, name: str) -> Any:
        def note(optimizer: Any, *_: Any) -> None:
            self.runs[name].append(optimizer.last_step)

        return note

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, report: StepReport
    ) -> None:
        words = {}
        for field, value in report.as_dict().items():
            if isinstance(value, str):
                words[f"{name}/{field}"] = value
            else:
                pl_module.log(f"{name}/{field}", float(value), prog_bar=field in self._progress_bar)
        # As often as Lightning writes the metrics of a step.
        if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % _log_every(trainer) == 0:
            self._log_words(trainer, words)

    @rank_zero_only
    def _log_words(self, trainer: pl.Trainer, words: dict[str, str]) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, word in words.items():
                    logger.experiment.add_text(name, word, step)
            elif isinstance(logger, CSVLogger):
                logger.log_metrics(words, step)  # pyright: ignore[reportArgumentType]

    def _warn_if_rejected(self, reports: list[StepReport]) -> None:
        last = reports[-self._warn_after :]
        if (
            not self._warned
            and len(last) == self._warn_after
            and not any(report.accepted for report in last)
        ):
            self._warned = True
            rank_zero_warn(
                f"The optimizer's last {self._warn_after} steps did not move the parameters; the last "
                f"one was {last[-1].reason}. Look for a loss that is not finite or differs each "
                "time that it is computed; else use larger batches, more damping or a smaller "
                "max_kl, unless the training has converged"
            )


def _find_optimizers(trainer: pl.Trainer) -> list[NaturalCG]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, NaturalCG)]


def _log_every(trainer: pl.Trainer) -> int:
    return trainer.log_every_n_steps or 1  # pyright: ignore[reportAttributeAccessIssue]
