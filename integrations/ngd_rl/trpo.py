"""TRPO with sb3-contrib's interface and NaturalCG's step."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal

from ngd_optim import NaturalCG, StepReport

Closure = Callable[[], tuple[Tensor, Any]]


class Samples(NamedTuple):
    """What the policy step needs of a rollout.

    Attributes:
        inputs: what the action distribution depends on.
        actions, old_log_prob, advantages: one row per sample.
    """

    inputs: tuple[Any, ...]
    actions: Tensor
    old_log_prob: Tensor
    advantages: Tensor


class TRPO(sb3_contrib.TRPO):
    """Trust Region Policy Optimization (Schulman et al. 2015) for Stable-Baselines3.

    The constructor is that of ``sb3_contrib.TRPO``, same names and defaults, and has some more
    keyword arguments. On the same rollout the step is that of sb3-contrib, with one difference: the
    KL is that of the whole action in nats per sample, where sb3-contrib averages over the
    dimensions of ``Box`` and ``MultiBinary`` actions. Multiply ``target_kl`` and ``cg_damping`` by
    their number for the same region.

    Args:
        *args: as for ``sb3_contrib.TRPO``.
        adapt_damping: let ``cg_damping`` follow how well the quadratic model predicts
            (Levenberg-Marquardt).
        cg_tol: conjugate gradients stop at this residual relative to the gradient, or after
            ``cg_max_steps``. At the default the step is the one that they converge to (cosine above
            0.99999), with fewer products.
        warm_start: they start from this multiple of the last solution.
        preconditioner: as for ``ngd_optim.NaturalCG``.
        backend: what forms the Fisher products, as for ``ngd_optim.NaturalCG``.
        curvature_fraction: share of the rollout that the Fisher products are formed on; the
            gradient and the line search always use all of it.
        **kwargs: as for ``sb3_contrib.TRPO``; ``line_search_max_iter=0`` means no line search
            (:class:`NPG`).

    Attributes:
        policy_optimizer: the :class:`~ngd_optim.NaturalCG` that moves the policy; it is saved with
            the model.

    Raises:
        ValueError: a setting is out of range, or the environment returned something that is not
            finite.

    Examples:
        >>> from ngd_rl import TRPO
        >>> agent = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, target_kl=0.01).learn(64)
        >>> agent.policy_optimizer.last_step.kl <= 0.01
        True
    """

    def __init__(
        self,
        *args: Any,
        adapt_damping: bool = False,
        cg_tol: float = 1e-3,
        warm_start: float = 0.0,
        preconditioner: Any = None,
        backend: str = "auto",
        curvature_fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.adapt_damping = adapt_damping
        self.cg_tol = cg_tol
        self.preconditioner = preconditioner
        self.backend = backend
        self.warm_start = warm_start
        self.curvature_fraction = curvature_fraction
        self._is_being_loaded = not kwargs.get("_init_setup_model", True)  # so says load()
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self._check_settings()
        super()._setup_model()
        self._setup_policy_optimizer()

    def _check_settings(self) -> None:
        samples = self.n_steps * self.n_envs
        used = samples / max(1, self.sub_sampling_factor)
        allowed = {
            "target_kl": (0 < self.target_kl < np.inf, "above 0"),
            "cg_damping": (0 <= self.cg_damping < np.inf, "at least 0"),
            "cg_max_steps": (self.cg_max_steps >= 1, "at least 1"),
            "line_search_max_iter": (
                self.line_search_max_iter == 0 or self.line_search_max_iter >= 2,
                "0 (no line search) or at least 2",
            ),
            "line_search_shrinking_factor": (
                0 < self.line_search_shrinking_factor < 1,
                "between 0 and 1",
            ),
            "n_critic_updates": (self.n_critic_updates >= 0, "at least 0"),
            "sub_sampling_factor": (
                self.sub_sampling_factor >= 1 and (self.sub_sampling_factor == 1 or used >= 2),
                f"at least 1, and leave two of the n_steps * n_envs = {samples} samples",
            ),
            "curvature_fraction": (
                0 < self.curvature_fraction <= 1
                and (self.curvature_fraction == 1 or self.curvature_fraction * used >= 2),
                f"above 0 and at most 1, and leave two of {used:.0f} samples",
            ),
        }
        for name, (is_allowed, what) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def _setup_policy_optimizer(self) -> None:
        self._trainable = self._find_trainable()
        self.policy_optimizer = NaturalCG(
            self._actor_parameters(), **{"damping": self.cg_damping, **self._settings()}
        )

    def _find_trainable(self) -> list[int]:
        return [id(p) for p in self.policy.parameters() if p.requires_grad]

    def _follow_policy(self) -> None:
        """Step the parameters that the policy has now: a part of it may have been replaced, such as its head."""
        if self._trainable == self._find_trainable():
            return
        self._trainable = self._find_trainable()
        parameters = self._actor_parameters()
        self.policy_optimizer.param_groups[0]["params"] = parameters
        for gone in self.policy_optimizer.state.keys() - set(parameters):
            del self.policy_optimizer.state[gone]

    def _settings(self) -> dict[str, Any]:
        """What NaturalCG calls the settings, which may change while training."""
        settings = {
            "max_kl": self.target_kl,
            "trust_region": "damped",
            "adapt_damping": self.adapt_damping,
            "max_cg_iters": self.cg_max_steps,
            "cg_tol": self.cg_tol,
            "cg_progress_tol": 0.0,
            "preconditioner": self.preconditioner,
            "backend": self.backend,
            "warm_start": self.warm_start,
            "max_backtracks": max(0, self.line_search_max_iter - 1),
            "backtrack_ratio": self.line_search_shrinking_factor,
        }
        return settings if self.adapt_damping else {**settings, "damping": self.cg_damping}

    def _actor_parameters(self) -> list[Tensor]:
        """The parameters that the action distribution depends on."""
        self.policy.set_training_mode(False)
        distribution = self._distribution(*self._example_inputs())
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        log_prob = distribution.log_prob(distribution.mode()).sum()
        if not log_prob.requires_grad:
            raise ValueError(
                "the actions depend on no trainable parameter of the policy; thaw some by "
                "requires_grad_(True)"
            )
        gradients = torch.autograd.grad(log_prob, parameters, allow_unused=True)
        return [
            p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None
        ]

    def _example_inputs(self) -> tuple[Any, ...]:
        # A copy of the space leaves the space's own random numbers alone, and takes long.
        if not hasattr(self, "_sample"):
            self._sample = deepcopy(self.observation_space).sample()
        observation, _ = self.policy.obs_to_tensor(self._sample)
        return (observation,)

    def _distribution(self, *inputs: Any) -> Distribution:
        """The distribution of the actions."""
        return self.policy.get_distribution(*inputs)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Collect a rollout, as the base class does.

        Raises:
            ValueError: the environment returned an observation or a reward that is not finite.
        """
        try:
            is_complete = self._collect(env, callback, rollout_buffer, n_rollout_steps)
        except ValueError as error:
            _refuse_not_finite("observation", self._last_obs, error)
            raise
        for observations in (rollout_buffer.observations, self._last_obs):
            _refuse_not_finite("observation", observations)
        _refuse_not_finite("reward", rollout_buffer.rewards)
        return is_complete

    def _collect(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def train(self) -> None:
        """Update policy and critic with the rollout.

        Raises:
            ValueError: a setting that was changed since is out of range, or the actor is frozen.
        """
        self._check_settings()
        self._follow_policy()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        report = self._update_policy()
        value_losses = self._update_critic()
        self._let_go_of_graph()
        self._n_updates += 1
        self._record(report, value_losses)

    def _let_go_of_graph(self) -> None:
        """The policy keeps its last distribution: let that be one without a graph, or it cannot be copied."""
        self.policy.set_training_mode(False)
        with torch.no_grad():
            self._distribution(*self._example_inputs())
        self.policy.set_training_mode(True)

    def _update_policy(self) -> StepReport:
        data = next(self.rollout_buffer.get(batch_size=None))
        samples = self._samples(data, every=self.sub_sampling_factor)
        part = None
        if self.curvature_fraction < 1:
            part = self._closure(
                self._samples(data, every=self.sub_sampling_factor / self.curvature_fraction)
            )
        self.policy_optimizer.param_groups[0].update(self._settings())
        self.policy_optimizer.step(self._closure(samples), curvature_closure=part)
        report = self.policy_optimizer.last_step
        assert report is not None
        return report

    def _samples(self, data: Any, every: float) -> Samples:
        """A part of the rollout, whose rows the buffer has shuffled."""
        index = evenly_spaced(len(data.actions), every)
        inputs = (rows_of(data.observations, index),)
        return Samples(
            inputs, data.actions[index], data.old_log_prob[index], data.advantages[index]
        )

    def _closure(self, samples: Samples) -> Closure:
        """The surrogate objective, negated, with the distribution of the actions."""
        inputs, actions, old_log_prob, advantages = samples
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        if self.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        def surrogate() -> tuple[Tensor, Any]:
            distribution = self._distribution(*inputs)
            ratio = torch.exp(distribution.log_prob(actions) - old_log_prob)
            return -(advantages * ratio).mean(), _joint(distribution)

        return surrogate

    def _update_critic(self) -> list[float]:
        value_losses = []
        actor_parameters = self.policy_optimizer.param_groups[0]["params"]
        for value_loss in self._value_losses():
            value_losses.append(value_loss.item())
            if not value_loss.isfinite():  # rewards whose squares overflow
                continue
            self.policy.optimizer.zero_grad()
            value_loss.backward()
            for p in (
                actor_parameters
            ):  # a shared features extractor is the policy step's: else the KL has no bound
                p.grad = None
            self.policy.optimizer.step()
        return value_losses

    def _value_losses(self) -> Iterator[Tensor]:
        for _ in range(self.n_critic_updates):
            for data in self.rollout_buffer.get(self.batch_size):
                values = self.policy.predict_values(data.observations).flatten()
                yield torch.nn.functional.mse_loss(values, data.returns)

    def _record(self, report: StepReport, value_losses: list[float]) -> None:
        buffer = self.rollout_buffer
        values = {
            **report.as_dict(),
            "policy_objective": -report.new_loss,
            "kl_divergence_loss": report.kl,
            "is_line_search_success": float(report.accepted),
            "explained_variance": explained_variance(
                buffer.values.flatten(), buffer.returns.flatten()
            ),
        }
        if value_losses:
            values["value_loss"] = np.mean(value_losses)
        if hasattr(self.policy, "log_std"):
            values["std"] = self.policy.log_std.exp().mean().item()
        for name, value in values.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "policy_optimizer"], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_is_being_loaded", "_sample"]

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto"
    ) -> None:
        """As in the base class.

        ``load`` also takes what sb3-contrib's TRPO saved, which has no policy optimizer.

        Raises:
            ValueError: names do not match, and ``exact_match`` is set. Nothing is set then.
        """
        params = load_path_or_dict
        if not isinstance(params, dict):
            _, params, _ = load_from_zip_file(params, device=device, load_data=False)
        assert params is not None
        if "policy_optimizer" not in params:
            if self._is_being_loaded:
                params = {**params, "policy_optimizer": self.policy_optimizer.state_dict()}
            elif exact_match:
                raise ValueError(
                    "the parameters have no policy_optimizer, as those of sb3-contrib's TRPO; "
                    "pass exact_match=False to keep the optimizer as it is, or use load()"
                )
        self._is_being_loaded = False
        super().set_parameters(params, exact_match, device)


class NPG(TRPO):
    """Natural policy gradient (Kakade 2001): :class:`~ngd_rl.TRPO` that takes the scaled step without a line search.

    Raises:
        ValueError: as for :class:`~ngd_rl.TRPO`.

    Examples:
        >>> from ngd_rl import NPG
        >>> agent = NPG("MlpPolicy", "CartPole-v1", n_steps=64).learn(64)
        >>> agent.policy_optimizer.last_step.backtracks
        0
    """

    def __init__(self, *args: Any, line_search_max_iter: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, line_search_max_iter=line_search_max_iter, **kwargs)


def evenly_spaced(count: int, every: float) -> Tensor:
    """Indices below ``count``."""
    return torch.arange(0, count, every, device="cpu").long()


def rows_of(observations: Any, index: Tensor) -> Any:
    """Some rows of observations, which may be a dict."""
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


def _joint(distribution: Distribution) -> Any:
    """The distribution of whole actions, one sample a row, in torch's terms."""
    inner = distribution.distribution
    if isinstance(inner, Normal | Bernoulli):
        return Independent(inner, 1)
    return inner


def _refuse_not_finite(what: str, values: Any, cause: Exception | None = None) -> None:
    arrays = values.values() if isinstance(values, dict) else [values]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"the environment returned a value that is not finite as {what}"
        ) from cause
