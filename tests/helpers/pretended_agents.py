"""Agents of ngd_rl whose policies, critics and rollouts live on the pretended device.

    python -m helpers.pretended_agents

trains each once on the CPU and once there, on the same rollout, and prints how much the parameters differ as JSON.
"""

import json
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ngd_rl import CPO, TRPO

from helpers.agents import BOX, build, toy
from helpers.pretended_device import NAME, Factories, OnDevice, register, to_device

AGENTS: dict[str, tuple[Any, spaces.Space, dict[str, Any]]] = {
    "trpo": (TRPO, BOX, {"curvature_fraction": 0.5, "sub_sampling_factor": 2}),
    "discrete": (TRPO, spaces.Discrete(3), {}),
    "cpo": (CPO, BOX, {"cost_limit": 3.0}),
}


def move(agent: Any) -> None:
    """To the device, as ``device="cuda"`` has it from the start."""
    agent.device = torch.device(NAME, 0)
    for name in {"policy", "cost_critic"} & vars(agent).keys():
        part = to_device(getattr(agent, name))
        part.optimizer = torch.optim.Adam(part.parameters(), lr=1e-3, eps=1e-5)
        setattr(agent, name, part)
    for name in {"rollout_buffer", "cost_buffer"} & vars(agent).keys():
        getattr(agent, name).device = agent.device


def train(name: str, *, there: bool) -> Any:
    """An agent after one update."""
    algorithm, actions, settings = AGENTS[name]
    agent = build(algorithm, env=toy(action_space=actions), **settings)
    _, callback = agent._setup_learn(10**6)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    if there:
        move(agent)
    np.random.seed(0)  # noqa: NPY002  # the buffer shuffles with it
    agent.train()
    return agent


def compare(name: str) -> dict[str, Any]:
    """The same update on the CPU and on the device."""
    here, there = (train(name, there=where) for where in (False, True))
    pairs = list(zip(here.policy.parameters(), there.policy.parameters(), strict=True))
    assert all(isinstance(q, OnDevice) for _, q in pairs)
    return {
        "accepted": bool(here.logger.name_to_value["train/accepted"]),
        "difference": max((p - q.held).abs().max().item() for p, q in pairs),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    register()
    with Factories():
        print(json.dumps({name: compare(name) for name in AGENTS}))
