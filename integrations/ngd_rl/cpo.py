"""Constrained policy optimization, as a sibling of TRPO."""

import logging
import math
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import (
    explained_variance,
    obs_as_tensor,
    update_learning_rate,
)
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ngd_rl.constrained import Case, ConstrainedStep, solve_constrained
from ngd_rl.costs import CostRecorder, Episodes
from ngd_rl.trpo import TRPO, Closure

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


class CPO(TRPO):
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

    cost_critic: Any

    def __init__(
        self,
        *args: Any,
        cost_limit: float = 25.0,
        cost_gamma: float = 0.99,
        cost_gae_lambda: float = 0.95,
        **kwargs: Any,
    ) -> None:
        self.cost_limit = cost_limit
        self.cost_gamma = cost_gamma
        self.cost_gae_lambda = cost_gae_lambda
        self.episode_cost: float | None = None
        self.episode_length: float | None = None
        self.last_step: CPOReport | None = None
        super().__init__(*args, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        allowed = {
            "cost_limit": (math.isfinite(self.cost_limit), "a finite number"),
            "cost_gamma": (0 <= self.cost_gamma <= 1, "between 0 and 1"),
            "cost_gae_lambda": (0 <= self.cost_gae_lambda <= 1, "between 0 and 1"),
            "adapt_damping": (not self.adapt_damping, "False for CPO"),
            "warm_start": (self.warm_start == 0, "0 for CPO"),
            "preconditioner": (
                self.preconditioner is None or callable(self.preconditioner),
                "None or a function for CPO",
            ),
        }
        for name, (is_allowed, what) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def _setup_model(self) -> None:
        super()._setup_model()
        self.cost_critic = self._make_policy()
        self._episodes = Episodes(np.zeros(self.n_envs), np.zeros(self.n_envs, dtype=int))

    # The costs of a rollout

    def _collect(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        assert self._last_episode_starts is not None
        self._episodes.begin(self._last_episode_starts)
        recorder = CostRecorder(env, self._episodes)
        is_complete = super()._collect(recorder, callback, rollout_buffer, n_rollout_steps)
        if is_complete:
            self.cost_buffer = self._estimate_costs(recorder, rollout_buffer)
            self._estimate_episode()
        return is_complete

    def _estimate_costs(
        self, recorder: CostRecorder, rollout_buffer: RolloutBuffer
    ) -> RolloutBuffer:
        """The same samples, with costs in place of rewards."""
        self.cost_critic.set_training_mode(False)
        costs = np.array(recorder.costs, dtype=np.float32)
        for step, i, observation in recorder.cut_off:
            last, _ = self.policy.obs_to_tensor(observation)
            costs[step, i] += self.cost_gamma * self._cost_values(last).item()
        buffer: Any = copy(rollout_buffer)
        buffer.gamma, buffer.gae_lambda = self.cost_gamma, self.cost_gae_lambda
        buffer.rewards, buffer.advantages = costs, np.zeros_like(costs)
        if isinstance(buffer.observations, dict):  # which each buffer flattens in place
            buffer.observations = dict(buffer.observations)
        buffer.values = self._cost_values_of_rollout(buffer).reshape(costs.shape)
        assert self._last_obs is not None
        assert self._last_episode_starts is not None
        last = self._cost_values(obs_as_tensor(self._last_obs, self.device))
        buffer.compute_returns_and_advantage(torch.from_numpy(last), self._last_episode_starts)
        return buffer

    def _cost_values_of_rollout(self, buffer: RolloutBuffer) -> np.ndarray:
        """Of all its observations, step by step."""
        values = []
        for start in range(0, buffer.buffer_size * buffer.n_envs, self.batch_size):
            rows = slice(start, start + self.batch_size)
            values.append(self._cost_values(_rows_of_rollout(buffer, rows)))
        return np.concatenate(values)

    @torch.no_grad()
    def _cost_values(self, observations: Any) -> np.ndarray:
        return self.cost_critic.predict_values(observations).flatten().cpu().numpy()

    def _estimate_episode(self) -> None:
        """What an episode costs, and how long it is."""
        episodes = self._episodes
        if episodes.ended:
            self.episode_cost, self.episode_length = map(float, np.mean(episodes.ended, axis=0))
        elif self.episode_length is None or episodes.length.mean() > self.episode_length:
            self.episode_cost = float(episodes.cost.mean())
            self.episode_length = float(episodes.length.mean())

    # The update

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

    def _update_critic(self) -> list[float]:
        rate = self.lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.cost_critic.optimizer, rate)
        self.cost_critic.set_training_mode(True)
        losses = self._fit_values(self.cost_critic, self.cost_buffer)
        if losses:
            self.logger.record("train/cost_value_loss", np.mean(losses))
        buffer = self.cost_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/cost_explained_variance", explained)
        return super()._update_critic()

    # Saving

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "cost_critic", "cost_critic.optimizer"], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "cost_buffer", "last_step", "_episodes"]


def _gradient_of(surrogate: Closure, parameters: list[Tensor]) -> Tensor:
    """Flat, in the order of the parameters."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(surrogate()[0], parameters, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _rows_of_rollout(buffer: RolloutBuffer, rows: slice) -> Any:
    """Observations, of all environments after each step, as the policy takes them."""
    arrays: Any = buffer.observations
    if isinstance(arrays, dict):
        return {name: buffer.to_torch(_flat(array)[rows]) for name, array in arrays.items()}
    return buffer.to_torch(_flat(arrays)[rows])


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[2:])
