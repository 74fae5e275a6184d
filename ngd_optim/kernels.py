"""Kernels that can be differentiated twice and in forward mode, chosen for the thread that takes a step.

Most of torch's own switches hold for the whole process, where other threads see them, and may put
them back in another order.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Lock, local
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.lstm import lstm
from ngd_optim.torch_internals import FunctionMode, attend_by_products

AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps")


class WhileNeeded:
    """A switch of the whole process: who needs it first turns it, who needs it last puts it back.

    Nobody waits for another, so that threads may be ranks of one step, and steps may be nested.
    """

    def __init__(self, turned: Callable[[], AbstractContextManager[Any]]) -> None:
        self._turned = turned
        self._lock = Lock()
        self._count = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._stack.enter_context(self._turned())
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._stack.close()


@contextmanager
def _disabled(library: Any) -> Iterator[None]:
    # Its flags() also set TF32, which warns on machines that have none.
    before, library.enabled = library.enabled, False
    try:
        yield
    finally:
        library.enabled = before


_WITHOUT_CUDNN = WhileNeeded(lambda: _disabled(torch.backends.cudnn))
_UNCOMPILED = WhileNeeded(lambda: torch.compiler.set_stance("force_eager"))


class DifferentiableKernels(FunctionMode):
    """Has :func:`differentiable` functions called, also by what calls them in a function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DERIVATIVES:
            return differentiable(func)(*args, **(kwargs or {}))
        with self:  # for what is recomputed in it
            return _DERIVATIVES[func](*args, **(kwargs or {}))


def differentiable(function: Any) -> Any:
    """A torch function with kernels that have second derivatives and forward mode.

    The fused ones of attention and recurrent layers have none.
    """
    return _REPLACED.get(function, function)


def uncompiled() -> AbstractContextManager[Any]:
    """Have modules run uncompiled: compiled graphs hide their operations.

    Nobody has compiled anything if that is not imported, which takes a second.
    """
    return _UNCOMPILED if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Have no autocast in the block, of any kind of device: it would round a solve."""
    with ExitStack() as stack:
        for kind in AUTOCAST_KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class _Open(local):
    """The innermost block of :func:`twice_differentiable` in this thread, and whether it recomputes."""

    stack: ExitStack | None = None
    recomputes: bool = False


_OPEN = _Open()


@contextmanager
def twice_differentiable(*, recomputes: bool = False) -> Iterator[None]:
    """Have modules run uncompiled, where torch functions can be seen, and all but the closure without autocast.

    An autocast around it is for the closure alone: it would round the solve as well.

    Args:
        recomputes: see :func:`recompute_alike`.
    """
    before = _OPEN.stack, _OPEN.recomputes
    with ExitStack() as stack:
        stack.enter_context(without_autocast())
        stack.enter_context(uncompiled())
        try:
            _OPEN.stack = stack
            if recomputes:
                recompute_alike()
            yield
        finally:
            _OPEN.stack, _OPEN.recomputes = before


def recompute_alike() -> None:
    """Where a closure uses checkpointing, derivatives run parts of it again: with the same kernels, to the block's end.

    Not for other closures: each operation would take longer.
    """
    if _OPEN.stack is not None and not _OPEN.recomputes:
        _OPEN.stack.enter_context(DifferentiableKernels())
        _OPEN.recomputes = True


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` by matrix products and a softmax."""
    if query.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    kind = query.device.type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):  # as for the function as a whole
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = (_round(t, dtype) for t in (query, key, value))
            attn_mask = None if attn_mask is None else _round(attn_mask, dtype)
            stack.enter_context(torch.autocast(kind, enabled=False))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        return attend_by_products(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )


def _round(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a tensor, without cudnn while it runs: torch has no other way to say this of one call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        input, *_ = *args, *kwargs.values()
        with _WITHOUT_CUDNN if input.device.type == "cuda" else nullcontext():
            return function(*args, **kwargs)

    return call


def _lstm(*args: Any, **kwargs: Any) -> Any:
    input, *_ = *args, *kwargs.values()
    on_host = input.device.type == "cpu"
    return lstm(*args, **kwargs) if on_host else _NATIVE_LSTM(*args, **kwargs)


_NATIVE_LSTM = _without_cudnn(torch.lstm)


def _rebuild(function: Any, **names: Any) -> Callable[..., Any]:
    """A function of a module, that finds other things by some names in it."""
    rebuilt = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    return rebuilt


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attend,
    # A torch-function mode does not see what is called in a function that it has seen.
    F.multi_head_attention_forward: _rebuild(
        F.multi_head_attention_forward, scaled_dot_product_attention=_attend
    ),
    torch.lstm: _lstm,
    **{f: _without_cudnn(f) for f in (torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}

_NEVER: dict[str, Any] = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary"), lambda *_: False
)
_DERIVATIVES: dict[Any, Callable[..., Any]] = {
    f: _rebuild(f, **_NEVER)
    for f in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
}
"""That do not ask torch-function modes."""
