"""What every test module shares."""

import helpers.torchvision_schemas  # noqa: F401  (before anything that imports torchvision)
import pytest
import torch

from ngd_optim.linearization import checks as verify


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by forward mode where that works, as for tensors that are larger than those of the tests."""
    monkeypatch.setattr(verify, "_SMALL", 0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes share the machine, and sums come out the same on every run."""
    torch.set_num_threads(1)
