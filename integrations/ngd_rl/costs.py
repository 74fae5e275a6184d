"""What a rollout costs: ``info["cost"]`` of each step, and of each episode."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


@dataclass
class Episodes:
    """Costs and lengths of episodes, which go on from one rollout to the next.

    Attributes:
        cost, length: of the episodes that go on, shape ``(n_envs,)``.
        ended: cost and length of those that ended in this rollout.
    """

    cost: np.ndarray
    length: np.ndarray
    ended: list[tuple[float, int]] = field(default_factory=list)

    def begin(self, starts: np.ndarray) -> None:
        """A rollout, in which some episodes are new."""
        self.ended = []
        self._forget(starts)

    def add(self, costs: np.ndarray, dones: np.ndarray) -> None:
        """One step of each environment."""
        self.cost += costs
        self.length += 1
        self.ended += zip(self.cost[dones].tolist(), self.length[dones].tolist(), strict=True)
        self._forget(dones)

    def _forget(self, which: np.ndarray) -> None:
        which = which.astype(bool)
        self.cost[which], self.length[which] = 0.0, 0


class CostRecorder(VecEnvWrapper):
    """Passes environments on and keeps what their steps cost.

    Attributes:
        costs: one array of shape ``(n_envs,)`` a step.
        cut_off: step, environment and last observation of each episode that a time limit ended.

    Raises:
        ValueError: a step has no cost, or one that is not a finite number.
    """

    def __init__(self, venv: VecEnv, episodes: Episodes) -> None:
        super().__init__(venv)
        self._episodes = episodes
        self.costs: list[np.ndarray] = []
        self.cut_off: list[tuple[int, int, Any]] = []

    def reset(self) -> VecEnvObs:
        """As the environments do."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """As the environments do."""
        observations, rewards, dones, infos = self.venv.step_wait()
        costs = np.array([_cost_of(info) for info in infos])
        for i, info in enumerate(infos):
            last = info.get("terminal_observation")
            if dones[i] and last is not None and info.get("TimeLimit.truncated", False):
                self.cut_off.append((len(self.costs), i, last))
        self.costs.append(costs)
        self._episodes.add(costs, dones)
        return observations, rewards, dones, infos


def _cost_of(info: dict[str, Any]) -> float:
    if "cost" not in info:
        raise ValueError(
            'the info of a step has no "cost"; have the environment, or a wrapper around it, put one '
            "into the info of every step"
        )
    given = np.asarray(info["cost"])
    if given.size != 1 or given.dtype.kind not in "biuf":
        raise ValueError(
            f"the cost in the info of a step must be one number, got {info['cost']!r}; add up several"
        )
    cost = float(given.reshape(()))
    if not np.isfinite(cost):
        raise ValueError(f"the environment returned a cost that is not finite, {cost}")
    return cost
