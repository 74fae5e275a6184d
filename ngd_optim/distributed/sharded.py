"""Modules that ``fully_shard`` has made (FSDP2): their weights, whole on every rank while a step is taken."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ngd_optim.layout import is_spread, zeros_spread_like
from ngd_optim.torch_internals import (
    begin_fsdp,
    casting_only,
    fsdp_groups_of,
    fsdp_states,
    whole_weight_of,
)


class ShardedModules:
    """What ``fully_shard`` has made of the modules with some parameters.

    As a context manager it gathers all their weights, which the modules then compute with: neither
    a forward nor a backward pass communicates, and what averages gradients does not run. At its end
    the weights are given up. What is written to them counts only if it is written to the shards.

    Args:
        params: an optimizer's.

    Attributes:
        group: the process group over which the data are spread; None if there are no such modules.

    Raises:
        ValueError: they are on different meshes, or on another one than ``process_group``; or their
            shards are offloaded to the CPU.
    """

    def __init__(self, params: Sequence[Tensor], process_group: Any = None) -> None:
        self.group: Any = None
        self._states: list[Any] = []
        self._weights: dict[int, Any] = {}
        self._open = ExitStack()
        ours = {id(p) for p in params if is_spread(p)}
        if not ours:
            return
        self._tops, self._states = _find_states(ours)
        groups = [group for state in self._states for group in fsdp_groups_of(state)]
        found = [
            (group.mesh_info.mesh, one)
            for group in groups
            for one in group.fsdp_params
            if id(one.sharded_param) in ours
        ]
        if not found:
            return
        mesh, _ = found[0]
        if any(other != mesh for other, _ in found):
            raise ValueError(
                "the parameters are sharded over different meshes; call fully_shard with the same mesh "
                "on all modules that one optimizer is for"
            )
        if any(one.offload_to_cpu for _, one in found):
            raise ValueError(
                "the shards are offloaded to the CPU, where a step's vectors would have to be too; call "
                "fully_shard without CPUOffloadPolicy"
            )
        self._weights = {id(one.sharded_param): one for _, one in found}
        self.group = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
        if process_group is not None and process_group != self.group:
            raise ValueError(
                "process_group is not that of the mesh over which fully_shard has spread the parameters; "
                "leave it out, and it is found"
            )

    def __bool__(self) -> bool:
        return self.group is not None

    def weight(self, p: Tensor) -> Tensor:
        """What the modules compute with, for a parameter: all of it, while the context lasts."""
        one = self._weights.get(id(p))
        return p if one is None else whole_weight_of(one)

    def has_whole(self, p: Tensor) -> bool:
        """Whether a layer computes with all of a parameter on this rank, as it does not in tensor parallel."""
        one = self._weights.get(id(p))
        return not (is_spread(p) if one is None else one.is_dtensor)

    def __enter__(self) -> "ShardedModules":
        with ExitStack() as stack:
            for state in self._tops:
                begin_fsdp(state)
            for state in self._states:
                stack.enter_context(casting_only(state))
                for group in fsdp_groups_of(state):
                    group.reshard()  # what a run for evaluation has left may be of older weights
                    stack.callback(group.reshard)
                    group.unshard()
                    group.wait_for_unshard()
            for one in self._weights.values():
                self._stand_in(one.sharded_param.grad, whole_weight_of(one))
                stack.callback(setattr, whole_weight_of(one), "grad", None)
            self._open = stack.pop_all()
        return self

    @staticmethod
    def _stand_in(gradient: Tensor | None, weight: Tensor) -> None:
        """Give a weight zeros for the gradient of its parameter, so that one sees whether they are cleared."""
        if gradient is not None:
            weight.grad = zeros_spread_like(weight, weight.dtype)

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _find_states(ours: set[int]) -> tuple[list[Any], list[Any]]:
    """The states of outermost modules with some of these parameters, and of all modules inside of them.

    Weights that are frozen, or another optimizer's, are in the same modules.
    """
    states = fsdp_states()
    own = [{id(m) for m in state._modules} for state in states]
    below = [{id(m) for top in state._modules for m in top.modules()} for state in states]
    tops: list[Any] = []
    inside: list[Any] = []
    for i, top in enumerate(states):
        if any(j != i and own[i] <= below[j] for j in range(len(states))):
            continue
        parts = [state for state, ids in zip(states, own, strict=True) if ids <= below[i]]
        groups = [group for state in parts for group in fsdp_groups_of(state)]
        if any(id(one.sharded_param) in ours for group in groups for one in group.fsdp_params):
            tops.append(top)
            inside += parts
    return tops, inside
