"""torch's own table of optimizers, which drives its generic optimizer tests."""

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import Mock, patch

_INTERNAL = "torch.testing._internal"


class _Stub(ModuleType):
    """Has every name; what the table takes from there only decorates torch's own test classes."""

    _TestParametrizer = object

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Mock(name=name)


def load_optimizer_table() -> dict[str, Any]:
    """The ``OptimizerInfo`` of each of torch's optimizers, by its name.

    The modules that the table imports need 2.5 seconds and a package of their own, freeze ``torch.backends`` and load
    another profile of hypothesis. So stubs stand in for them.
    """
    names = [
        f"{_INTERNAL}.common_{part}" for part in ("device_type", "methods_invocations", "utils")
    ]
    with patch.dict(sys.modules, {name: _Stub(name) for name in names}):
        table = importlib.import_module(f"{_INTERNAL}.common_optimizers")
    return {info.name: info for info in table.optim_db}
