"""DistributedDataParallel modules: whose ranks take a step together, and what they leave to the step."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


def find_ddp_group(parameters: Sequence[Tensor]) -> Any:
    """That of a DistributedDataParallel module with some of these parameters; None if there is none."""
    ours = {id(p) for p in parameters}
    for thing in gc.get_objects():
        # Asking for __class__, as isinstance does, may have lazy objects of others do things.
        if issubclass(type(thing), nn.parallel.DistributedDataParallel) and any(
            id(p) in ours for p in thing.parameters()
        ):
            return thing.process_group
    return None


@contextmanager
def quiet_ddp(*, broadcast: bool) -> Iterator[None]:
    """Let DistributedDataParallel modules run the model and nothing else, and refuse other engines.

    NaturalCG averages the gradients itself, and what the modules prepare for that cannot be done
    inside torch.func.

    Args:
        broadcast: send rank 0's buffers to all ranks, where the modules would.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    found: dict[nn.parallel.DistributedDataParallel, tuple[bool, bool]] = {}

    def silence(module: nn.parallel.DistributedDataParallel) -> None:
        if module.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) counts on backward passes that "
                "NaturalCG does not run; use static_graph=False"
            )
        found.setdefault(
            module, (module.require_backward_grad_sync, module.require_forward_param_sync)
        )
        module.require_backward_grad_sync = False
        module.require_forward_param_sync &= broadcast

    try:
        with before_ddp_modules(silence), _before_modules(_older_fsdp(), _refuse):
            yield
    finally:
        for module, flags in found.items():
            module.require_backward_grad_sync, module.require_forward_param_sync = flags


@contextmanager
def before_ddp_modules(
    action: Callable[[nn.parallel.DistributedDataParallel], None],
) -> Iterator[None]:
    """Call a function with each such module that runs in the block, in this thread, before it does."""
    with _before_modules((nn.parallel.DistributedDataParallel,), action):
        yield


def _older_fsdp() -> tuple[type, ...]:
    module = sys.modules.get("torch.distributed.fsdp")
    return () if module is None else (module.FullyShardedDataParallel,)


def _refuse(module: nn.Module) -> None:
    raise RuntimeError(
        f"{type(module).__name__} keeps weights in a form that cannot be differentiated twice; use "
        "torch.distributed.fsdp.fully_shard"
    )


@contextmanager
def _before_modules(kinds: tuple[type, ...], action: Callable[[Any], None]) -> Iterator[None]:
    if not kinds:
        yield
        return
    here = get_ident()  # the hook sees the modules of all threads

    def hook(module: nn.Module, _: Any) -> None:
        if isinstance(module, kinds) and get_ident() == here:
            action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
