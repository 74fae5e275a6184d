"""Comparison of what optimizers save."""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path


def assert_same_state(a: Any, b: Any) -> None:
    """The two state dicts have the same entries, bit for bit."""
    leaves, other_leaves = (
        sorted(tree_flatten_with_path(state)[0], key=lambda leaf: str(leaf[0])) for state in (a, b)
    )
    assert [path for path, _ in leaves] == [path for path, _ in other_leaves] != []
    for (path, x), (_, y) in zip(leaves, other_leaves, strict=True):
        same = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or (x != x and y != y)
        assert same, (path, x, y)  # also NaN, a number that is not known yet
