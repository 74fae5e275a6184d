"""TRPO in an environment whose steps have costs: what they are, their critic, and their limit."""

import math
from copy import copy
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

from ngd_rl.costs import CostRecorder, Episodes
from ngd_rl.trpo import TRPO


class CostLimited(TRPO):
    """What :class:`~ngd_rl.CPO` and :class:`~ngd_rl.TRPOLagrangian` share.

    Each step of the environment has its cost in ``info["cost"]``. The cost of an episode is the
    plain sum of its steps' costs; its mean is over the episodes that ended in the rollout; if none
    did, the last that is known, or before any ended the costs so far. Advantages of costs come from
    a critic of their own, a second instance of the policy's class.
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
        super().__init__(*args, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        self._check_each(
            {
                "cost_limit": (math.isfinite(self.cost_limit), "a finite number"),
                "cost_gamma": (0 <= self.cost_gamma <= 1, "between 0 and 1"),
                "cost_gae_lambda": (0 <= self.cost_gae_lambda <= 1, "between 0 and 1"),
            }
        )

    def _check_each(self, allowed: dict[str, tuple[bool, str]]) -> None:
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

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "cost_critic", "cost_critic.optimizer"], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "cost_buffer", "_episodes"]


def _rows_of_rollout(buffer: RolloutBuffer, rows: slice) -> Any:
    """Observations, of all environments after each step, as the policy takes them."""
    arrays: Any = buffer.observations
    if isinstance(arrays, dict):
        return {name: buffer.to_torch(_flat(array)[rows]) for name, array in arrays.items()}
    return buffer.to_torch(_flat(arrays)[rows])


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[2:])
