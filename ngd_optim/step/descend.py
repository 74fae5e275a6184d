"""From a point down: solve the system, cut the step to its region, and search along it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ngd_optim.linalg import CGResult
from ngd_optim.linearization import Point
from ngd_optim.names import TrustRegion
from ngd_optim.parameters import FlatParameters
from ngd_optim.solvers import LeastSquares, QuadraticModel, SampleSpace, Solver
from ngd_optim.step.damping import Damping
from ngd_optim.step.geodesic import bent
from ngd_optim.step.line_search import Trial, line_search
from ngd_optim.step.trust_region import Step, scaled_step


@dataclass(frozen=True)
class Outcome:
    """Where a descent ended: the last damping, one per group, the model with it, its solution, the step, its trial."""

    damping: Sequence[float]
    model: QuadraticModel
    solution: CGResult
    step: Step
    trial: Trial


@dataclass(frozen=True)
class Descent:
    """What is needed to go down from a point.

    Attributes:
        point: the closure there.
        parameters: they are moved.
        solver: of the system.
        damping: of the groups; it grows where a system is solved again.
        lr: factor for the step, one per group.
        max_kl, trust_region, max_backtracks, backtrack_ratio, geodesic: the settings of these names.
    """

    point: Point
    parameters: FlatParameters
    solver: Solver
    damping: Damping
    lr: Sequence[float]
    max_kl: float | None
    trust_region: TrustRegion
    max_backtracks: int
    backtrack_ratio: float
    geodesic: bool

    def __call__(
        self, model_of: Callable[[Sequence[float], int], QuadraticModel], check: Callable[[], None]
    ) -> Outcome:
        """Move the parameters to a lower point, or leave them where they are.

        Args:
            model_of: the quadratic model with a damping, one per group, for the first, second, … attempt.
            check: raises what other processes met while the system was solved.
        """
        solves_again = self.damping.can_retry and self.max_backtracks > 0
        attempt = 0
        while True:
            attempt += 1
            damping = self.damping.values
            model = model_of(damping, attempt)
            solution = self.solver.solve(model)
            step = self._scaled(solution, model)
            check()
            trial = self._search(step, solution, max_backtracks=0 if solves_again else self.max_backtracks)
            if trial.accepted or not (solves_again and self._is_worth_a_retry(step) and self.damping.retry(attempt)):
                trial = replace(trial, backtracks=trial.backtracks + attempt - 1)
                return Outcome(damping, model, solution, step, trial)

    def _scaled(self, solution: CGResult, model: QuadraticModel) -> Step:
        """The solution, cut to the trust region and multiplied by ``lr``; bent along its valley if it is all there."""
        theta, lr = self.parameters.theta, self.parameters.spread(self.lr)
        measures_kl = self.point.kind == "fisher"
        step = scaled_step(model, solution, theta, lr, self.max_kl, self.trust_region, measures_kl)
        is_full = step.scale == 1.0 and all(value == 1.0 for value in self.lr) and solution.stop == "exact"
        if (
            self.geodesic
            and self.point.is_least_squares
            and is_full
            and isinstance(self.solver, LeastSquares | SampleSpace)
        ):
            return bent(step, self.solver, model, theta, partial(self.parameters.move, step.direction))
        return step

    def _search(self, step: Step, solution: CGResult, *, max_backtracks: int) -> Trial:
        """Move the parameters along the step as far as the objective and the KL allow, or not at all."""
        if not self.point.loss.isfinite():
            return Trial.refused(f"the loss is {self.point.loss.item()}")
        if solution.stop == "not_finite":
            return Trial.refused("the gradient, a curvature product or the preconditioner is not finite")
        if solution.stop == "indefinite":
            return Trial.refused("the damped curvature is not positive definite")

        def evaluate(fraction: float) -> tuple[float, float | None]:
            self.parameters.move(step.direction, fraction)
            loss, kl = self.point.measure()
            return loss + step.decay_change(fraction), kl

        trial = line_search(
            evaluate,
            self.point.loss.item(),
            step.slope,
            max_kl=self.max_kl,
            max_backtracks=max_backtracks,
            demanding=self.max_backtracks > 0,
            backtrack_ratio=self.backtrack_ratio,
        )
        if not trial.accepted:
            self.parameters.restore()
            promised = step.predicted_decrease(1.0)
            if trial.backtracks and abs(promised) <= self.point.rounding:
                why = f"the decrease that the model promises, {promised:.2g}, is below the loss's rounding"
                return replace(trial, overshot=False, problem=why)
        return trial

    def _is_worth_a_retry(self, step: Step) -> bool:
        promises = not step.slope < 0 or step.predicted_decrease(1.0) > self.point.rounding
        return promises and math.isfinite(self.point.loss.item())
