"""See, and change, every torch function that a closure calls."""

import logging
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.kernels import differentiable, recompute_alike, uncompiled
from ngd_optim.recognised import LOSSES, LossCall, call_loss
from ngd_optim.recording import ForwardRecorder
from ngd_optim.torch_internals import (
    FunctionMode,
    base_of,
    is_in_compiled_call,
    is_transformed,
    memory_of,
    saves_by_hooks,
)
from ngd_optim.tracing.kinks import KINKS, Kink, call_with_kink
from ngd_optim.tracing.side_effects import SideEffects

logger = logging.getLogger("ngd_optim")

# With running statistics as second and third argument, and whether they change as sixth.
_NORMS_BY_BATCH: dict[Callable[..., Any], tuple[str, bool]] = {
    F.batch_norm: ("training", False),
    F.instance_norm: ("use_input_stats", True),
}
_GET_GRADIENT = vars(torch.Tensor.__base__)["grad"].__get__
_READINGS = {"tolist", "numpy", "__array__", "__dlpack__"}
"""Ways of a tensor's numbers out of torch that are no aten operation, as item() is."""

_HELD = 16
"""So many inputs of functions with a kink are held until the run ends: a loss ends in the last ones."""

_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
}


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


@lru_cache(maxsize=4096)
def _is_plain(func: Any) -> bool:
    """Whether a torch function does nothing but give a tensor, unless ``out`` or ``generator`` is given.

    Asked at each call: closures of many small tensors call little else.
    """
    name = getattr(func, "__name__", "__get__")
    return not (
        _writes_to_first(name)
        or name in _READINGS
        or name in ("__get__", "backward", "grad", "register_hook", "retain_grad")
        or func in _NORMS_BY_BATCH
        or func in LOSSES
        or func in KINKS
        or differentiable(func) is not func
    )


class LossWatch(FunctionMode):
    """Shows the recognised losses on their way back, while the graph that leads to them is whole.

    It changes nothing, and does not look at what is not differentiated. Nodes of the graph know it
    by a weak reference: who watches must hold it until the losses were differentiated.

    Args:
        see: is called with each loss, once, and with the gradient of the whole at its result.
    """

    def __init__(self, see: Callable[[LossCall, Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._calls: dict[int, LossCall] = {}
        self._stance = ExitStack()

    def __enter__(self) -> "LossWatch":
        self._stance.enter_context(uncompiled())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stance.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES and not is_transformed([*args, *kwargs.values()]):
            call = call_loss(func, args, kwargs)
            if call.result.requires_grad:
                # A hook that held the call would keep the graph that holds the hook.
                key = len(self._calls)
                self._calls[key] = call
                call.result.register_hook(partial(_show, weakref.ref(self), key))
            return call.result
        # Their fused kernels hide the weights. A checkpoint will run its part again with those.
        if func in _RECURRENT and not saves_by_hooks():
            func = differentiable(func)
        return func(*args, **kwargs)

    def show(self, key: int, gradient: Tensor) -> None:
        """The gradient has come to the result of a call."""
        call = self._calls.pop(key, None)
        if call is not None:
            self._see(call, gradient)


def _show(watch: "weakref.ref[LossWatch]", key: int, gradient: Tensor) -> None:
    alive = watch()
    if alive is not None:
        alive.show(key, gradient)


class Hook:
    """A hook on the gradient of a tensor of the closure.

    What changes gradients is a part of the derivative, and is called in every product. What only
    looks, and returns nothing, is called where the gradient of the loss is computed: it may not be
    prepared for more, such as Lightning Fabric's, which wants a ``fabric.backward`` around it.

    Args:
        hook: the closure's.
        only_looks: whether it is known to.
    """

    def __init__(self, hook: Callable[[Tensor], Any], *, only_looks: bool) -> None:
        self._hook = hook
        self.only_looks = only_looks
        self.is_in_closure = True

    def __call__(self, gradient: Tensor) -> Any:
        """What it makes of a gradient; None if it leaves that alone."""
        if self.only_looks and not self.is_in_closure:
            return None
        result = self._hook(gradient)
        self.only_looks = result is None
        return result


class Tracing(FunctionMode):
    """Notes losses, outputs of the model and side effects, and what ``backward`` is called on.

    Args:
        effects: is told of everything that the closure is about to change.
        backward: carries out a call of ``backward``, and gives the roots that count from then on;
            None: it is noted only.
        recorder: is told what no aten operation tells: of tensors that are about to be detached in
            place, or read as numbers.
        hooks_before: those of the first run, in the same order.

    Attributes:
        losses: the calls of recognised loss functions.
        calls: how often the closure called ``backward``.
        roots: the scalars that it called it on, and that count.
        reads_gradients: whether it looked at a ``.grad`` that ``backward`` left.
        differentiates: whether the closure called ``torch.autograd.grad``.
        hooks: those on gradients of tensors that it registered.
        retaining: the tensors that it called ``retain_grad`` of.
        recomputes: whether it uses checkpointing.
    """

    def __init__(
        self,
        effects: SideEffects,
        backward: Callable[[Tensor], list[Tensor]] | None,
        recorder: ForwardRecorder | None = None,
        hooks_before: Sequence["Hook"] = (),
    ) -> None:
        super().__init__()
        self._effects = effects
        self._backward = backward
        self._recorder = recorder
        self._made_here: dict[int, weakref.ref[Tensor]] = {}
        self._count = 0
        self._kinks: list[Kink] = []
        self._held: deque[Kink] = deque(maxlen=_HELD)
        self.losses: list[LossCall] = []
        self.roots: list[Tensor] = []
        self.reads_gradients = False
        self.calls = 0
        self.differentiates = False
        self.recomputes = False
        self.hooks: list[Hook] = []
        self.retaining: list[weakref.ref[Tensor]] = []
        self._hooks_before = hooks_before

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.is_in_closure = False
        super().__exit__(*exception)

    @property
    def kinks(self) -> list[Kink]:
        """The calls of functions that have a kink, but for those long ago that would take memory."""
        return [*self._kinks, *self._held]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._count += 1
        # The stack is looked at for the first calls, then for one in two, in four: most are the model's.
        is_looked_at = self._count < 16 or self._count & (self._count - 1) == 0
        if is_looked_at and "torch._dynamo" in sys.modules:
            _tell_of_compiled()
        if not self.recomputes and saves_by_hooks():
            self.recomputes = True
            recompute_alike()  # in derivatives that the closure itself takes, too
        if _is_plain(func) and "out" not in kwargs and "generator" not in kwargs:
            result = func(*args, **kwargs)
            self._note_made_here(args, kwargs, result)
            return result
        if func is torch.Tensor.backward:
            return self._note_backward(*args, **kwargs)
        if func is torch.autograd.backward:
            return self._note_backward_of_several(*args, **kwargs)
        self.differentiates |= func is torch.autograd.grad
        if func is torch.Tensor.register_hook:
            return func(args[0], self._note_hook(*args[1:], **kwargs))
        if func is torch.Tensor.retain_grad:
            self.retaining.append(weakref.ref(args[0]))
        name = getattr(func, "__name__", None)
        if self._recorder is not None:
            if name == "detach_":
                self._recorder.note_detached(args[0])
            elif name in _READINGS:
                self._recorder.note_read(args[0])
        if self.calls and func == _GET_GRADIENT:
            gradient = func(*args, **kwargs)
            self.reads_gradients |= gradient is not None
            return gradient
        self._note_changes(func, args, kwargs)
        result = self._call(func, args, kwargs)
        if name != "__get__":  # of what was there before, such as .grad
            self._note_made_here(args, kwargs, result)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in LOSSES and not is_transformed([*args, *kwargs.values()]):
            call = call_loss(func, args, kwargs)
            self.losses.append(call)
            return call.result
        if func in KINKS and torch.is_grad_enabled() and not is_transformed(args):
            result, kink = call_with_kink(func, args, kwargs)
            if kink is not None:
                (self._held if kink.takes_memory else self._kinks).append(kink)
            return result
        return differentiable(func)(*args, **kwargs)

    def _note_hook(self, hook: Callable[[Tensor], Any]) -> "Hook":
        before = self._hooks_before[len(self.hooks) : len(self.hooks) + 1]
        noted = Hook(hook, only_looks=any(one.only_looks for one in before))
        self.hooks.append(noted)
        return noted

    def _note_changes(self, func: Any, args: Any, kwargs: Any) -> None:
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator):
            self._effects.track_generator(generator)
        for tensor in _find_changed(func, args, kwargs):
            # What has a history belongs to the graph, and what was made in this run is nobody's
            # state.
            base = base_of(tensor)
            base = tensor if base is None else base
            if base.is_leaf and not (self._is_new(tensor) or self._is_new(base)):
                self._effects.track_tensor(base)

    def _note_made_here(self, args: Any, kwargs: Any, result: Any) -> None:
        """Remember new tensors, which need no putting back; not what shares memory with older ones."""
        if isinstance(result, Tensor) and result.requires_grad:  # nearly all: no list of one
            return
        results = [t for t in _tensors(result) if not t.requires_grad]
        if results:
            older = {memory_of(t) for t in _tensors((args, kwargs)) if not self._is_new(t)}
            self._made_here.update(
                {id(t): weakref.ref(t) for t in results if memory_of(t) not in older}
            )

    def _is_new(self, tensor: Tensor) -> bool:
        reference = self._made_here.get(id(tensor))
        return reference is not None and reference() is tensor

    def _note_backward(
        self,
        root: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if create_graph or inputs is not None:
            raise RuntimeError(
                "backward(create_graph=True) or backward(inputs=...) inside the closure is not "
                "carried out; use torch.autograd.grad for derivatives that the loss is made of"
            )
        if gradient is None and root.numel() != 1:
            raise RuntimeError(
                f"backward() needs a scalar loss, got one of shape {tuple(root.shape)}"
            )
        scalar = root.sum() if gradient is None else (root * gradient).sum()
        self.calls += 1
        if self._backward is None:
            self.roots.append(scalar)
        else:
            self.roots = self._backward(scalar)

    def _note_backward_of_several(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = (
            [grad_tensors]
            if isinstance(grad_tensors, Tensor)
            else grad_tensors or [None] * len(tensors)
        )
        for root, gradient in zip(tensors, gradients, strict=True):
            self._note_backward(root, gradient, create_graph=create_graph, inputs=inputs)


_TOLD: set[str] = set()
"""What is said once a process."""


def _tell_of_compiled() -> None:
    """Say once that a compiled model runs eagerly, if it does."""
    if "compiled" not in _TOLD and is_in_compiled_call():
        _TOLD.add("compiled")
        logger.warning(
            "the closure runs a model of torch.compile, and within step() that runs eagerly: a compiled graph "
            "hides its operations; nothing is wrong, and elsewhere it stays compiled",
            extra={"nothing_is_wrong": True},
        )


def _find_changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    if func in _NORMS_BY_BATCH:
        flag, default = _NORMS_BY_BATCH[func]
        if args[5] if len(args) > 5 else kwargs.get(flag, default):
            yield from _tensors([args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")])
    if _writes_to_first(getattr(func, "__name__", "")):
        yield from _tensors(args[:1])
    yield from _tensors(kwargs.get("out"))


def _writes_to_first(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    is_method = name.endswith("_") and not name.endswith("__")
    return is_method or name == "__setitem__" or name in _IN_PLACE_OPERATORS


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
