"""Constrained policy optimization, as a sibling of TRPO."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ngd_rl.constrained import Case, ConstrainedStep, solve_constrained
from ngd_rl.limited import CostLimited
from ngd_rl.trpo import Closure

logger = logging.getLogger("ngd_rl")


@dataclass(frozen=True)
class CPOReport:
    """One policy update of :class:`~ngd_rl.CPO`. Everything is a plain Python value.

    Attributes:
        cost: the mean cost of an episode.
        cost_limit: what it may be.
        cost_change: what the surrogate says that the step changes ``cost`` by; 0 when rejected.
        case: ``"free"``, ``"active"`` or ``"recovery"``, as the model sees the constraint; see
            :class:`~ngd_rl.CPO`.
        multiplier: the constraint's Lagrange multiplier, infinite for recovery.
        loss: the surrogate objective, negated, before the step.
        new_loss: likewise where the step ended.
        kl: measured KL from the old to the new policy, in nats per sample.
        max_kl: its bound.
        damping: ``λ``.
        cg_iters: iterations of conjugate gradients, of both systems.
        cg_residual: the larger of the relative residuals at which they stopped.
        n_product: curvature products.
        step_scale: the fraction of the step that the line search took; 0 when rejected.
        backtracks: trial points that were turned down.
        accepted: whether the step was taken.
        reason: one sentence on the outcome.

    Examples:
        >>> from ngd_rl import CPOReport
        >>> {"cost", "cost_limit", "case", "kl"} <= CPOReport.__dataclass_fields__.keys()
        True
    """

    cost: float
    cost_limit: float
    cost_change: float
    case: Case
    multiplier: float
    loss: float
    new_loss: float
    kl: float
    max_kl: float
    damping: float
    cg_iters: int
    cg_residual: float
    n_product: int
    step_scale: float
    backtracks: int
    accepted: bool
    reason: str

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """All fields by name, ready for a logger."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A point of the line search: change of the cost per step, loss and KL there, and what speaks against it."""

    fraction: float = 0.0
    cost_change: float = 0.0
    loss: float = math.nan
    kl: float = 0.0
    problem: str = ""


class CPO(CostLimited):
    """Constrained Policy Optimization (Achiam et al. 2017): TRPO that keeps the cost of episodes below a limit.

    Each step of the environment has its cost in ``info["cost"]``. With g the gradient of TRPO's
    loss, b that of the cost and c by how much the cost is above its limit, a step minimises
    ``gᵀd`` subject to ``bᵀd + c ≤ 0`` and TRPO's trust region. Two solves, ``F⁻¹g`` and ``F⁻¹b``,
    give it in closed form. The constraint is ``"free"`` if TRPO's step satisfies it; else
    ``"active"``, and the step ends at the limit; where no step in the region gets there, the one
    that lowers the cost most is taken, ``"recovery"``. A line search shrinks the step until the
    measured KL is within its bound, and the surrogate of the cost within its limit, or not above
    what it is where it exceeds that. While the cost is within its limit, the loss must not rise.

    The cost of an episode is the plain sum of its steps' costs. ``cost`` is its mean over the
    episodes that ended in the rollout; if none did, the last that is known, or before any ended the
    costs so far. Advantages of costs come from a critic of their own, a second instance of the
    policy's class.

    Args:
        *args: as for :class:`~ngd_rl.TRPO`.
        cost_limit: what an episode may cost in the mean; the default is Safety Gym's (Ray et al.
            2019).
        cost_gamma: discount factor for the advantages of costs; 1 for finite episodes whose plain
            sum is to be exact.
        cost_gae_lambda: λ of their estimator.
        **kwargs: as for :class:`~ngd_rl.TRPO`, but for ``adapt_damping`` and ``warm_start``.
            ``preconditioner`` is None or a function.

    Attributes:
        last_step: the :class:`CPOReport` of the last update; None before the first. It is no part
            of what is saved.
        cost_critic: whose values are those of costs.

    Raises:
        ValueError: as for :class:`~ngd_rl.TRPO`, or a step of the environment has no finite cost.

    Examples:
        >>> import gymnasium as gym
        >>> from ngd_rl import CPO
        >>> class Effort(gym.Wrapper):
        ...     def step(self, action):
        ...         *rest, info = super().step(action)
        ...         return *rest, {**info, "cost": float(action[0] ** 2)}
        >>> env = Effort(gym.make("Pendulum-v1"))
        >>> agent = CPO("MlpPolicy", env, cost_limit=50.0, n_steps=256).learn(256)
        >>> agent.last_step.kl <= agent.target_kl
        True
    """

    last_step: CPOReport | None = None

    def _check_settings(self) -> None:
        super()._check_settings()
        self._check_each(
            {
                "adapt_damping": (not self.adapt_damping, "False for CPO"),
                "warm_start": (self.warm_start == 0, "0 for CPO"),
                "preconditioner": (
                    self.preconditioner is None or callable(self.preconditioner),
                    "None or a function for CPO",
                ),
            }
        )

    def _update_policy(self) -> CPOReport:
        data, cost_data = (
            next(buffer.get(batch_size=None)) for buffer in (self.rollout_buffer, self.cost_buffer)
        )
        objective = self._closure(self._samples(data, every=self.sub_sampling_factor))
        cost_samples = self._samples(cost_data, every=self.sub_sampling_factor)
        # Its gradient is that of the mean cost of a step; less their mean, advantages vary less.
        cost = self._surrogate(
            cost_samples, cost_samples.advantages - cost_samples.advantages.mean()
        )
        self.policy_optimizer.param_groups[0].update(self._settings())
        self.last_step = self._step(objective, cost, self._curvature_closure(data))
        return self.last_step

    def _step(self, objective: Closure, cost: Closure, part: Closure | None) -> CPOReport:
        assert self.episode_cost is not None
        assert self.episode_length
        parameters = [p for p in self._actor if p.requires_grad]
        point = self.policy_optimizer.linearize(objective)
        curvature = point if part is None else self.policy_optimizer.linearize(part)
        g, b = point.gradient, _gradient_of(cost, parameters).to(point.gradient)
        found = curvature.solve(
            torch.stack([g, b]),
            damping=self.cg_damping,
            max_iters=self.cg_max_steps,
            tol=self.cg_tol,
            preconditioner=self.preconditioner,
        )
        # A cost surrogate is that of one step, and so is the violation.
        c = (self.episode_cost - self.cost_limit) / self.episode_length
        start = point.loss.item()
        step = ConstrainedStep("free", 0.0, 0.0, 0.0)
        if found.is_finite and math.isfinite(start):
            (q, r), (_, s) = found.scalars.tolist()
            step = solve_constrained(q, r, s, c, self.target_kl)
            x, y = found.solutions
            trials = self._search(
                step.along_g * x + step.along_b * y, parameters, point.measure, cost, start, c
            )
        else:
            trials = [Trial(problem="the gradients or curvature products are not finite")]
        last = trials[-1]
        accepted = not last.problem
        if not accepted:
            logger.warning("a policy update was rejected: %s", last.problem)
        return CPOReport(
            cost=self.episode_cost,
            cost_limit=self.cost_limit,
            cost_change=last.cost_change * self.episode_length if accepted else 0.0,
            case=step.case,
            multiplier=step.multiplier,
            loss=start,
            new_loss=last.loss if accepted else start,
            kl=last.kl if accepted else 0.0,
            max_kl=self.target_kl,
            damping=self.cg_damping,
            cg_iters=sum(solve.iterations for solve in found.solves),
            cg_residual=max(solve.residual for solve in found.solves),
            n_product=found.products,
            step_scale=last.fraction if accepted else 0.0,
            backtracks=len(trials) - 1,
            accepted=accepted,
            reason="accepted" if accepted else f"rejected: {last.problem}",
        )

    def _search(
        self,
        direction: Tensor,
        parameters: list[Tensor],
        measure: Callable[[], tuple[float, float | None]],
        cost: Closure,
        start: float,
        c: float,
    ) -> list[Trial]:
        """Move the parameters along a step as far as KL, cost and loss allow, or not at all; the points tried."""
        before = [p.detach().clone() for p in parameters]
        pieces = direction.split([p.numel() for p in parameters])
        trials: list[Trial] = []

        def move(fraction: float) -> None:
            for p, old, piece in zip(parameters, before, pieces, strict=True):
                p.copy_(old + fraction * piece.view_as(p) if fraction else old)

        with torch.no_grad():
            cost_before = cost()[0].item()
            try:
                for k in range(max(1, self.line_search_max_iter)):
                    fraction = self.line_search_shrinking_factor**k
                    move(fraction)
                    loss, kl = measure()
                    change = cost()[0].item() - cost_before
                    trial = Trial(fraction, change, loss, kl or 0.0)
                    trials.append(replace(trial, problem=self._problem_of(trial, start, c)))
                    if not trials[-1].problem:
                        break
            except BaseException:
                move(0.0)
                raise
            if trials[-1].problem:
                move(0.0)
        return trials

    def _problem_of(self, trial: Trial, start: float, c: float) -> str:
        """What speaks against a point; empty: nothing."""
        if not all(map(math.isfinite, (trial.loss, trial.kl, trial.cost_change))):
            return "loss, KL or cost are not finite at the end of the step"
        if self.line_search_max_iter == 0:
            return ""
        if trial.kl > self.target_kl:
            return f"the KL {trial.kl:.3g} is above target_kl={self.target_kl:g}"
        if trial.cost_change > max(0.0, -c):
            return f"the cost of a step rises by {trial.cost_change:.3g}, and may by {max(0.0, -c):.3g}"
        if c <= 0 and trial.loss > start:
            return f"the loss {trial.loss:.6g} is above {start:.6g}"
        return ""

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "last_step"]


def _gradient_of(surrogate: Closure, parameters: list[Tensor]) -> Tensor:
    """Flat, in the order of the parameters."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(surrogate()[0], parameters, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
