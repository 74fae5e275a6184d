"""What one step of an optimizer did."""

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from ngd_optim.convergence import find_convergence
from ngd_optim.linearization import Point
from ngd_optim.reading import read
from ngd_optim.settings import Settings
from ngd_optim.shown import html_table
from ngd_optim.step import Outcome


class Report:
    """What the reports of both optimizers share."""

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """All fields by name, ready for a logger."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def _repr_html_(self) -> str:
        """Notebooks show this."""
        return html_table(str(self), self.as_dict())


@dataclass(frozen=True)
class StepReport(Report):
    """One step of :class:`~ngd_optim.NaturalCG`: what happened and why. Everything is a plain Python value.

    Attributes:
        loss: loss before the step (without the weight-decay term).
        new_loss: loss where the step ended; equal to ``loss`` when it was rejected.
        grad_norm: norm of the gradient, weight decay included.
        step_norm: norm of the change of the parameters; 0 when rejected.
        kl: KL divergence from the old to the new prediction, measured, in nats per sample. Where
            the metric is a loss function (closure form (a)), its second-order model ``½ dᵀF d``.
        max_kl: the trust region ``δ`` that the step had to keep to, in the unit of ``kl``;
            infinite: there was none.
        predicted_decrease: decrease of the objective (the loss, weight decay included) that the
            model promised for the step last tried.
        reduction_ratio: decrease found ÷ decrease promised for the step last tried; NaN if none was
            tried, or if the promise was below the loss's rounding.
        new_slope: the slope of the objective along the last step, as this step's data see it ÷ its
            steepness at that step's start; NaN where there is none or the data are the same. Where
            it is above a third, that step fitted noise, and the damping grows; not so for
            :func:`~ngd_optim.least_squares`, whose residuals may all vanish.
        damping: ``λ`` used in this step; the largest, if the parameter groups differ.
        cg_iters: iterations of conjugate gradients.
        cg_residual: relative residual at which they stopped.
        cg_stop: why they stopped: ``"tolerance"``, ``"progress"``, ``"max_iters"``,
            ``"negative_curvature"``, ``"not_finite"``. A direct solver says ``"exact"``, or
            ``"indefinite"`` where the damped matrix was not positive definite.
        step_scale: factor that the trust region and the line search applied to the solution; 0 when
            rejected.
        backtracks: how many trial points were turned down; with a direct solver, how often the
            system was solved again.
        accepted: whether the step was taken.
        converged: whether it met one of the tolerances ``xtol``, ``ftol`` and ``gtol``: there is
            nothing left to gain on these data. ``reason`` says which.
        reason: one sentence on the outcome.
        curvature: what ``F`` is: ``"fisher"``, ``"ggn"`` where a loss function was recognised, or
            ``"hessian"``.
        solver: what solved the system: ``"cg"``, ``"dense"`` or ``"sample"``.
        backend: what formed the products: ``"torch.func"`` (forward mode) or ``"double-backward"``
            (the derivative of a gradient).
        preconditioner: what the iterations were preconditioned by: ``"kfac"``, ``"diagonal"``,
            ``"nystrom"``, ``"callable"`` or ``"none"``, also where rounding made it indefinite.
        n_forward: forward passes: the closure's run, and a replay for each trial point.
        n_product: how many curvature products were formed. Neither counts the check at the first
            step with a closure, nor what a direct solver needs.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = NaturalCG([x], damping=0.0)
        >>> loss = optimizer.step(lambda: (x**2).sum())
        >>> report = optimizer.last_step
        >>> report.loss, report.new_loss, report.accepted, report.reason
        (2.0, 0.0, True, 'accepted')
    """

    loss: float
    new_loss: float
    grad_norm: float
    step_norm: float
    kl: float
    max_kl: float
    predicted_decrease: float
    reduction_ratio: float
    new_slope: float
    damping: float
    cg_iters: int
    cg_residual: float
    cg_stop: str
    step_scale: float
    backtracks: int
    accepted: bool
    reason: str
    curvature: str
    solver: str
    backend: str
    preconditioner: str
    n_forward: int
    n_product: int
    converged: bool = False

    def __str__(self) -> str:
        """One line, for a log."""
        return (
            f"loss {self.loss:.6g} → {self.new_loss:.6g}, KL {self.kl:.3g}, λ {self.damping:.3g}, "
            f"{self.n_product} products: {self.reason}"
        )


@dataclass(frozen=True)
class KFACReport(Report):
    """One step of :class:`~ngd_optim.KFAC`: what happened and why. Everything is a plain Python value.

    Attributes:
        loss: loss before the step; NaN for a step without a closure.
        grad_norm: norm of the gradient.
        step_norm: norm of the step; 0 when refused.
        kl: ``½ dᵀ(F + λI)d`` by the model of the Kronecker factors, at a rate of 1; 0 when refused.
        radius: the radius ``δ``, as adapted for this step.
        new_slope: the slope of the loss along the last step, as this step's data see it ÷ its
            steepness at that step's start; NaN at the first step.
        damping: relative to the mean eigenvalue of each layer.
        renewed: whether the factors were renewed.
        accepted: whether the step was taken.
        reason: one sentence on the outcome.

    Examples:
        >>> import torch
        >>> from ngd_optim import KFAC
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = KFAC(model.parameters())
        >>> loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(torch.eye(2)), torch.ones(2, 1)))
        >>> optimizer.last_step.accepted, optimizer.last_step.renewed
        (True, True)
    """

    loss: float
    grad_norm: float
    step_norm: float
    kl: float
    radius: float
    new_slope: float
    damping: float
    renewed: bool
    accepted: bool
    reason: str

    def __str__(self) -> str:
        """One line, for a log."""
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.6g}, "
        return f"{loss}‖d‖ {self.step_norm:.3g}, δ {self.radius:.3g}: {self.reason}"


def build_report(
    point: Point,
    outcome: Outcome,
    settings: Settings,
    theta: Tensor,
    *,
    max_kl: float | None,
    new_slope: float,
    solver: str,
    preconditioner: str,
    n_forward: int,
    n_product: int,
    initial_damping: float,
) -> StepReport:
    """The report of a step, from what its parts found."""
    model, solution, step, trial = outcome.model, outcome.solution, outcome.step, outcome.trial
    moved = trial.fraction if trial.accepted else 0.0
    loss = point.value
    gradient = model.gradient if point.bend is None else model.gradient - point.bend
    # The host waits once a step, for the report alone: the step is over.
    grad_norm, direction_norm, largest_slope, norm = read(
        gradient.norm(), step.direction.norm(), gradient.abs().max(), theta.norm()
    )
    converged = find_convergence(
        point,
        outcome,
        settings,
        largest_slope=largest_slope,
        step_norm=(trial.fraction or 1.0) * direction_norm,
        norm=norm,
        damping_was_raised=max(outcome.damping) > initial_damping,
    )
    predicted = step.predicted_decrease(trial.fraction)
    # A ratio of two roundings says nothing.
    telling = abs(predicted) > point.rounding
    return StepReport(
        loss=loss,
        new_loss=trial.objective - step.decay_change(trial.fraction) if trial.accepted else loss,
        grad_norm=grad_norm,
        step_norm=moved * direction_norm if moved else 0.0,
        kl=(step.kl(moved) if trial.kl is None else trial.kl) if moved else 0.0,
        max_kl=math.inf if max_kl is None else float(max_kl),
        predicted_decrease=predicted,
        reduction_ratio=(loss - trial.objective) / predicted if telling else math.nan,
        new_slope=new_slope,
        damping=max(outcome.damping),
        cg_iters=solution.iterations,
        cg_residual=solution.residual,
        cg_stop=solution.stop,
        step_scale=moved * step.scale if moved else 0.0,
        backtracks=trial.backtracks,
        accepted=trial.accepted,
        converged=bool(converged),
        reason=f"{trial.reason}; converged: {converged}" if converged else trial.reason,
        curvature=point.kind,
        solver=solver,
        backend=point.product.backend,
        preconditioner=preconditioner,
        n_forward=n_forward,
        n_product=n_product,
    )
