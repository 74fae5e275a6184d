"""What both optimizers do as torch's do, and a little more: groups that are checked, copies, saved states."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngd_optim.shown import show
from ngd_optim.state import (
    give_memory,
    join_keys,
    keep_precision,
    refuse_complex_for_real,
)


class SavedInFull(Optimizer):
    """An optimizer whose copies keep its generator and reports, and whose states keep their precision.

    Copies in this process keep the ``process_group`` as well.
    """

    generator: Any
    last_step: Any
    process_group: Any

    def __init__(
        self, params: Any, defaults: dict[str, Any], generator: Any, process_group: Any
    ) -> None:
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {show(generator)}")
        self.generator = generator
        self.process_group = process_group
        super().__init__(params, defaults)

    @property
    def _everything(self) -> list[Tensor]:
        """All parameters, frozen ones as well."""
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: all but hooks, as torch's optimizers have it, and the process group."""
        kept = ("generator", "last_step", "history")
        mine = {name: self.__dict__[name] for name in kept if name in self.__dict__}
        return {**super().__getstate__(), **mine}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in this process, and so with the same process group."""
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone.process_group = self.process_group
        return clone

    def state_dict(self) -> dict[str, Any]:
        """Settings and state, which are tensors and numbers."""
        has_gradients = any(p.requires_grad and p.grad is not None for p in self._everything)
        if not self.state and has_gradients:
            # torch.distributed.checkpoint makes no state where it finds gradients, and then loads none.
            self._complete_state()
        saved = super().state_dict()
        return {**saved, "state": give_memory(saved["state"])}

    def _complete_state(self) -> None:
        """Give the state all entries that can occur, empty, before the first step."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the settings and the state that :meth:`state_dict` gave.

        Settings that this version of NaturalCG has, and the one that saved did not have, have their
        defaults. What is not finite is dropped, with a warning.

        Raises:
            ValueError: it is the state of another optimizer, or of other parameters.
        """
        final: dict[str, Any] = {}

        def see(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            final.update(loaded, state=join_keys(loaded["state"]))
            saved = (i for group in final["param_groups"] for i in group["params"])
            pairs = zip(self._everything, saved, strict=False)
            refuse_complex_for_real({p: final["state"].get(i) for p, i in pairs})
            return final

        # The last hook sees what the user's leave.
        handle = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = [i for group in final["param_groups"] for i in group["params"]]
        entries = {
            p: final["state"].get(i, {}) for p, i in zip(self._everything, saved, strict=True)
        }
        keep_precision(self.state, entries)

    def _add_if(self, check: Callable[[dict[str, Any]], None], group: dict[str, Any]) -> None:
        """Add a group, or none where the check refuses it."""
        super().add_param_group(group)
        try:
            check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
