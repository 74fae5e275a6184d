"""What copies of an optimizer keep, beside what torch's optimizers keep."""

import copy
from typing import Any

from torch.optim import Optimizer


class CopiedInFull(Optimizer):
    """An optimizer whose copies keep its generator and reports, and in this process ``process_group``."""

    generator: Any
    last_step: Any
    process_group: Any

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
