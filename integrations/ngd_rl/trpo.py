"""TRPO with sb3-contrib's interface and NaturalCG's step."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
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
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal

from ngd_optim import NaturalCG
from ngd_rl.chain import Chain
from ngd_rl.critic import all_at_once, minibatches

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
        self._left_out: set[str] = set()
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
        self._followed = list(self.policy.parameters())
        self.policy_optimizer = NaturalCG(
            self._actor_parameters(), **{"damping": self.cg_damping, **self._settings()}
        )

    def _follow_policy(self) -> None:
        """Have the optimizers step what the policy has now: a part of it, or all of it, may have been replaced."""
        now, before = list(self.policy.parameters()), self._followed
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            return
        new, gone = {*now} - {*before}, {*before} - {*now}
        actor = {*self._actor_parameters()}
        _exchange(self.policy_optimizer, now, new & actor, gone | {*now} - actor)
        # A policy that came as a whole has brought its own optimizer.
        _exchange(self.policy.optimizer, now, new, gone)
        self._followed = now

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
        """The parameters that the action distribution depends on, frozen ones as well, which may be thawed."""
        self.policy.set_training_mode(False)
        parameters = [p for p in self.policy.parameters() if p.is_floating_point()]
        frozen = [p for p in parameters if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            distribution = self._distribution(*self._example_inputs())
            log_prob = distribution.log_prob(distribution.mode()).sum()
            if not log_prob.requires_grad:
                raise ValueError("the actions depend on no parameter of the policy")
            gradients = torch.autograd.grad(log_prob, parameters, allow_unused=True)
        finally:
            for p in frozen:
                p.requires_grad_(False)
        return [
            p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None
        ]

    @property
    def _actor(self) -> list[Tensor]:
        return self.policy_optimizer.param_groups[0]["params"]

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

    def _make_policy(self) -> Any:
        """A new one of the policy's class, as ``_setup_model`` of Stable-Baselines3 makes it."""
        return self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **self.policy_kwargs,
        ).to(self.device)

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
        if not any(p.requires_grad for p in self._actor):
            raise ValueError(
                "the actions depend on no trainable parameter of the policy; thaw some by "
                "requires_grad_(True)"
            )
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        with self._letting_go_of_graph():
            report = self._update_policy()
        value_losses = self._update_critic()
        self._n_updates += 1
        self._record(report, value_losses)

    @contextmanager
    def _letting_go_of_graph(self) -> Iterator[None]:
        """The policy keeps its last distribution: let that be one without a graph, or it cannot be copied."""
        kept = getattr(self.policy, "action_dist", None)
        before = {**vars(kept)} if isinstance(kept, Distribution) else {}
        yield
        if before:
            vars(kept).clear()
            vars(kept).update(before)
        if not before or _holds_graph(self.policy):
            self.policy.set_training_mode(False)
            with torch.no_grad():
                self._distribution(*self._example_inputs())
            self.policy.set_training_mode(True)

    def _update_policy(self) -> Any:
        data = self._rollout()
        samples = self._samples(data, every=self.sub_sampling_factor)
        self.policy_optimizer.param_groups[0].update(self._settings())
        self.policy_optimizer.step(
            self._closure(samples), curvature_closure=self._curvature_closure(data)
        )
        report = self.policy_optimizer.last_step
        assert report is not None
        return report

    def _rollout(self) -> Any:
        """The rollout, shuffled, or where all of it is used in the memory of the buffer, whose order means nothing."""
        buffer = self.rollout_buffer
        is_whole = self.sub_sampling_factor == 1 and self.curvature_fraction == 1
        if not (is_whole and type(buffer) is RolloutBuffer):
            return next(buffer.get(batch_size=None))
        next(buffer.get(batch_size=1))  # lays samples out in rows, and draws as many random numbers
        actions = buffer.actions.astype(np.float32, copy=False)
        columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        arrays = (buffer.observations, actions, *(column.ravel() for column in columns))
        return RolloutBufferSamples(*(buffer.to_torch(array, copy=False) for array in arrays))

    def _curvature_closure(self, data: Any) -> Closure | None:
        """What the products are formed on, if that is a part of the samples."""
        if self.curvature_fraction == 1:
            return None
        every = self.sub_sampling_factor / self.curvature_fraction
        return self._closure(self._samples(data, every))

    def _samples(self, data: Any, every: float) -> Samples:
        """A part of the rollout, whose rows the buffer has shuffled, or all of it."""
        if every == 1:
            columns = (data.actions, data.old_log_prob, data.advantages)
            return Samples((data.observations,), *columns)
        index = evenly_spaced(len(data.actions), every)
        inputs = (rows_of(data.observations, index),)
        return Samples(
            inputs, data.actions[index], data.old_log_prob[index], data.advantages[index]
        )

    def _closure(self, samples: Samples) -> Closure:
        """The surrogate objective, negated, with the distribution of the actions."""
        advantages = samples.advantages
        if self.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return self._surrogate(samples, -advantages)

    def _surrogate(self, samples: Samples, weights: Tensor) -> Closure:
        """The mean of the weights times new ÷ old probability, with the distribution of the actions."""
        inputs, actions, old_log_prob, _ = samples
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()

        def surrogate() -> tuple[Tensor, Any]:
            distribution = self._distribution(*inputs)
            ratio = torch.exp(distribution.log_prob(actions) - old_log_prob)
            return (weights * ratio).mean(), _joint(distribution)

        return surrogate

    def _update_critic(self) -> list[float]:
        return self._fit_values(self.policy, self.rollout_buffer)

    def _fit_values(self, critic: Any, buffer: RolloutBuffer) -> list[float]:
        """Have a policy's values follow the returns in a buffer; the losses."""
        value_losses = []
        stepped = [p for group in critic.optimizer.param_groups for p in group["params"]]
        with all_at_once(critic.optimizer):
            for value_loss in self._value_losses(critic, buffer):
                value_losses.append(value_loss.item())
                if not math.isfinite(value_losses[-1]):  # rewards whose squares overflow
                    continue
                for p in stepped:
                    p.grad = None
                value_loss.backward()
                # A shared features extractor is the policy step's: else the KL has no bound.
                for p in self._actor:
                    p.grad = None
                critic.optimizer.step()
        return value_losses

    def _value_losses(self, critic: Any, buffer: RolloutBuffer) -> Iterator[Any]:
        chain = Chain.of(critic)
        batches = minibatches(buffer, self.batch_size, self.n_critic_updates)
        for observations, returns in batches:
            if chain is not None:
                yield chain.loss(observations, returns)
            else:
                values = critic.predict_values(observations).flatten()
                yield torch.nn.functional.mse_loss(values, returns)

    def _record(self, report: Any, value_losses: list[float]) -> None:
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
        return [
            *super()._excluded_save_params(),
            "_is_being_loaded",
            "_followed",
            "_left_out",
            "_sample",
        ]

    def save(
        self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """As in the base class.

        ``exclude=["policy_optimizer"]`` writes a file that ``sb3_contrib.TRPO.load`` takes too.
        """
        self._left_out = {*(exclude or ())}
        try:
            super().save(path, self._left_out, include)
        finally:
            self._left_out = set()

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As in the base class."""
        self._follow_policy()
        found = super().get_parameters()
        left_out = self._left_out
        return {k: v for k, v in found.items() if not {k, k.split(".")[0]} & left_out}

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
        self._follow_policy()
        own = super().get_parameters()
        # What sb3-contrib's TRPO does not have.
        missing = own.keys() - params.keys() - {"policy", "policy.optimizer"}
        if missing and self._is_being_loaded:
            params = {**params, **{name: own[name] for name in missing}}
        elif missing and exact_match:
            raise ValueError(
                f"the parameters have no {', '.join(sorted(missing))}, as those of sb3-contrib's "
                "TRPO; pass exact_match=False to keep what is there, or use load()"
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


def _exchange(
    optimizer: torch.optim.Optimizer,
    now: Sequence[Tensor],
    new: Set[Tensor],
    gone: Set[Tensor],
) -> None:
    """Give an optimizer new parameters, in the order that they have in ``now``, and take those away that are gone."""
    for i, group in enumerate(optimizer.param_groups):
        held = {*group["params"]} - gone | (new if i == 0 else frozenset())
        others = [p for p in group["params"] if p in held - {*now}]
        group["params"] = [p for p in now if p in held] + others
    for p in gone & optimizer.state.keys():
        del optimizer.state[p]


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


def _holds_graph(policy: torch.nn.Module) -> bool:
    """Whether a module keeps what it computed, with the graph that leads there."""
    values = (value for module in policy.modules() for value in vars(module).values())
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in values)


def _refuse_not_finite(what: str, values: Any, cause: Exception | None = None) -> None:
    arrays = values.values() if isinstance(values, dict) else [values]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"the environment returned a value that is not finite as {what}"
        ) from cause
