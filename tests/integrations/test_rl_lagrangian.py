"""TRPOLagrangian: its price by hand, its step beside TRPO's, and what it learns where the optimum is known."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.agents import build, toy, values_of
from ngd_rl import CPO, TRPO, TRPOLagrangian
from scipy.optimize import linprog
from stable_baselines3.common.env_util import make_vec_env


def collect(agent):
    _, callback = agent._setup_learn(10**6)
    torch.manual_seed(1)  # more critics have drawn more
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)


def train(agent):
    np.random.seed(0)  # noqa: NPY002  # the buffer shuffles with it
    before = values_of(agent)
    agent.train()
    return torch.cat([(p - before[n]).flatten() for n, p in values_of(agent).items()])


@pytest.mark.parametrize(
    ("cost", "limit", "gain", "before", "after"),
    [
        (30.0, 20.0, 0.0, 0.0, 0.1 / 3),
        (30.0, 20.0, 0.0, 2.0, 2.0 + 0.1 / 3),
        (30.0, 20.0, 0.5, 2.0, 2.0 + 0.6 / 3),
        (5.0, 20.0, 0.0, 0.5, 0.5 - 0.1 * 0.75),
        (5.0, 20.0, 1.0, 0.5, 0.0),
        (5.0, 20.0, 0.0, 0.05, 0.0),
        (0.0, 0.0, 0.5, 0.5, 0.5),
        (1e9, 0.0, 0.0, 0.5, 0.6),
        (-5.0, 1.0, 0.0, 2.0, 2.0 - 0.1 * 6 / 5),
    ],
)
def test_the_price_is_that_by_hand(cost, limit, gain, before, after):
    agent = build(
        TRPOLagrangian,
        cost_limit=limit,
        multiplier=before,
        multiplier_lr=0.1,
        multiplier_gain=gain,
    )
    collect(agent)
    agent.episode_cost = cost
    train(agent)
    assert agent.multiplier == pytest.approx(after)
    log = agent.logger.name_to_value
    assert log["train/multiplier"] == agent.multiplier
    assert (log["train/cost"], log["train/cost_limit"]) == (cost, limit)
    assert log["train/kl"] <= agent.target_kl


SETTINGS = {"n_steps": 256, "n_critic_updates": 0, "cg_max_steps": 100, "cg_tol": 1e-6}


def test_what_costs_nothing_is_trpos_step():
    steps = []
    for algorithm, more in ((TRPOLagrangian, {"cost_limit": 1e6}), (TRPO, {})):
        agent = build(algorithm, **SETTINGS, **more)
        collect(agent)
        steps.append(train(agent))
    assert (steps[0] - steps[1]).norm() <= 1e-3 * steps[1].norm()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_is_that_for_rewards_less_their_price(normalize):
    """Standardised advantages (A − ν C), whatever the unit of rewards and costs."""
    steps = []
    for algorithm in (TRPOLagrangian, TRPO):
        more = (
            {"multiplier": 0.7, "multiplier_lr": 0.0, "multiplier_gain": 0.0}
            if algorithm is TRPOLagrangian
            else {}
        )
        agent = build(
            TRPOLagrangian if more else CPO, normalize_advantage=normalize, **SETTINGS, **more
        )
        collect(agent)
        buffer, costs = agent.rollout_buffer, agent.cost_buffer
        if more:
            buffer.advantages, costs.advantages = 1e3 * buffer.advantages, 1e-2 * costs.advantages
        else:  # by TRPO's own update
            A, C = ((a - a.mean()) / a.std() for a in (buffer.advantages, costs.advantages))
            buffer.advantages = (A - 0.7 * C) / 1.7
            agent._update_policy = lambda agent=agent: TRPO._update_policy(agent)
            agent._record = lambda *_: None
        steps.append(train(agent))
    assert steps[1].norm() > 0
    assert (steps[0] - steps[1]).norm() <= 1e-3 * steps[1].norm()


def test_saved_and_loaded_agent_continues_exactly(tmp_path):
    agent = build(TRPOLagrangian, cost_limit=1.0, multiplier_lr=0.3).learn(256)
    assert agent.multiplier > 0
    agent.save(tmp_path / "agent")
    loaded = TRPOLagrangian.load(tmp_path / "agent", env=toy(), device="cpu")
    assert (loaded.multiplier, loaded.multiplier_lr) == (agent.multiplier, 0.3)
    agent.set_env(toy())
    for either in (agent, loaded):
        either.set_random_seed(1)
        either.learn(256, reset_num_timesteps=True)
    assert agent.multiplier == loaded.multiplier
    for part in ("policy", "cost_critic"):
        for p, q in zip(*(getattr(a, part).parameters() for a in (agent, loaded)), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost_limit": -1.0}, "cost_limit must be a finite number, at least 0, got -1.0"),
        ({"multiplier": -0.1}, "multiplier must be a finite number, at least 0"),
        ({"multiplier_lr": math.inf}, "multiplier_lr must be a finite number, at least 0"),
        ({"cost_gamma": 2}, "cost_gamma must be between 0 and 1"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(TRPOLagrangian, **settings)


def test_options_that_cpo_has_not():
    agent = build(
        TRPOLagrangian, adapt_damping=True, warm_start=0.9, preconditioner="kfac", cost_limit=3.0
    )
    agent.learn(256)
    report = agent.policy_optimizer.last_step
    assert report.accepted
    assert report.preconditioner == "kfac"


PAY, COST = np.array([0.0, 2.0, 3.0]), np.array([0.0, 1.0, 4.0])


class Choices(gym.Env):
    """Ten choices of three things: with probabilities p they pay ``10 PAY · p`` and cost ``10 COST · p``."""

    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._time = 0
        return 0, {}

    def step(self, action):
        self._time += 1
        return 0, float(PAY[action]), self._time == 10, False, {"cost": float(COST[action])}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [5.0, 25.0])
def test_the_optimum_of_a_linear_program(limit):
    best = linprog(
        -10 * PAY, A_ub=10 * COST.reshape(1, -1), b_ub=[limit], A_eq=np.ones((1, 3)), b_eq=[1.0]
    )
    agent = build(
        TRPOLagrangian,
        env=make_vec_env(Choices, n_envs=50, seed=0),
        cost_limit=limit,
        multiplier=1.0,  # from 0 it passes a certain policy, whose samples are all alike
        cost_gamma=1.0,
        gamma=1.0,
        n_steps=20,
        batch_size=250,
        target_kl=0.01,
        cg_damping=1e-3,
        n_critic_updates=4,
        policy_kwargs={"net_arch": [16]},
    )
    found = []
    for _ in range(100):
        agent.learn(1000, reset_num_timesteps=False)
        with torch.no_grad():
            found.append(agent.policy.get_distribution(torch.zeros(1)).distribution.probs.numpy())
    mean = np.mean(found[-40:], axis=0).ravel()
    assert 10 * COST @ mean == pytest.approx(limit, rel=0.15)
    assert 10 * PAY @ mean == pytest.approx(-best.fun, rel=0.1)
