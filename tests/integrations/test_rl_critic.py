"""The critic is fitted bit for bit as sb3-contrib fits it."""

from typing import Any

import numpy as np
import pytest
import torch
from ngd_rl import TRPO
from ngd_rl.chain import Chain
from ngd_rl.critic import all_at_once, minibatches
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor, nn

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"eps": 1e-5}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True}),
}


def agent(env: str = "Pendulum-v1", **settings: Any) -> TRPO:
    given = {"n_steps": 96, "batch_size": 40, "n_critic_updates": 3, "seed": 0, **settings}
    return TRPO("MlpPolicy", env, **given).learn(96)


def fit_as_the_base_class(model: TRPO) -> list[float]:
    losses = []
    for _ in range(model.n_critic_updates):
        for data in model.rollout_buffer.get(model.batch_size):
            values = model.policy.predict_values(data.observations).flatten()
            loss = nn.functional.mse_loss(data.returns, values)
            losses.append(loss.item())
            model.policy.optimizer.zero_grad()
            loss.backward()
            for p in model.policy_optimizer.param_groups[0]["params"]:
                p.grad = None
            model.policy.optimizer.step()
    return losses


def everything(model: TRPO) -> list[Any]:
    state = model.policy.optimizer.state_dict()
    tensors = [*model.policy.state_dict().values()]
    for entry in state["state"].values():
        tensors += [value for value in entry.values() if isinstance(value, Tensor)]
    return [state["param_groups"], *(t.tolist() for t in tensors)]


def both_ends(change: Any = None, env: str = "Pendulum-v1", **policy: Any) -> list[Any]:
    ends = []
    for fit in (TRPO._update_critic, fit_as_the_base_class):
        model = agent(env, policy_kwargs=policy)
        if change is not None:
            change(model.policy)
        set_random_seed(3)
        losses = fit(model)
        drawn = np.random.permutation(99).tolist()  # noqa: NPY002
        ends.append([losses, *everything(model), drawn])
    return ends


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_ends_bit_for_bit_where_the_plain_loop_ends(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    ours, plain = both_ends(optimizer_class=kind, optimizer_kwargs=options)
    assert ours == plain


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("layers", [[], [16], [64, 32, 8]])
def test_chains_are_differentiated_as_autograd_does(
    env: str, activation: Any, layers: list[int]
) -> None:
    policy = {"activation_fn": activation, "net_arch": layers}
    assert Chain.of(agent(env, policy_kwargs=policy).policy) is not None
    ours, plain = both_ends(env=env, **policy)
    assert ours == plain


def hook_on_a_module(policy: Any) -> None:
    policy.value_net.register_forward_hook(lambda module, given, result: 2 * result)


def hook_on_a_parameter(policy: Any) -> None:
    policy.value_net.weight.register_hook(lambda gradient: 2 * gradient)


def frozen(policy: Any) -> None:
    policy.value_net.bias.requires_grad_(False)


def reparametrised(policy: Any) -> None:
    nn.utils.parametrizations.orthogonal(policy.mlp_extractor.value_net[0])


def another_head(policy: Any) -> None:
    policy.value_net = nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 1))


def method_of_its_own(policy: Any) -> None:
    before = policy.predict_values
    policy.predict_values = lambda observations: 2 * before(observations)


MORE_THAN_A_CHAIN = [
    hook_on_a_module,
    hook_on_a_parameter,
    frozen,
    reparametrised,
    another_head,
    method_of_its_own,
]


@pytest.mark.parametrize("change", MORE_THAN_A_CHAIN)
def test_autograd_sees_to_what_is_more_than_a_chain(change: Any) -> None:
    model = agent()
    change(model.policy)
    assert Chain.of(model.policy) is None
    ours, plain = both_ends(change)
    assert ours == plain


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_batches_are_those_of_the_buffer(env: str) -> None:
    model = TRPO("MlpPolicy", env, n_steps=30, batch_size=30, seed=0).learn(30)
    buffer = model.rollout_buffer
    set_random_seed(1)
    ours = list(minibatches(buffer, 8, 2))
    set_random_seed(1)
    theirs = [data for _ in range(2) for data in buffer.get(8)]
    for (observations, returns), data in zip(ours, theirs, strict=True):
        assert torch.equal(observations, data.observations)
        assert torch.equal(returns, data.returns)


def test_the_choice_of_an_optimizer_is_left_as_it_was() -> None:
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    with all_at_once(adam):
        assert adam.param_groups[0]["foreach"] is True
    assert adam.param_groups[0]["foreach"] is None
    chosen = torch.optim.Adam(model.parameters(), foreach=False)
    with all_at_once(chosen):
        assert chosen.param_groups[0]["foreach"] is False
    large = torch.optim.Adam(nn.Linear(1024, 1024).parameters())
    with all_at_once(large):
        assert large.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("use_sde", [False, True])
def test_the_policy_can_be_copied_after_an_update(use_sde: bool) -> None:
    model = agent(use_sde=use_sde)
    kept = []
    forward = model.policy.get_distribution

    def keeping(observations: Any) -> Any:
        model.policy.seen = model.policy.extract_features(observations)  # has no graph
        model.policy.last = model.policy.mlp_extractor.forward_actor(model.policy.seen)
        kept.append(model.policy.last)
        return forward(observations)

    assert model.policy.action_dist.distribution.mean.grad_fn is None
    model.policy.get_distribution = keeping
    model.train()
    assert model.policy.last.grad_fn is None
    assert kept[0].grad_fn is not None
