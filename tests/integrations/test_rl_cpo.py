"""CPO: its step against SciPy and dense matrices, its costs by hand, and what it learns where the optimum is known."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.agents import BOX, DICT, IMAGE, VECTOR, Toy, build, toy, values_of
from ngd_rl import CPO, TRPO
from ngd_rl.constrained import solve_constrained
from scipy.optimize import linprog, minimize
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch.autograd import grad


def collect(agent):
    """Fill the rollout buffers, as ``learn`` does before it trains."""
    _, callback = agent._setup_learn(10**6)
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)


def train(agent, seed=0):
    np.random.seed(seed)  # noqa: NPY002  # the buffer shuffles with it
    agent.train()
    return agent.last_step


# The step in closed form


def by_scipy(A, g, b, c, delta):
    """The step by sequential quadratic programming, from several starts."""
    inside = {"type": "ineq", "fun": lambda d: delta - 0.5 * d @ A @ d, "jac": lambda d: -A @ d}
    allowed = {"type": "ineq", "fun": lambda d: -(b @ d + c), "jac": lambda d: -b}
    y = np.linalg.solve(A, b)
    feasible = c <= math.sqrt(2 * delta * (b @ y))
    objective, constraints = (g, [inside, allowed]) if feasible else (b, [inside])
    start = -y * (c / (b @ y)) if c > 0 and feasible else np.zeros_like(g)
    found = minimize(
        lambda d: objective @ d,
        start,
        jac=lambda d: objective,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x, feasible


def random_problem(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    M = rng.normal(size=(n, n))
    A = M @ M.T + 0.3 * np.eye(n)
    g, b = rng.normal(size=(2, n))
    if seed % 5 == 0:
        b = g + 0.05 * b  # reward and cost rise together
    delta = 10 ** rng.uniform(-2, 0)
    reach = math.sqrt(2 * delta * (b @ np.linalg.solve(A, b)))  # the most that bᵀd can be
    return A, g, b, rng.uniform(-1.5, 1.5) * reach, delta


def closed_form(A, g, b, c, delta):
    x, y = np.linalg.solve(A, g), np.linalg.solve(A, b)
    step = solve_constrained(g @ x, g @ y, b @ y, c, delta)
    return step, step.along_g * x + step.along_b * y


def test_the_step_is_the_one_that_scipy_finds():
    cases = set()
    for seed in range(300):
        A, g, b, c, delta = random_problem(seed)
        step, d = closed_form(A, g, b, c, delta)
        true, feasible = by_scipy(A, g, b, c, delta)
        assert (step.case == "recovery") == (not feasible)
        assert 0.5 * d @ A @ d == pytest.approx(delta, rel=1e-9)
        objective = g if feasible else b
        size = math.sqrt(2 * delta * (objective @ np.linalg.solve(A, objective)))
        assert objective @ d == pytest.approx(objective @ true, abs=2e-5 * size), seed
        if feasible:
            assert b @ d + c <= 1e-9
        if step.case == "active":  # Karush, Kuhn and Tucker: g + ν b = −λ A d, with λ, ν ≥ 0
            lagrangian = g + step.multiplier * b
            scale = -(lagrangian @ d) / (2 * delta)
            assert step.multiplier >= 0
            np.testing.assert_allclose(lagrangian, -scale * (A @ d), atol=1e-8)
        cases.add((step.case, c > 0))
    assert cases == {
        ("free", False), ("free", True), ("active", False), ("active", True), ("recovery", True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("q", "r", "s", "c", "case", "along"),
    [
        (0.0, 0.0, 2.0, -1.0, "free", (0.0, 0.0)),  # nothing to gain
        (0.0, 0.0, 2.0, 0.1, "active", (0.0, -0.05)),
        (2.0, 0.0, 0.0, 1.0, "free", (-1.0, 0.0)),  # nothing changes the constraint
        (2.0, -2.0, 2.0, 0.0, "active", (0.0, 0.0)),  # all that is gained costs as much
        (2.0, -2.0, 2.0, -1.0, "active", (0.0, 0.5)),
        (2.0, 2.0, 2.0, 1.0, "free", (-1.0, 0.0)),  # what is gained lowers the cost
        (2.0, -2.0, 2.0, 1.0, "active", (0.0, -0.5)),
        (2.0, 0.0, 2.0, 3.0, "recovery", (0.0, -1.0)),
        (2.0, 0.0, 2.0, 2.0, "active", (0.0, -1.0)),  # it is just within reach
    ],
)
def test_degenerate_steps(q, r, s, c, case, along):
    step = solve_constrained(q, r, s, c, delta=1.0)
    assert step.case == case
    assert (step.along_g, step.along_b) == pytest.approx(along, abs=1e-7)
    assert not math.isnan(step.multiplier)


# One update


@pytest.mark.parametrize("case", ["free", "active", "recovery"])
@pytest.mark.parametrize("settings", [{}, {"curvature_fraction": 0.5}])
def test_one_update_is_that_of_the_dense_matrix(case, settings):
    agent = build(
        CPO,
        n_steps=256,
        n_critic_updates=0,
        cg_max_steps=100,
        cg_tol=1e-5,
        policy_kwargs={"net_arch": [4]},
        **settings,
    )
    collect(agent)
    share = {"free": 100.0, "active": 0.98, "recovery": 0.1}[case]
    limit = agent.cost_limit = share * agent.episode_cost
    data, costs = copy.copy(agent.rollout_buffer), copy.copy(agent.cost_buffer)
    old = copy.deepcopy(agent.policy)
    report = train(agent)

    np.random.seed(0)  # noqa: NPY002  # the same order
    samples, cost_samples = next(data.get()), next(costs.get())
    model = old
    parameters = [p for p in model.parameters() if p.requires_grad]
    observations = samples.observations[:: int(1 / settings.get("curvature_fraction", 1))]
    with torch.no_grad():
        before = copy.copy(model.get_distribution(observations))
    kl = kl_divergence(before, model.get_distribution(observations)).sum(1).mean()
    actor = [
        p
        for p, g in zip(
            parameters, grad(kl, parameters, create_graph=True, allow_unused=True), strict=True
        )
        if g is not None
    ]
    flat = torch.cat([g.flatten() for g in grad(kl, actor, create_graph=True)])
    F = torch.stack(
        [torch.cat([h.flatten() for h in grad(e, actor, retain_graph=True)]) for e in flat]
    ).double()

    def gradient(data, weights):
        distribution = model.get_distribution(data.observations)
        ratio = (distribution.log_prob(data.actions) - data.old_log_prob).exp()
        return torch.cat([g.flatten() for g in grad((weights * ratio).mean(), actor)]).double()

    advantages = samples.advantages
    g = -gradient(samples, (advantages - advantages.mean()) / advantages.std())
    b = gradient(cost_samples, cost_samples.advantages - cost_samples.advantages.mean())
    A = F + agent.cg_damping * torch.eye(len(F), dtype=torch.float64)
    c = (report.cost - limit) / agent.episode_length
    step, d = closed_form(*(v.detach().numpy() for v in (A, g, b)), c, agent.target_kl)

    names = {
        name for name, p in agent.policy.named_parameters() if any(p is q for q in agent._actor)
    }
    after, start = values_of(agent), dict(old.named_parameters())
    moved = torch.cat(
        [(after[name].double() - start[name].double()).flatten() for name in after if name in names]
    )
    assert report.accepted
    assert report.case == step.case == case
    assert report.multiplier == pytest.approx(step.multiplier, rel=1e-3)
    expected = torch.from_numpy(d) * report.step_scale
    assert (moved - expected).norm() <= 1e-3 * expected.norm()
    assert report.kl <= agent.target_kl


def test_a_free_step_is_that_of_trpo():
    steps = []
    for algorithm, settings in ((CPO, {"cost_limit": 1e6}), (TRPO, {})):
        agent = build(
            algorithm, n_steps=256, n_critic_updates=0, cg_max_steps=100, cg_tol=1e-6, **settings
        )
        _, callback = agent._setup_learn(10**6)
        torch.manual_seed(1)  # CPO has initialised one more critic
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
        before = values_of(agent)
        np.random.seed(0)  # noqa: NPY002  # the buffer shuffles with it
        agent.train()
        steps.append(torch.cat([(p - before[n]).flatten() for n, p in values_of(agent).items()]))
        last = agent.last_step if algorithm is CPO else agent.policy_optimizer.last_step
        steps[-1] /= 0.8**last.backtracks
    assert (steps[0] - steps[1]).norm() <= 1e-3 * steps[1].norm()


# The costs


class Steps(gym.Env):
    """Costs 1, 2, 3, … for the steps of an episode, which ends after as many as it is told, or is cut off."""

    observation_space = spaces.Box(0.0, 100.0, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length=5, *, cut_off=False):
        self._length, self._cut_off = length, cut_off

    def _observe(self):
        return np.array([self._time], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._time = 0
        return self._observe(), {}

    def step(self, action):
        self._time += 1
        done = self._time == self._length
        info = {"cost": np.float32(self._time)}
        return self._observe(), 0.0, done and not self._cut_off, done and self._cut_off, info


def test_costs_of_episodes_that_go_on_from_one_rollout_to_the_next():
    env = DummyVecEnv([lambda: Steps(5), lambda: Steps(7), lambda: Steps(100)])
    agent = build(CPO, env=env, n_steps=4)
    _, callback = agent._setup_learn(10**6)
    found = []
    for _ in range(4):
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
        found.append((agent.episode_cost, agent.episode_length))
    assert found == [
        (10.0, 4.0),  # none has ended: 1 + 2 + 3 + 4
        ((15 + 28) / 2, 6.0),
        (15.0, 5.0),
        ((15 + 28) / 2, 6.0),
    ]
    agent.env.reset()
    agent.learn(12, reset_num_timesteps=True)
    assert (agent.episode_cost, agent.episode_length) == ((15 + 28) / 2, 6.0)  # the last known


@pytest.mark.parametrize("cut_off", [False, True])
def test_advantages_of_costs_are_those_by_hand(cut_off):
    env = DummyVecEnv([lambda: Steps(3, cut_off=cut_off)])
    agent = build(CPO, env=env, n_steps=7, batch_size=7, cost_gamma=0.9, cost_gae_lambda=0.5)
    collect(agent)
    buffer = agent.cost_buffer

    def value(time):
        with torch.no_grad():
            return agent.cost_critic.predict_values(torch.tensor([[float(time)]])).item()

    times = np.array([0, 1, 2, 0, 1, 2, 0])
    advantages, following = np.zeros(7), 0.0
    for t in reversed(range(7)):
        ends = times[t] == 2
        after = value(times[t] + 1) if not ends or cut_off else 0.0
        error = times[t] + 1 + 0.9 * after - value(times[t])
        following = error + 0.9 * 0.5 * following * (not ends)
        advantages[t] = following
    np.testing.assert_allclose(buffer.advantages[:, 0], advantages, rtol=1e-4)
    np.testing.assert_allclose(
        buffer.returns[:, 0], advantages + [value(time) for time in times], rtol=1e-4
    )
    assert not np.allclose(agent.rollout_buffer.advantages, buffer.advantages)


def test_the_cost_critic_learns_the_costs_and_the_other_the_rewards():
    agent = build(CPO, env=DummyVecEnv([lambda: Steps(3)]), n_steps=96, n_critic_updates=30)
    for _ in range(6):
        collect(agent)
        agent.train()
    with torch.no_grad():
        x = torch.tensor([[0.0], [1.0], [2.0]])
        costs, rewards = agent.cost_critic.predict_values(x), agent.policy.predict_values(x)
    true = torch.tensor([[1 + 0.99 * (2 + 0.99 * 3)], [2 + 0.99 * 3], [3.0]])
    torch.testing.assert_close(costs, true, rtol=0.1, atol=0)
    assert rewards.abs().max() < 0.5
    assert agent.logger.name_to_value["train/cost_explained_variance"] > 0.9


class Costs(gym.Wrapper):
    """Puts a cost into the info."""

    def __init__(self, env, cost):
        super().__init__(env)
        self._cost = cost

    def step(self, action):
        *rest, info = super().step(action)
        info.pop("cost", None)
        return *rest, info | self._cost


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({}, 'the info of a step has no "cost"; have the environment, or a wrapper'),
        ({"cost": math.nan}, "the environment returned a cost that is not finite, nan"),
        ({"cost": math.inf}, "the environment returned a cost that is not finite, inf"),
        ({"cost": None}, "the cost in the info of a step must be one number, got None"),
        ({"cost": [0.1, 0.2]}, "the cost in the info of a step must be one number"),
    ],
)
def test_costs_that_are_missing_or_not_finite(cost, message):
    agent = build(CPO, env=DummyVecEnv([lambda: Costs(Toy(), cost)]))
    before = values_of(agent)
    with pytest.raises(ValueError, match=message):
        agent.learn(64)
    assert all(torch.equal(p, before[name]) for name, p in values_of(agent).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost_limit": math.nan}, "cost_limit must be a finite number, got nan"),
        ({"cost_gamma": 1.5}, "cost_gamma must be between 0 and 1"),
        ({"cost_gae_lambda": -1}, "cost_gae_lambda must be between 0 and 1"),
        ({"adapt_damping": True}, "adapt_damping must be False for CPO, got True"),
        ({"warm_start": 0.9}, "warm_start must be 0 for CPO"),
        ({"preconditioner": "kfac"}, "preconditioner must be None or a function for CPO"),
        ({"target_kl": 0.0}, "target_kl must be above 0"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(CPO, **settings)


# Runs


@pytest.mark.parametrize(
    ("policy", "observed", "actions"),
    [
        ("MlpPolicy", VECTOR, BOX),
        ("MlpPolicy", spaces.Discrete(4), spaces.Discrete(3)),
        ("MlpPolicy", VECTOR, spaces.MultiDiscrete([2, 3])),
        ("CnnPolicy", IMAGE, spaces.MultiBinary(3)),
        ("MultiInputPolicy", DICT, BOX),
    ],
)
def test_policies_and_spaces(policy, observed, actions):
    small = {"features_extractor_kwargs": {"features_dim": 8}} if observed is IMAGE else {}
    agent = build(CPO, policy, toy(observed, actions), n_steps=16, policy_kwargs=small)
    agent.cost_limit = 1.0
    agent.learn(64)
    report = agent.last_step
    assert report.accepted, report.reason
    assert 0 < report.kl <= agent.target_kl


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sde": True},
        {"sub_sampling_factor": 2},
        {"curvature_fraction": 0.5},
        {"line_search_max_iter": 0},
        {"preconditioner": lambda r: 2 * r},
        {"backend": "torch.func"},
        {"normalize_advantage": False},
        {"policy_kwargs": {"share_features_extractor": False}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options(settings):
    agent = build(CPO, cost_limit=3.0, **settings).learn(256)
    assert agent.last_step.accepted, agent.last_step.reason
    assert agent.last_step.kl > 0


@pytest.mark.parametrize("algorithm", [CPO, TRPO])
def test_environments_in_processes_of_their_own_give_the_same_run(algorithm):
    agents = []
    for env in (SubprocVecEnv([Toy, Toy], start_method="fork"), DummyVecEnv([Toy, Toy])):
        env.seed(0)
        agents.append(build(algorithm, env=VecNormalize(env)).learn(256))
        env.close()
    one, other = map(values_of, agents)
    for name, p in one.items():
        torch.testing.assert_close(p, other[name], rtol=1e-3, atol=1e-4)
    if algorithm is CPO:
        assert agents[0].last_step.cost == pytest.approx(agents[1].last_step.cost, rel=1e-4)


def test_what_is_logged_and_reported():
    agent = build(CPO, cost_limit=3.0, target_kl=0.05)
    agent.learn(256, log_interval=100)
    log, report = agent.logger.name_to_value, agent.last_step
    assert {f"train/{name}" for name in report.as_dict()} <= log.keys()
    assert {f"train/{name}" for name in ("value_loss", "cost_value_loss", "std")} <= log.keys()
    assert log["train/cost"] == report.cost == agent.episode_cost
    assert log["train/kl_divergence_loss"] == report.kl
    assert report.cost_limit == 3.0


def test_saved_and_loaded_agent_continues_exactly(tmp_path):
    agent = build(CPO, cost_limit=3.0, cost_gamma=0.9).learn(256)
    agent.save(tmp_path / "agent")
    loaded = CPO.load(tmp_path / "agent", env=toy(), device="cpu")
    assert (loaded.cost_limit, loaded.cost_gamma) == (3.0, 0.9)
    assert loaded.episode_cost == agent.episode_cost
    agent.set_env(toy())
    for either in (agent, loaded):
        either.set_random_seed(1)
        either.learn(256, reset_num_timesteps=True)
    assert agent.last_step == loaded.last_step
    for part in ("policy", "cost_critic"):
        for p, q in zip(*(getattr(a, part).parameters() for a in (agent, loaded)), strict=True):
            assert torch.equal(p, q)


def test_an_agent_of_trpo_goes_on_as_one_of_cpo(tmp_path):
    trpo = build(TRPO).learn(128)
    trpo.save(tmp_path / "agent")
    agent = CPO.load(tmp_path / "agent", env=toy(), cost_limit=3.0)
    assert all(torch.equal(p, values_of(trpo)[name]) for name, p in values_of(agent).items())
    assert agent.learn(128).last_step.accepted
    with pytest.raises(ValueError, match=r"no cost_critic, cost_critic.optimizer.*exact_match"):
        agent.set_parameters(trpo.get_parameters())
    agent.save(tmp_path / "back", exclude=["policy_optimizer", "cost_critic"])
    TRPO.load(tmp_path / "back", env=toy()).learn(128)


@pytest.mark.parametrize("what", ["reward", "cost", "product", "trial"])
def test_a_solution_that_is_not_finite_is_reported_and_the_run_goes_on(what, monkeypatch, caplog):
    agent = build(CPO, cost_limit=3.0, n_critic_updates=0)
    collect(agent)
    before = values_of(agent)
    with monkeypatch.context() as patch:
        if what == "reward":
            agent.rollout_buffer.advantages[3] = np.nan
        elif what == "cost":
            agent.cost_buffer.advantages[3] = np.inf
        elif what == "product":
            agent.cg_damping = 1e38
            agent.cost_buffer.advantages *= 1e30
        else:
            patch.setattr(
                "ngd_optim.Linearization.measure", lambda self: (math.inf, None), raising=True
            )
        report = train(agent)
    assert not report.accepted
    assert "not finite" in report.reason
    assert "a policy update was rejected" in caplog.text
    assert all(torch.equal(p, before[name]) for name, p in values_of(agent).items())
    assert (report.kl, report.step_scale, report.new_loss) == pytest.approx(
        (0.0, 0.0, report.loss), nan_ok=True
    )
    agent.cg_damping = 0.1
    agent.learn(128, reset_num_timesteps=False)
    assert agent.last_step.accepted, agent.last_step.reason


def test_an_update_that_raises_has_moved_nothing(monkeypatch):
    agent = build(CPO, cost_limit=3.0)
    collect(agent)
    before = values_of(agent)

    def interrupt(self):
        assert not torch.equal(values_of(agent)["action_net.weight"], before["action_net.weight"])
        raise KeyboardInterrupt

    monkeypatch.setattr("ngd_optim.Linearization.measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.train()
    assert all(torch.equal(p, before[name]) for name, p in values_of(agent).items())


def test_kl_and_surrogates_keep_their_bounds():
    agent = build(CPO, cost_limit=3.5, n_steps=128, target_kl=0.03)
    cases = set()
    for _ in range(6):
        collect(agent)
        report = train(agent)
        assert report.kl <= agent.target_kl
        excess = report.cost - report.cost_limit
        assert report.cost_change <= max(-excess, 0.0) + 1e-6
        assert excess > 0 or report.new_loss <= report.loss
        cases.add(report.case)
    assert len(cases) >= 2


# What is learnt

PAY = np.array([[0.0, 2.0, 3.0], [0.0, 1.0, 1.5]])
COST = np.array([[0.0, 1.0, 4.0], [0.0, 0.2, 3.0]])


class Choices(gym.Env):
    """Ten choices of three things, which pay and cost what two states make of them.

    With p the probabilities in both states, which come equally often, an episode pays
    ``5 Σ PAY · p`` and costs ``5 Σ COST · p``: the best policy is the solution of a linear program, and random.
    """

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._time, self._state = 0, int(self.np_random.integers(2))
        return self._state, {}

    def step(self, action):
        pay, cost = PAY[self._state, action], COST[self._state, action]
        self._time, self._state = self._time + 1, int(self.np_random.integers(2))
        return self._state, float(pay), self._time == 10, False, {"cost": float(cost)}


def probabilities(agent):
    with torch.no_grad():
        return agent.policy.get_distribution(torch.arange(2)).distribution.probs.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3.0, 15.0])
def test_the_optimum_of_a_linear_program(limit):
    one = np.kron(np.eye(2), np.ones((1, 3)))
    best = linprog(
        -5 * PAY.ravel(), A_ub=5 * COST.reshape(1, -1), b_ub=[limit], A_eq=one, b_eq=np.ones(2)
    )
    agent = build(
        CPO,
        env=make_vec_env(Choices, n_envs=50, seed=0),
        cost_limit=limit,
        cost_gamma=1.0,
        gamma=1.0,
        n_steps=20,
        batch_size=250,
        target_kl=0.05,
        cg_damping=1e-3,
        n_critic_updates=4,
        policy_kwargs={"net_arch": [16]},
    ).learn(1000 * 40)
    found = probabilities(agent)
    pays, costs = (5 * (table * found).sum() for table in (PAY, COST))
    assert costs == pytest.approx(limit, rel=0.1)
    assert pays == pytest.approx(-best.fun, rel=0.06)
    # The best policy is a mixture in one state, and certain in the other.
    assert np.abs(found - best.x.reshape(2, 3)).max() < 0.15


class Left(gym.Wrapper):
    """It costs 1 to be right of the middle."""

    def step(self, action):
        observation, *rest, info = super().step(action)
        return observation, *rest, {**info, "cost": float(observation[0] > 0)}


@pytest.mark.slow
def test_cart_pole_is_balanced_where_that_costs_little():
    agent = CPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=4, seed=0, wrapper_class=Left),
        cost_limit=20.0,
        n_steps=512,
        batch_size=512,
        cg_damping=1e-3,
        gae_lambda=0.98,
        n_critic_updates=20,
        seed=0,
        device="cpu",
    )
    costs = []
    while agent.num_timesteps < 120_000:
        agent.learn(2048, reset_num_timesteps=False)
        costs.append(agent.last_step.cost)
    env = make_vec_env("CartPole-v1", seed=100, wrapper_class=Left)
    mean_return, _ = evaluate_policy(agent, env, n_eval_episodes=20, deterministic=False)
    assert mean_return >= 400
    assert np.mean(costs[-10:]) <= 25
