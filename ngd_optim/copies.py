"""What copies of an optimizer keep, beside what torch's optimizers keep."""

import copy
from typing import Any

from torch.optim import Optimizer


class CopiedInFull(Optimizer):
    """An optimizer whose copies keep ``generator`` and ``last_step``, and in this process ``process_group``."""

    generator: Any
    last_step: Any
    process_group: Any

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: all but hooks, as torch's optimizers have it, and the process group."""
        mine = {"generator": self.generator, "last_step": self.last_step}
        return {**super().__getstate__(), **mine}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in this process, and so with the same process group."""
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone.process_group = self.process_group
        return clone
