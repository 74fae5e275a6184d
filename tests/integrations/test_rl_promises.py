"""What Stable-Baselines3 and sb3-contrib promise of each algorithm, and test of their own."""

import io
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from helpers.agents import BOX, DICT, IMAGE, VECTOR, build, toy, values_of
from ngd_rl import CPO, NPG, TRPO, CPOReport, RecurrentTRPO, TRPOLagrangian
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from ngd_optim import StepReport

ALGORITHMS = [(TRPO, "MlpPolicy"), (NPG, "MlpPolicy"), (RecurrentTRPO, "MlpLstmPolicy")]
each_algorithm = pytest.mark.parametrize(("algorithm", "policy"), ALGORITHMS)


def same(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items())


def observations(model, n=20):
    space = deepcopy(model.observation_space)
    space.seed(0)
    return np.stack([space.sample() for _ in range(n)])


# Saving, loading, parameters


@each_algorithm
@pytest.mark.parametrize("place", ["path", "string", "buffer"])
def test_a_loaded_model_predicts_the_same_and_learns_on(algorithm, policy, place, tmp_path):
    model = build(algorithm, policy).learn(128)
    where = {"path": tmp_path / "model", "string": str(tmp_path / "model"), "buffer": io.BytesIO()}
    model.save(where[place])
    if place == "buffer":
        where[place].seek(0)
    x = observations(model)
    expected, _ = model.predict(x, deterministic=True)
    loaded = algorithm.load(where[place], env=toy(), device="cpu")
    assert loaded.num_timesteps == 128
    assert np.array_equal(loaded.predict(x, deterministic=True)[0], expected)
    before = values_of(loaded)
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256
    assert not same(before, values_of(loaded))


@each_algorithm
def test_what_set_parameters_refuses_and_what_it_sets(algorithm, policy):
    model = build(algorithm, policy).learn(128)
    original = deepcopy(model.get_parameters())
    before = values_of(model)
    with pytest.raises(ValueError, match="not_an_object"):
        model.set_parameters({**original, "not_an_object": "no state"}, exact_match=False)
    for missing in original:  # policy, policy.optimizer, policy_optimizer
        rest = {name: value for name, value in original.items() if name != missing}
        with pytest.raises(ValueError, match=missing.split(".")[0]):
            model.set_parameters(rest, exact_match=True)
        model.set_parameters(rest, exact_match=False)
    weights = original["policy"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters(
            {**original, "policy": dict(list(weights.items())[:-1])}, exact_match=True
        )
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.set_parameters(
            {**original, "policy": {**weights, "another": torch.zeros(1)}}, exact_match=True
        )
    assert same(before, values_of(model))
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    model.set_parameters({"policy": zeros}, exact_match=False)
    assert not any(p.any() for p in model.policy.parameters())
    model.set_parameters(original, exact_match=True)
    assert same(before, values_of(model))


def test_parameters_without_the_optimizer_of_the_policy(tmp_path):
    theirs = build(sb3_contrib.TRPO).learn(128)
    theirs.save(tmp_path / "theirs")
    model = build(seed=1).learn(128)
    damping = model.policy_optimizer.param_groups[0]["damping"]
    before = values_of(model)
    for parameters in (theirs.get_parameters(), tmp_path / "theirs"):
        with pytest.raises(ValueError, match=r"no policy_optimizer.*exact_match=False"):
            model.set_parameters(parameters)
        assert same(before, values_of(model))
        model.set_parameters(parameters, exact_match=False)
        assert same(values_of(theirs), values_of(model))
        model.policy.load_state_dict(before)
    assert model.policy_optimizer.param_groups[0]["damping"] == damping
    loaded = TRPO.load(tmp_path / "theirs", env=toy())
    with pytest.raises(ValueError, match="no policy_optimizer"):  # it is loaded once
        loaded.set_parameters(theirs.get_parameters())


def test_sb3_contrib_takes_the_policy_as_the_readme_says():
    model, theirs = build().learn(128), build(sb3_contrib.TRPO, seed=1)
    parameters = model.get_parameters()
    del parameters["policy_optimizer"]
    theirs.set_parameters(parameters)
    assert same(values_of(model), values_of(theirs))
    theirs.learn(128)


@pytest.mark.parametrize("algorithm", [TRPO, NPG])
def test_sb3_contrib_loads_a_file_without_the_optimizer(algorithm, tmp_path):
    model = build(algorithm).learn(128)
    model.save(tmp_path / "for both", exclude=iter(["policy_optimizer"]))
    theirs = sb3_contrib.TRPO.load(tmp_path / "for both", env=toy())
    assert same(values_of(model), values_of(theirs))
    assert theirs.target_kl == model.target_kl
    theirs.learn(128)
    ours = algorithm.load(tmp_path / "for both", env=toy())
    assert same(values_of(model), values_of(ours))
    ours.learn(128)
    theirs.save(tmp_path / "back")
    back = algorithm.load(tmp_path / "back", env=toy())
    assert same(values_of(back), values_of(theirs))
    model.save(tmp_path / "whole")  # excluding is for one file
    with pytest.raises(ValueError, match="policy_optimizer is an invalid object name"):
        sb3_contrib.TRPO.load(tmp_path / "whole")


def test_settings_change_when_a_model_is_loaded(tmp_path):
    build().learn(128).save(tmp_path / "model", exclude=["target_kl"], include=["learning_rate"])
    loaded = TRPO.load(tmp_path / "model", env=toy(), target_kl=0.5, n_critic_updates=1)
    assert (loaded.target_kl, loaded.n_critic_updates) == (0.5, 1)
    loaded.learn(128)
    with pytest.raises(ValueError, match="spaces do not match"):
        TRPO.load(tmp_path / "model", env=toy(action_space=spaces.Discrete(3)), target_kl=0.5)
    alone = TRPO.load(tmp_path / "model", target_kl=0.5)
    assert alone.predict(observations(alone))[0].shape == (20, 3)
    with pytest.raises(ValueError, match="policy kwargs"):
        TRPO.load(tmp_path / "model", policy_kwargs={"net_arch": [3]})


def test_the_policy_alone_is_saved_and_loaded(tmp_path):
    model = build().learn(128)
    model.policy.save(tmp_path / "policy.pt")
    policy = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    x = observations(model)
    assert np.array_equal(
        policy.predict(x, deterministic=True)[0], model.predict(x, deterministic=True)[0]
    )


@each_algorithm
def test_a_trained_policy_can_be_copied(algorithm, policy):
    model = build(algorithm, policy).learn(128)
    clone = deepcopy(model.policy)
    assert same(dict(clone.named_parameters()), values_of(model))


# Predicting


@each_algorithm
def test_predictions(algorithm, policy):
    model = build(algorithm, policy)
    x = observations(model)
    actions, _ = model.predict(x, deterministic=True)
    assert actions.shape == (20, 3)
    assert model.predict(x[0])[0].shape == (3,)
    assert all(model.action_space.contains(action) for action in actions)
    again, _ = model.predict(x, deterministic=True)
    assert np.array_equal(actions, again)
    first, second = (model.predict(x)[0] for _ in range(2))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.predict(np.zeros((2, 7), np.float32))
    means, _ = evaluate_policy(model, toy(n_envs=1), n_eval_episodes=2)
    assert np.isfinite(means)


# Options


@pytest.mark.parametrize(
    "settings",
    [
        {"n_steps": 2, "batch_size": 4},
        {"batch_size": 7},
        {"batch_size": 1_000},
        {"n_critic_updates": 0},
        {"learning_rate": LinearSchedule(1e-3, 1e-4, 1.0)},
        {"normalize_advantage": False},
        {"gamma": 0.5, "gae_lambda": 1.0},
        {"sub_sampling_factor": 4},
        {"line_search_max_iter": 2, "line_search_shrinking_factor": 0.5},
        {"rollout_buffer_class": RolloutBuffer},
        {"stats_window_size": 1},
        {"policy_kwargs": {"net_arch": []}},
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [4, 4]}, "ortho_init": False}},
        {"policy_kwargs": {"activation_fn": torch.nn.ReLU, "log_std_init": -1.0}},
        {"policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}},
        {"policy_kwargs": {"optimizer_class": torch.optim.AdamW}},
        {"policy_kwargs": {"features_extractor_class": FlattenExtractor}},
        {"policy_kwargs": {"share_features_extractor": False}},
        {"use_sde": True, "sde_sample_freq": 4},
        {"use_sde": True, "policy_kwargs": {"full_std": False, "use_expln": True}},
        {"use_sde": True, "policy_kwargs": {"squash_output": True}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_options(settings):
    model = build(**settings)
    start = values_of(model)
    model.learn(2 * model.n_steps * model.n_envs)
    report = model.policy_optimizer.last_step
    assert report.accepted, report
    assert 0 < report.kl <= model.target_kl * (1 + 1e-4)
    moved = {name for name, p in values_of(model).items() if not torch.equal(p, start[name])}
    assert any("action" in name for name in moved)
    assert any("value" in name for name in moved) == (model.n_critic_updates > 0)


@pytest.mark.parametrize(
    "actions", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), BOX]
)
@pytest.mark.parametrize(
    ("policy", "observed"),
    [("MlpPolicy", VECTOR), ("MlpPolicy", spaces.Discrete(4)), ("MultiInputPolicy", DICT)],
)
def test_spaces(policy, observed, actions):
    model = build(policy=policy, env=toy(observed, actions)).learn(128)
    assert model.policy_optimizer.last_step.accepted
    obs = model.env.reset()
    action, _ = model.predict(obs)
    model.env.step(action)


def test_discrete_actions_have_no_gsde():
    with pytest.raises(ValueError, match="continuous actions"):
        build(env=toy(action_space=spaces.Discrete(3)), use_sde=True)


def test_stacked_and_normalised_environments(tmp_path):
    env = VecNormalize(VecFrameStack(toy(IMAGE), 2), norm_obs=False)
    model = build(policy="CnnPolicy", env=env, n_steps=16)
    assert model.get_vec_normalize_env() is not None
    model.learn(32)
    assert model.policy_optimizer.last_step.accepted
    env = VecNormalize(toy(DICT), norm_obs_keys=["position"])
    model = build(policy="MultiInputPolicy", env=env).learn(256)
    assert model.policy_optimizer.last_step.accepted


# Running


@each_algorithm
def test_the_same_seed_gives_the_same_run(algorithm, policy):
    runs = [build(algorithm, policy, toy(), seed=3).learn(256) for _ in range(2)]
    assert same(*map(values_of, runs))
    assert runs[0].policy_optimizer.last_step == runs[1].policy_optimizer.last_step


class Counting(BaseCallback):
    def __init__(self):
        super().__init__()
        self.calls = []

    def _on_training_start(self):
        self.calls.append("start")

    def _on_rollout_start(self):
        self.calls.append("rollout")

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.calls.append("end of rollout")

    def _on_training_end(self):
        self.calls.append("end")


@each_algorithm
def test_callbacks(algorithm, policy, tmp_path):
    counting, evaluation = Counting(), EvalCallback(toy(n_envs=1), eval_freq=50, verbose=0)
    every = EveryNTimesteps(64, CheckpointCallback(1, str(tmp_path)))
    model = build(algorithm, policy)
    model.learn(256, callback=CallbackList([counting, evaluation, every]))
    assert counting.calls == ["start", *2 * ["rollout", "end of rollout"], "end"]
    assert np.isfinite(evaluation.last_mean_reward)
    saved = sorted(tmp_path.glob("rl_model_*.zip"))
    assert len(saved) >= 4
    algorithm.load(saved[0], env=toy()).learn(128)
    stopped = build(algorithm, policy)
    stopped.learn(10_000, callback=StopTrainingOnMaxEpisodes(3))
    assert stopped.num_timesteps < 500


class Setting(BaseCallback):
    """Changes settings after each rollout."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        vars(self.model).update(self.settings)


def test_settings_that_a_callback_changes():
    model = build()
    model.learn(128, callback=Setting(target_kl=1e-5, cg_damping=1.0, cg_max_steps=2))
    report = model.policy_optimizer.last_step
    assert 0 < report.kl <= 1e-5
    assert report.damping == 1.0
    assert report.cg_iters <= 2
    before = values_of(model)
    with pytest.raises(ValueError, match=r"target_kl must be above 0, got -1\.0"):
        model.learn(128, callback=Setting(target_kl=-1.0))
    assert same(before, values_of(model))


def test_an_actor_that_is_frozen():
    model = build()
    for name, p in model.policy.named_parameters():
        p.requires_grad_("value" in name)
    with pytest.raises(ValueError, match="no trainable parameter of the policy"):
        model.learn(128)


def test_what_is_logged(tmp_path):
    ours, theirs = build(), build(sb3_contrib.TRPO)
    for model in (ours, theirs):
        model.set_logger(configure(str(tmp_path / type(model).__module__), ["csv"]))
        model.learn(128, log_interval=2)  # nothing is dumped
        model.logger.close()
    names = {name for name in theirs.logger.name_to_value if name.startswith("train/")}
    assert names <= set(ours.logger.name_to_value)


def test_another_environment_with_as_many_copies(tmp_path):
    model = build().learn(128)
    model.set_env(toy())
    model.learn(128, reset_num_timesteps=False)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(toy(n_envs=3))
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=toy(n_envs=3)).learn(192)
    assert loaded.n_envs == 3
    assert loaded.policy_optimizer.last_step.accepted


@pytest.mark.parametrize("algorithm", [TRPO, CPO, TRPOLagrangian])
def test_all_that_is_logged_is_explained(algorithm):
    page = (Path(__file__).parents[2] / "docs" / "trpo.md").read_text()
    _, _, told = page.partition("## What is logged")
    explained = {*re.findall(r"`(\w+)`", told.partition("## Several")[0])}
    explained |= StepReport.__dataclass_fields__.keys() | CPOReport.__dataclass_fields__.keys()
    agent = build(algorithm).learn(128)
    logged = {
        name.removeprefix("train/")
        for name in agent.logger.name_to_value
        if name.startswith("train/")
    }
    assert {"kl", "policy_objective", "value_loss"} <= logged
    assert logged - explained == set()
