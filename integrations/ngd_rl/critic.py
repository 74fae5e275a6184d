"""Fitting values to returns: what sb3-contrib computes, bit for bit, with less around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

_SMALL = 2**18
"""Of so many parameters at most, an operation on all of them at once takes less time than one on each."""


def minibatches(buffer: Any, batch_size: int, epochs: int) -> Iterator[tuple[Any, Tensor]]:
    """Observations and returns of a rollout that was looked at before, in the batches of ``buffer.get``.

    That converts all that it has, for each batch.
    """
    if type(buffer) is not RolloutBuffer or not buffer.generator_ready:
        for _ in range(epochs):
            for data in buffer.get(batch_size):
                yield data.observations, data.returns
        return
    observations = buffer.to_torch(buffer.observations, copy=False)
    returns = buffer.to_torch(buffer.returns.ravel(), copy=False)
    for _ in range(epochs):
        drawn = np.random.permutation(len(returns))  # noqa: NPY002  (as the buffer draws)
        order = torch.from_numpy(drawn).to(returns.device)
        for rows in order.split(batch_size):
            yield observations[rows], returns[rows]


@contextmanager
def all_at_once(optimizer: Any) -> Iterator[None]:
    """Have an optimizer of torch step small parameters on the CPU together, which gives the same bits."""
    groups = [group for group in optimizer.param_groups if _are_small(group)]
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = None


def _are_small(group: dict[str, Any]) -> bool:
    is_free = group.get("foreach", False) is None and not group.get("fused")
    parameters = group["params"]
    return (
        is_free
        and all(p.device.type == "cpu" and not p.is_complex() for p in parameters)
        and sum(p.numel() for p in parameters) <= _SMALL
    )
