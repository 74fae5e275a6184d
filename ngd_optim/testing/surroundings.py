"""Check without a trace: everything is as it was before, and what is logged is collected."""

import logging
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ngd_optim.autograd_graph import leaves
from ngd_optim.parameters import FlatParameters
from ngd_optim.torch_internals import keep_versions

logger = logging.getLogger("ngd_optim")

_SET_GRADIENT = vars(torch.Tensor.__base__)["grad"].__set__


class _Gradients(TorchFunctionMode):
    """Notes the ``.grad`` of each tensor before a ``backward``, or an assignment, changes it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        for tensor in tensors:
            self._note(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.backward, torch.autograd.backward):
            roots = args[0] if args else (kwargs or {}).get("tensors", ())
            for root in [roots] if isinstance(roots, Tensor) else roots:
                for leaf in leaves(root):
                    self._note(leaf)
        elif func == _SET_GRADIENT:
            self._note(args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        if id(tensor) not in self._before:
            gradient = tensor.grad if tensor.is_leaf else None
            kept = None if gradient is None else gradient.detach().clone()
            self._before[id(tensor)] = tensor, gradient, kept

    @torch.no_grad()
    def put_back(self) -> None:
        """Each ``.grad``: the same tensor with the same values."""
        for tensor, gradient, values in self._before.values():
            if gradient is not None and values is not None:
                gradient.copy_(values)
            if tensor.grad is not gradient:
                tensor.grad = gradient


@contextmanager
def nothing_changes(parameters: FlatParameters) -> Iterator[None]:
    """Have parameters, gradients and global random numbers put back; buffers are the traced closure's to rewind."""
    tensors, numpy = parameters.tensors, sys.modules.get("numpy")
    values = [p.detach().clone() for p in tensors]
    generators: list[tuple[Any, Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if parameters.device.type != "cpu":
        device = torch.get_device_module(parameters.device)
        generators.append((device.set_rng_state, device.get_rng_state()))
    generators.append((random.setstate, random.getstate()))
    if numpy is not None:
        generators.append((numpy.random.set_state, numpy.random.get_state()))
    gradients = _Gradients(tensors)
    try:
        with gradients:
            yield
    finally:
        with keep_versions(tensors), torch.no_grad():
            for p, value in zip(tensors, values, strict=True):
                p.requires_grad_(True)
                p.copy_(value)
        gradients.put_back()
        for put, state in generators:
            put(state)


class Listener(logging.Handler):
    """Collects what the library logs.

    Attributes:
        warnings: what is a reason to change something.
        notes: what is not.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message, once."""
        is_problem = record.levelno >= logging.WARNING and not hasattr(record, "nothing_is_wrong")
        kept = self.warnings if is_problem else self.notes
        if record.getMessage() not in kept:
            kept.append(record.getMessage())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the block, messages come here and nowhere else."""
        level, propagates, handlers = logger.level, logger.propagate, logger.handlers
        logger.handlers, logger.propagate = [self], False
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagates
            logger.setLevel(level)
