"""What every test module shares."""

from collections.abc import Iterator
from contextlib import nullcontext

import helpers.torchvision_schemas  # noqa: F401  (before anything that imports torchvision)
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tests make their tensors, such as cuda; else the CPU")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = request.config.getoption("--device")
    with torch.device(chosen) if chosen else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes share the machine, and sums come out the same on every run."""
    torch.set_num_threads(1)
