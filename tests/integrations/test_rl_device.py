"""Agents on a device that is not the CPU, which is pretended: it refuses to mix its tensors with the CPU's."""

import json
from typing import Any

import pytest
from helpers.pretended_agents import AGENTS
from helpers.scripts import run_python


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The device cannot be unregistered: a process of its own."""
    pytest.importorskip("torch.utils.backend_registration")
    return json.loads(run_python("-W", "ignore", "-m", "helpers.pretended_agents").splitlines()[-1])


@pytest.mark.parametrize("name", AGENTS)
def test_the_update_is_that_of_the_cpu(found: dict[str, Any], name: str) -> None:
    assert found[name]["accepted"]
    assert found[name]["difference"] == 0.0
