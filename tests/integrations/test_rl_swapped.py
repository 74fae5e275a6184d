"""Policies whose parts are replaced, frozen or thawed: what sb3-contrib's TRPO moves then, moves here."""

import pytest
import sb3_contrib
import torch
from helpers.agents import IMAGE, build, toy, values_of
from ngd_rl import TRPO, RecurrentTRPO
from torch import nn


def new_head(agent):
    agent.policy.action_net = nn.Linear(64, 3)


def head_of_two_layers(agent):
    agent.policy.action_net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))


def new_first_layer(agent):
    agent.policy.mlp_extractor.policy_net[0] = nn.Linear(5, 64)


def new_log_std(agent):
    agent.policy.log_std = nn.Parameter(torch.full((3,), -0.5))


def more_layers(agent):
    agent.policy.mlp_extractor.policy_net.append(nn.Linear(64, 64))


def fewer_layers(agent):
    del agent.policy.mlp_extractor.policy_net[2:]


def new_extractor(agent):
    agent.policy.mlp_extractor = build(seed=5).policy.mlp_extractor


def new_policy(agent):
    agent.policy = build(type(agent), seed=5).policy


def new_value_net(agent):
    agent.policy.value_net = nn.Linear(64, 1)


def frozen(agent):
    agent.policy.mlp_extractor.policy_net.requires_grad_(False)


SWAPS = [
    new_head,
    head_of_two_layers,
    new_first_layer,
    new_log_std,
    more_layers,
    fewer_layers,
    new_extractor,
    new_policy,
    new_value_net,
    frozen,
]


def moved(agent, steps=128):
    """The names of the parameters that learning moves."""
    before = values_of(agent)
    agent.learn(steps, reset_num_timesteps=False)
    return {name for name, p in values_of(agent).items() if not torch.equal(p, before[name])}


def swapped(algorithm, swap, *, after_a_step, **settings):
    agent = build(algorithm, **settings)
    if after_a_step:
        agent.learn(128)
    torch.manual_seed(3)
    swap(agent)
    return agent


@pytest.mark.parametrize("after_a_step", [True, False])
@pytest.mark.parametrize("swap", SWAPS[:-1])
def test_what_moves_is_what_moves_with_sb3_contrib(swap, after_a_step):
    theirs, ours = (
        moved(swapped(algorithm, swap, after_a_step=after_a_step))
        for algorithm in (sb3_contrib.TRPO, TRPO)
    )
    if swap in (new_value_net, new_extractor):
        # sb3-contrib's optimizer of the critic keeps the parts that are gone.
        theirs |= {name for name in ours if "value" in name}
    assert theirs == ours
    assert any("value_net" in name for name in ours)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    "settings",
    [{"warm_start": 0.9, "adapt_damping": True}, {"preconditioner": "kfac"}],
    ids=str,
)
def test_the_optimizers_hold_what_the_policy_has_and_nothing_else(swap, settings):
    agent = swapped(TRPO, swap, after_a_step=True, **settings)
    moved(agent)
    assert agent.policy_optimizer.last_step.accepted
    has = {*agent.policy.parameters()}
    for optimizer in (agent.policy_optimizer, agent.policy.optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len({*held}) == len(held)
        assert {*held} <= has
        assert {*optimizer.state} <= {*held}
    assert {*agent.policy.optimizer.param_groups[0]["params"]} == has


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("through", ["parameters", "file"])
def test_parameters_are_taken_and_given_right_after_a_swap(swap, through, tmp_path):
    """Before the next update, and from an agent that was swapped alike."""
    one = swapped(TRPO, swap, after_a_step=True, warm_start=0.9)
    other = swapped(TRPO, swap, after_a_step=False, warm_start=0.9)
    moved(one)
    if through == "file":
        one.save(tmp_path / "model")
        other.set_parameters(tmp_path / "model")
    else:
        other.set_parameters(one.get_parameters())
    assert all(torch.equal(p, values_of(one)[name]) for name, p in values_of(other).items())
    saved, loaded = (agent.policy_optimizer.state_dict()["state"] for agent in (one, other))
    assert saved.keys() == loaded.keys()
    for i, entry in saved.items():
        torch.testing.assert_close(dict(entry), dict(loaded[i]))
    assert moved(other)


@pytest.mark.parametrize("swap", [new_head, new_first_layer, new_value_net, frozen])
def test_a_swapped_agent_is_saved_and_loaded(swap, tmp_path):
    agent = swapped(TRPO, swap, after_a_step=True)
    agent.save(tmp_path / "before the next update")
    moved(agent)
    agent.save(tmp_path / "after it")
    for name in ("before the next update", "after it"):
        loaded = TRPO.load(tmp_path / name, env=toy())
        assert moved(loaded)
        assert loaded.policy_optimizer.last_step.accepted


def test_what_is_frozen_stays_and_the_rest_moves():
    """sb3-contrib's TRPO raises a RuntimeError of autograd's."""
    agent = build(sb3_contrib.TRPO)
    frozen(agent)
    with pytest.raises(RuntimeError, match="does not require grad"):
        agent.learn(128)
    agent = swapped(TRPO, frozen, after_a_step=False)
    names = {name for name, _ in agent.policy.named_parameters()}
    assert moved(agent) == {name for name in names if "policy_net" not in name}


def test_a_policy_that_is_frozen_at_the_start_and_thawed():
    small = {"features_extractor_kwargs": {"features_dim": 8}}
    settings = {"policy": "CnnPolicy", "n_steps": 16, "policy_kwargs": small}
    agent = build(env=toy(IMAGE), **settings)
    agent.policy.features_extractor.requires_grad_(False)
    before = moved(agent, 32)
    assert not any("features_extractor" in name for name in before)
    state = {p: entry["solution"] for p, entry in agent.policy_optimizer.state.items()}
    assert state
    agent.policy.features_extractor.requires_grad_(True)
    after = moved(agent, 32)
    assert {name for name in after - before if "features_extractor" in name} == {
        name for name, _ in agent.policy.named_parameters() if name.startswith("features_extractor")
    }
    everything = build(env=toy(IMAGE), **settings)
    assert moved(everything, 32) == after


def test_an_actor_that_is_frozen_at_the_start_can_be_thawed():
    agent = build()
    agent.policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*requires_grad_\(True\)"):
        agent.learn(128)
    agent.policy.requires_grad_(True)
    assert "action_net.weight" in moved(agent)


def test_flags_of_frozen_parameters_stay():
    agent = build()
    frozen(agent)
    flags = [p.requires_grad for p in agent.policy.parameters()]
    new_head(agent)
    agent.learn(128)
    assert [p.requires_grad for p in agent.policy.parameters()] == flags


def test_an_lstm_policy_with_a_new_head():
    agent = build(RecurrentTRPO, "MlpLstmPolicy").learn(128)
    agent.policy.action_net = nn.Linear(64, 3)
    assert "action_net.weight" in moved(agent)


def test_an_optimizer_of_the_users_keeps_its_groups():
    agent = build()
    head, body = agent.policy.value_net, agent.policy.mlp_extractor.value_net
    agent.policy.optimizer = torch.optim.Adam(
        [{"params": head.parameters(), "lr": 1e-3}, {"params": body.parameters(), "lr": 1e-4}]
    )
    agent.learn(128)
    agent.policy.mlp_extractor.value_net[0] = nn.Linear(5, 64)
    assert {"mlp_extractor.value_net.0.weight", "value_net.weight"} <= moved(agent)
    first, second = agent.policy.optimizer.param_groups
    assert {*head.parameters()} <= {*first["params"]}
    assert {*body[2].parameters()} == {*second["params"]}
