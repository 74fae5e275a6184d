"""A step on a device that is not the CPU: the same numbers, no tensor left behind, and few waits of the host."""

import json
import math
from typing import Any

import pytest
from helpers.pretended_device import SCENARIOS
from helpers.scripts import run_python

MOST_READS = 12
MORE_WHERE_FACTORS_ARE_RENEWED = 2
MOST_READS_ON_STREAMS = 1
MORE_WHERE_FACTORS_OF_STREAMS_ARE_RENEWED = 5
ROUNDING = {"convolutions": 1e-5}
"""Where other kernels run: the device has no memory layout of its own."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The device cannot be unregistered: a process of its own."""
    pytest.importorskip("torch.utils.backend_registration")
    return json.loads(run_python("-W", "ignore", "-m", "helpers.pretended_device").splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_steps_are_those_of_the_cpu(found: dict[str, Any], name: str) -> None:
    assert found[name].get("error") is None
    assert found[name]["moved"]
    assert found[name]["difference"] <= ROUNDING.get(name, 0.0)


STREAMS = [name for name in SCENARIOS if name.startswith("stream")]


@pytest.mark.parametrize("name", STREAMS)
def test_the_host_waits_once_on_streams(found: dict[str, Any], name: str) -> None:
    steps = list(zip(found[name]["reads"], found[name]["renewed"], strict=True))
    assert {renewed for _, renewed in steps} == {True, False}
    for reads, renewed in steps:
        most = MOST_READS_ON_STREAMS + MORE_WHERE_FACTORS_OF_STREAMS_ARE_RENEWED * renewed
        assert 0 < sum(reads.values()) <= most


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in STREAMS])
def test_the_host_waits_rarely(found: dict[str, Any], name: str) -> None:
    # The first step also checks the closure.
    for reads, iterations in list(
        zip(found[name]["reads"], found[name]["iterations"], strict=True)
    )[1:]:
        per_trial = max(n for line, n in reads.items() if "there.loss" in line)
        if (
            not iterations
        ):  # a direct solver, which reads the same lines for each damping that it tries
            dampings = next(n for line, n in reads.items() if line.startswith("step/trust_region"))
            assert len(reads) <= MOST_READS
            assert max(reads.values()) <= dampings
            continue
        in_solve = sum(n for line, n in reads.items() if line.startswith(("linalg/", "solvers/")))
        assert in_solve <= math.ceil(iterations / 8) + 7
        renews = any("kronecker/sampling" in line for line in reads)
        most = MOST_READS + MORE_WHERE_FACTORS_ARE_RENEWED * renews
        assert sum(reads.values()) - (per_trial - 1) <= most
