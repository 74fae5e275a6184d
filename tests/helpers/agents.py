"""Toy environments, and agents that are small enough for tests."""

import copy

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from ngd_rl import TRPO, RecurrentTRPO
from stable_baselines3.common.vec_env import DummyVecEnv

VECTOR = spaces.Box(-1.0, 1.0, (5,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
DICT = spaces.Dict({"position": VECTOR, "kind": spaces.Discrete(3)})
BOX = spaces.Box(-1.0, 1.0, (3,))


class Toy(gym.Env):
    """Random observations; a reward for actions near a fixed one, whose size costs; eight steps in the mean."""

    def __init__(self, observation_space=VECTOR, action_space=BOX, reward=1.0, observation=None):
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self._reward, self._observation = reward, observation

    def _observe(self):
        return self.observation_space.sample() if self._observation is None else self._observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self._observe(), {}

    def step(self, action):
        distance = np.abs(np.asarray(action, dtype=float) - 1.0).mean()
        return (
            self._observe(),
            self._reward * (1.0 - distance),
            bool(self.np_random.random() < 1 / 8),
            False,
            {"cost": float(np.square(np.asarray(action, dtype=float)).mean())},
        )


def toy(*args, n_envs=2, **kwargs):
    env = DummyVecEnv([lambda: Toy(*args, **kwargs)] * n_envs)
    env.seed(0)
    return env


def build(algorithm=TRPO, policy="MlpPolicy", env=None, **kwargs):
    settings = {
        "n_steps": 64,
        "batch_size": kwargs.get("n_steps", 64),
        "n_critic_updates": 2,
        "seed": 0,
    }
    if algorithm is RecurrentTRPO:
        kwargs["policy_kwargs"] = {"lstm_hidden_size": 16, **kwargs.get("policy_kwargs", {})}
    return algorithm(policy, toy() if env is None else env, device="cpu", **{**settings, **kwargs})


def values_of(model):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}
