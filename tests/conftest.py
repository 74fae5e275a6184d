"""What every test module shares."""

import helpers.torchvision_schemas  # noqa: F401  (before anything that imports torchvision)
import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes share the machine, and sums come out the same on every run."""
    torch.set_num_threads(1)
