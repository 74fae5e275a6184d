"""TRPO with a Lagrange multiplier for the costs."""

from typing import Any

import numpy as np

from ngd_rl.limited import CostLimited


class TRPOLagrangian(CostLimited):
    """TRPO whose costs have a price, which rises while episodes cost more than their limit (Ray et al. 2019).

    With A and C the advantages of rewards and of costs, each of mean 0 and standard deviation 1, an
    update is TRPO's for ``(A − ν C) / (1 + ν)``. With the excess ``e = (cost − limit) / max(cost,
    limit)`` of the rollout, the price is ``ν = I + multiplier_gain · e``, where I grows by
    ``multiplier_lr · e`` at each update; both are at least 0. The second term keeps the cost from
    swinging about its limit (Stooke, Achiam & Abbeel 2020). None of this depends on the unit of
    rewards or costs.

    It is simpler than :class:`~ngd_rl.CPO`, and has all of TRPO's options. CPO looks at the limit in
    each step; here it is kept once the price is found.

    Args:
        *args: as for :class:`~ngd_rl.TRPO`.
        multiplier: the price at the start, and I. Above 0 it keeps a policy from becoming certain of
            costly actions before the price is found: from such a policy it learns nothing more.
        multiplier_lr: how fast I changes, per update.
        multiplier_gain: how much of the price is for the excess of the last rollout.
        **kwargs: as for :class:`~ngd_rl.TRPO`, and ``cost_limit``, ``cost_gamma`` and
            ``cost_gae_lambda`` as for :class:`~ngd_rl.CPO`.

    Attributes:
        multiplier: the price ν; saved with the agent, as I is.
        episode_cost: the mean cost of an episode in the last rollout; None before the first.
        cost_critic: whose values are those of costs.

    Raises:
        ValueError: as for :class:`~ngd_rl.CPO`.

    Examples:
        >>> import gymnasium as gym
        >>> from ngd_rl import TRPOLagrangian
        >>> class Effort(gym.Wrapper):
        ...     def step(self, action):
        ...         *rest, info = super().step(action)
        ...         return *rest, {**info, "cost": float(action[0] ** 2)}
        >>> env = Effort(gym.make("Pendulum-v1"))
        >>> agent = TRPOLagrangian("MlpPolicy", env, cost_limit=5.0, n_steps=256).learn(256)
        >>> agent.multiplier > 0, agent.policy_optimizer.last_step.kl <= agent.target_kl
        (True, True)
    """

    def __init__(
        self,
        *args: Any,
        multiplier: float = 0.0,
        multiplier_lr: float = 0.05,
        multiplier_gain: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self.multiplier = self._integral = multiplier
        self.multiplier_lr = multiplier_lr
        self.multiplier_gain = multiplier_gain
        super().__init__(*args, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        at_least_0 = {
            name: (0 <= getattr(self, name) < np.inf, "a finite number, at least 0")
            for name in ("multiplier", "multiplier_lr", "multiplier_gain", "cost_limit")
        }
        self._check_each(at_least_0)

    def _update_policy(self) -> Any:
        assert self.episode_cost is not None
        size = max(abs(self.episode_cost), self.cost_limit)
        excess = (self.episode_cost - self.cost_limit) / (size or 1.0)
        self._integral = max(0.0, self._integral + self.multiplier_lr * excess)
        self.multiplier = max(0.0, self._integral + self.multiplier_gain * excess)
        # Both buffers have their samples in the same order until they are first asked for some.
        gain, cost = map(
            _standardise, (self.rollout_buffer.advantages, self.cost_buffer.advantages)
        )
        self.rollout_buffer.advantages = (gain - self.multiplier * cost) / (1 + self.multiplier)
        return super()._update_policy()

    def _record(self, report: Any, value_losses: list[float]) -> None:
        super()._record(report, value_losses)
        for name in ("episode_cost", "cost_limit", "multiplier"):
            self.logger.record(f"train/{name.removeprefix('episode_')}", getattr(self, name))


def _standardise(advantages: np.ndarray) -> np.ndarray:
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
