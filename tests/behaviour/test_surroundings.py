"""What a process may have set, and what must change nothing: default device, warnings, ``python -O``."""

from pathlib import Path

import pytest
import torch
from helpers import every_way
from helpers.scripts import run_python


@pytest.mark.parametrize("name", every_way.WAYS)
def test_another_default_device_changes_nothing(name):
    """What the library makes is where the parameters are, or on the CPU; "meta" tells what is not."""
    expected = every_way.train(name)
    torch.set_default_device("meta")
    try:
        assert every_way.train(name) == expected
    finally:
        torch.set_default_device(None)


def test_warnings_as_errors_and_asserts_left_out():
    """In a process of its own, where torch has warned of nothing yet."""
    script = Path(every_way.__file__)
    names = ["Fisher", "residuals", "cnn", "lstm", "transformer"]
    printed = run_python("-O", script, *names)
    assert [line.partition(" [")[0] for line in printed.splitlines()] == names
