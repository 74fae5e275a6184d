"""From a point down: solve the system, cut the step to its region, and search along it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ngd_optim.distributed import ParametersInParts
from ngd_optim.linalg import LinearSolution
from ngd_optim.linearization import Point
from ngd_optim.names import TrustRegion
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read
from ngd_optim.solvers import QuadraticModel, RootSolver, Solver
from ngd_optim.step.damping import TRUSTED, Damping
from ngd_optim.step.geodesic import apply_geodesic_correction
from ngd_optim.step.line_search import Trial, line_search
from ngd_optim.step.trust_region import Step, scale_step

_FIRST = 10.0
"""Longest first step ÷ the parameters, of the factors from 0.1 to 100 that Moré recommends (1978)."""

_MORE = 1.01
"""Least growth of what the model promises for which still less damping is tried."""


@dataclass(frozen=True)
class Outcome:
    """Where a descent ended: the last damping, one per group, the model with it, its solution, the step, its trial."""

    damping: Sequence[float]
    model: QuadraticModel
    solution: LinearSolution
    step: Step
    trial: Trial

    @property
    def promised(self) -> float:
        """What the model says that the loss falls by."""
        return self.step.predicted_decrease(self.trial.fraction)

    def curvature(self, step_norm: float) -> float:
        """``dᵀF d / ‖d‖²`` of the step that was taken, of this norm; 0 if none was."""
        if not step_norm:
            return 0.0
        # Its square alone may be out of range, near a minimum at zero.
        scale = self.trial.fraction / step_norm
        curvature = self.step.metric * scale * scale
        return curvature if math.isfinite(curvature) else 0.0

    def is_held_by_damping(self, rounding: float) -> bool:
        """Whether the damping alone makes a step so short that the loss cannot tell it from rounding.

        Without damping the model falls by more than ``rounding`` along the same solution.
        """
        promised, undamped = self.decreases()
        return abs(promised) <= rounding < undamped

    def decreases(self) -> tuple[float, float]:
        """What the loss falls by along the solution, and what it would fall by without damping, as the model says."""
        x, gradient = self.solution.solution, self.model.gradient
        # The host waits, where the loss tells nothing of a step.
        slope = torch.dot(gradient, x).item()
        if not slope:  # it has underflowed, or there is nothing to go down
            return 0.0, math.inf if gradient.any() else 0.0
        damped = torch.dot(x, self.model.damping * x).item()
        curved = self.solution.x_dot_ax - damped
        promised = -(slope + 0.5 * curved)
        if not damped > 0:
            return promised, promised
        # A difference of numbers is known to their rounding; what may be zero is no bound.
        is_known = curved > 16 * torch.finfo(x.dtype).eps * damped
        # The lowest point of s gᵀx + ½ s² xᵀ(F + W)x is at −(gᵀx)² / (2 xᵀ(F + W)x).
        return promised, slope**2 / (2 * curved) if is_known else math.inf


@dataclass(frozen=True)
class Descent:
    """How to go down from a point.

    Attributes:
        point: the closure there.
        parameters: they are moved.
        theta: their values at the point, flat.
        solver: of the linear system.
        damping: of the groups; it grows where a system is solved again.
        lr: factor for the step, one per group.
        max_kl: the trust region's size; None: there is none.
        trust_region: the setting of that name.
        max_backtracks: likewise.
        backtrack_ratio: likewise.
        geodesic: likewise.
        is_first: whether no step before tells how far one may go.
        on_new_data: whether the point has other data than the last step, whose noise a longer step fits.
    """

    point: Point
    parameters: FlatParameters | ParametersInParts
    theta: Tensor
    solver: Solver
    damping: Damping
    lr: Sequence[float]
    max_kl: float | None
    trust_region: TrustRegion
    max_backtracks: int
    backtrack_ratio: float
    geodesic: bool
    is_first: bool
    on_new_data: bool

    def __call__(self, undamped: QuadraticModel, check: Callable[[], None]) -> Outcome:
        """Move the parameters to a lower point, or leave them where they are.

        Args:
            undamped: the quadratic model at the point, before its damping is known.
            check: raises what other processes met while the system was solved.
        """
        outcome = self._descend(undamped, check)
        goes_further = (
            self._solves_again
            and not self.on_new_data
            and not outcome.trial.backtracks  # else less damping was too little
            and isinstance(self.solver, RootSolver)
            and self.point.is_least_squares
            and not self.point.writes_parameters
        )
        return self._go_further(outcome, undamped) if goes_further else outcome

    @property
    def _solves_again(self) -> bool:
        """Whether another damping takes the place of a line search: a direct solver has the Jacobian."""
        # Near the minimum of a loss whose kinks are rounded no damping helps: the width has to fall.
        is_rounded = self.point.bend is not None
        return self.damping.can_retry and self.max_backtracks > 0 and not is_rounded

    def _descend(self, undamped: QuadraticModel, check: Callable[[], None]) -> Outcome:
        """The first damping, or the first one after it, with which the loss falls."""
        solves_again = self._solves_again
        problem = self._find_problem_of_loss()  # which the graph tells; a solve may let that go
        attempt = 0
        while True:
            attempt += 1
            damping = self.damping.values
            model = undamped.with_damping(self.parameters.spread(damping), is_first=attempt == 1)
            solution = self.solver.solve(model)
            step = self._scale(solution, model)
            if not (solves_again and self.damping.can_grow and self._is_worth_a_retry(step)):
                step = replace(step, problem="")
            check()
            trial = (
                Trial.refuse(problem, forgets=True)
                if problem
                else self._search(
                    step, solution, max_backtracks=0 if solves_again else self.max_backtracks
                )
            )
            # Another damping costs no product; a shorter step is worse.
            is_over = (
                trial.accepted
                or trial.forgets
                or not (solves_again and self._is_worth_a_retry(step))
            )
            if is_over or not self.damping.retry(attempt):
                if trial.accepted and self.point.writes_parameters:
                    # The closure has moved the parameters on from θ + d.
                    step, trial = self._as_taken(step, model), replace(trial, fraction=1.0)
                trial = replace(trial, backtracks=trial.backtracks + attempt - 1)
                return Outcome(damping, model, solution, step, trial)

    def _go_further(self, outcome: Outcome, undamped: QuadraticModel) -> Outcome:
        """With less and less damping, as long as the model can be trusted and promises more."""
        attempt, promised = 0, 0.0
        while self._is_trusted(outcome) and outcome.promised > _MORE * promised:
            attempt, promised = attempt + 1, outcome.promised
            damping = self.damping.lower(attempt)
            model = undamped.with_damping(self.parameters.spread(damping), is_first=False)
            solution = self.solver.solve(model)
            step = self._scale(solution, model)
            trial = self._search(step, solution, max_backtracks=0)
            longer = Outcome(damping, model, solution, step, trial)
            if not self._is_trusted(longer):
                self.parameters.move(self.theta, outcome.step.direction, outcome.trial.fraction)
                self.damping.refuse()
                break
            self.damping.accept(damping)
            outcome = replace(longer, trial=replace(trial, backtracks=outcome.trial.backtracks))
        return outcome

    def _is_trusted(self, outcome: Outcome) -> bool:
        """Whether it was taken, and the loss fell by a part of what was promised, which is more than rounding."""
        return (
            outcome.trial.accepted
            and outcome.promised > self.point.rounding
            and self.point.value - outcome.trial.objective >= TRUSTED * outcome.promised
        )

    def _as_taken(self, step: Step, model: QuadraticModel) -> Step:
        """The step to where the closure has put the parameters, such as back into their bounds.

        What the model promises for that is what the decrease is compared with.
        """
        taken = self.parameters.read()
        d = taken - self.theta
        # The host waits, for closures that write to their parameters alone.
        metric = torch.dot(d, model.curvature(d)).item()
        self.parameters.write(taken)  # products by differences leave them at θ
        return replace(
            step,
            direction=d,
            slope=torch.dot(model.gradient, d).item(),
            metric=metric,
            objective_curvature=metric,
            decay_slope=torch.dot(self.theta, model.decay * d).item(),
            decay_quadratic=torch.dot(d, model.decay * d).item(),
            products=step.products + 1,
        )

    def _scale(self, solution: LinearSolution, model: QuadraticModel) -> Step:
        """The solution, cut to the trust region and times ``lr``; with a geodesic correction if it is all there."""
        lr, measures_kl = self.parameters.spread(self.lr), self.point.kind == "fisher"
        step = scale_step(
            model, solution, self.theta, lr, self.max_kl, self.trust_region, measures_kl
        )
        is_full = (
            step.scale == 1.0
            and all(value == 1.0 for value in self.lr)
            and solution.stop == "exact"
        )
        corrects = self.geodesic and self.point.is_least_squares and is_full
        if not (corrects and isinstance(self.solver, RootSolver)):
            return step
        if self.is_first and self._is_far(step, model):
            return replace(step, problem="it is too long for a first one")
        move = partial(self.parameters.move, self.theta, step.direction)
        corrected = apply_geodesic_correction(step, self.solver, model, self.theta, move)
        return corrected or replace(step, problem="the residuals bend too much along it")

    def _is_far(self, step: Step, model: QuadraticModel) -> bool:
        """Whether it is many times as long as the parameters, in the norm of the damping's scale (Moré 1978)."""
        if model.scale is None:
            return False
        # The host waits, at a first step alone.
        length, reach = read(
            *(torch.dot(v, model.scale * v).sqrt() for v in (step.direction, self.theta))
        )
        return 0 < _FIRST * reach < length

    def _search(self, step: Step, solution: LinearSolution, *, max_backtracks: int) -> Trial:
        """Move the parameters along the step as far as the objective and the KL allow, or not at all."""
        if solution.stop == "not_finite":
            return self._refuse_not_finite(solution)
        if solution.stop == "indefinite":
            return Trial.refuse("the damped curvature is not positive definite")
        if step.problem:
            self.parameters.write(self.theta)  # the residuals were looked at along it
            return Trial.refuse(step.problem)

        def evaluate(fraction: float) -> tuple[float, float | None]:
            self.parameters.move(self.theta, step.direction, fraction)
            loss, kl = self.point.measure()
            return loss + step.decay_change(fraction), kl

        trial = line_search(
            evaluate,
            self.point.value,
            step.slope,
            max_kl=self.max_kl,
            max_backtracks=max_backtracks,
            requires_decrease=self.max_backtracks > 0,
            backtrack_ratio=self.backtrack_ratio,
        )
        if not trial.accepted:
            # Bit for bit: θ + 0 · d would round parameters of other dtypes.
            self.parameters.write(self.theta)
            promised = step.predicted_decrease(1.0)
            # At the minimum every trial is turned down by rounding: that is no reason for more
            # damping.
            if trial.backtracks and abs(promised) <= self.point.rounding:
                why = f"the decrease that the model promises, {promised:.2g}, is below the loss's rounding"
                return replace(trial, overshot=False, problem=why)
        return trial

    def _find_problem_of_loss(self) -> str | None:
        if math.isfinite(self.point.value):
            return None
        said = f"the loss is {self.point.value}"
        return (
            f"{said}, and tensors without elements went into it: the batch is empty"
            if self.point.is_empty()
            else said
        )

    def _refuse_not_finite(self, solution: LinearSolution) -> Trial:
        if not self.point.is_finite:
            return Trial.refuse("the gradient is not finite", forgets=True)
        diagonal = self.solver.diagonal
        if diagonal is not None and not diagonal.isfinite().all():
            return Trial.refuse("the curvature is not finite", forgets=True)
        match solution.not_finite:
            case "b":
                return Trial.refuse("the gradient is too large for its dtype", forgets=True)
            case "preconditioner":
                return Trial.refuse(
                    "what the preconditioner returns is not finite; use preconditioner=None"
                )
            case "product":
                # The first one tells of the data; later ones grow where the system is singular.
                return Trial.refuse(
                    "a curvature product is not finite", forgets=solution.iterations <= 1
                )
            case _:
                return Trial.refuse("the solution of the linear system is not finite")

    def _is_worth_a_retry(self, step: Step) -> bool:
        promises = not step.slope < 0 or step.predicted_decrease(1.0) > self.point.rounding
        return promises and math.isfinite(self.point.value)
