"""TRPO for recurrent policies."""

from collections.abc import Iterator
from copy import copy
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from ngd_rl.trpo import TRPO, Samples, evenly_spaced, rows_of

States = tuple[Tensor, ...]


class RecurrentTRPO(TRPO):
    """:class:`~ngd_rl.TRPO` for the LSTM policies and rollout buffers of ``sb3_contrib.RecurrentPPO``.

    The constructor is that of :class:`~ngd_rl.TRPO`; ``sub_sampling_factor`` and
    ``curvature_fraction`` choose among sequences (what one environment saw of one episode), not
    among steps.

    Raises:
        ValueError: as for :class:`~ngd_rl.TRPO`, or the policy is not recurrent.

    Examples:
        >>> from ngd_rl import RecurrentTRPO
        >>> agent = RecurrentTRPO("MlpLstmPolicy", "CartPole-v1", n_steps=64).learn(64)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = RecurrentPPO.policy_aliases
    policy: Any
    rollout_buffer: Any

    def _setup_model(self) -> None:
        self._check_settings()
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(
                f"policy must be a RecurrentActorCriticPolicy, got {self.policy_class.__name__}"
            )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self._make_policy()
        layers, _, hidden = self.policy.lstm_hidden_state_shape
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = (
                RecurrentDictRolloutBuffer if is_dict else RecurrentRolloutBuffer
            )
        self.rollout_buffer = self.rollout_buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            hidden_state_shape=(self.n_steps, layers, self.n_envs, hidden),
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        self._last_lstm_states = RNNStates(
            self._zero_states(self.n_envs), self._zero_states(self.n_envs)
        )
        self._setup_policy_optimizer()

    def _zero_states(self, n_sequences: int) -> States:
        layers, _, hidden = self.policy.lstm_hidden_state_shape
        return tuple(torch.zeros(layers, n_sequences, hidden, device=self.device) for _ in range(2))

    def _example_inputs(self) -> tuple[Any, ...]:
        return (
            *super()._example_inputs(),
            self._zero_states(1),
            torch.zeros(1, dtype=torch.long, device=self.device),
        )

    def _distribution(self, *inputs: Any) -> Distribution:
        """The distribution of the rows that are not padding, given the states in which the sequences start."""
        observations, states, rows = inputs
        n_rows = len(
            next(iter(observations.values())) if isinstance(observations, dict) else observations
        )
        nothing_starts = torch.zeros(n_rows, device=self.device)
        distribution, _ = self.policy.get_distribution(observations, states, nothing_starts)
        distribution = copy(distribution)
        distribution.distribution = _rows_of_distribution(distribution.distribution, rows)
        return distribution

    def _collect(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        borrowed: Any = RecurrentPPO.collect_rollouts
        return borrowed(self, env, callback, rollout_buffer, n_rollout_steps)

    def _samples(self, data: Any, every: float) -> Samples:
        n_sequences = data.lstm_states.pi[0].shape[1]
        sequences = evenly_spaced(n_sequences, every)
        steps = (
            torch.arange(len(data.mask), device=data.mask.device)
            .view(n_sequences, -1)[sequences]
            .flatten()
        )
        states = tuple(state[:, sequences] for state in _starting_states(data, data.lstm_states.pi))
        mask = data.mask[steps] > 0
        rows = mask.nonzero().flatten()
        inputs = (rows_of(data.observations, steps), states, rows)
        # The buffer keeps the actions' dtype, and the log-probability of binary ones needs floats.
        columns = (data.actions.float(), data.old_log_prob, data.advantages)
        return Samples(inputs, *(column[steps][mask] for column in columns))

    def _value_losses(self, critic: Any, buffer: Any) -> Iterator[Tensor]:
        for _ in range(self.n_critic_updates):
            for data in buffer.get(self.batch_size):
                states = _starting_states(data, data.lstm_states.vf)
                starts = torch.zeros_like(data.episode_starts)
                values = critic.predict_values(data.observations, states, starts).flatten()
                mask = data.mask > 0
                yield torch.nn.functional.mse_loss(values[mask], data.returns[mask])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_lstm_states"]


def _starting_states(data: Any, states: States) -> States:
    """The states before each sequence, zero where an episode starts.

    The buffer cuts sequences where episodes start, so the LSTM need not look for starts on its way,
    which the policy would do in a loop over time.
    """
    n_sequences = states[0].shape[1]
    going_on = 1.0 - data.episode_starts.view(n_sequences, -1)[:, 0]
    return tuple(state * going_on[:, None] for state in states)


def _rows_of_distribution(distribution: Any, rows: Tensor) -> Any:
    if isinstance(distribution, list):
        return [_rows_of_distribution(part, rows) for part in distribution]
    if isinstance(distribution, Normal):
        return Normal(distribution.loc[rows], distribution.scale[rows])
    assert isinstance(distribution, Categorical | Bernoulli)
    return type(distribution)(logits=distribution.logits[rows])
