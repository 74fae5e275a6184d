"""See, and change, every torch function that a closure calls."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ngd_optim.torch_internals import base_of
from ngd_optim.tracing.losses import LOSSES, call_loss
from ngd_optim.tracing.side_effects import SideEffects

# Questions about a Parameter itself, which a tensor standing in for it must not answer.
_ABOUT_THE_PARAMETER = {
    torch.Tensor.requires_grad.__get__,  # pyright: ignore
    torch.Tensor.is_leaf.__get__,  # pyright: ignore
    torch.Tensor.data.__get__,  # pyright: ignore
    torch.Tensor.grad.__set__,  # pyright: ignore
    torch.Tensor.requires_grad_,
}
_GRAD = torch.Tensor.grad.__get__  # pyright: ignore
# Their fused kernels have no second derivatives and no forward mode.
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# With running statistics as second and third argument, and whether they change as sixth.
_NORMS_BY_BATCH: dict[Callable[..., Any], tuple[str, bool]] = {
    F.batch_norm: ("training", False),
    F.instance_norm: ("use_input_stats", True),
}
# They fill memory in order, so their numbers depend on how the first argument lies in memory;
# torch.func changes that.
_RANDOM_BY_LAYOUT = {
    F.alpha_dropout,
    F.dropout,
    torch.bernoulli,
    torch.dropout,
}
_LIKE = {torch.rand_like, torch.randn_like}
_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
}


class Tracing(TorchFunctionMode):
    """Puts stand-ins for parameters, and notes losses, outputs of the model and side effects.

    ``backward`` is noted and not carried out.

    Args:
        stand_ins: by ``id`` of a parameter, what is used wherever a torch function is given it.
        effects: is told of everything that the closure is about to change.
        cut: give the loss functions outputs without history.

    Attributes:
        outputs: the model's outputs, as the recognised loss functions saw them, in call order.
        losses: the recognised loss functions that it called.
        roots: scalars that the closure called ``backward`` on.
        differentiates: whether the closure called ``torch.autograd.grad``.
        substituted: the ``id`` of each parameter whose stand-in went into a tensor.
    """

    def __init__(self, stand_ins: Mapping[int, Tensor], effects: SideEffects, *, cut: bool) -> None:
        super().__init__()
        self._cut = cut
        self._stand_ins = stand_ins
        self._effects = effects
        self._random_calls = 0
        self._gradients: set[int] = set()
        self._made_here: dict[int, weakref.ref[Tensor]] = {}
        self.outputs: list[Tensor] = []
        self.losses: set[Callable[..., Any]] = set()
        self.roots: list[Tensor] = []
        self.differentiates = False
        self.substituted: set[int] = set()
        self._put_now: set[int] = set()
        self.has_hooks = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_THE_PARAMETER:
            return func(*args, **kwargs)
        if func == _GRAD:  # a new wrapper at each access, so not "is"
            return self._gradient(*args)
        self._put_now = set()
        # torch.func pushes tangents through stand-ins: the user's modules hold the parameters
        # themselves.
        args, kwargs = self.substitute(args), self.substitute(kwargs)
        put = self._put_now
        if func is torch.Tensor.backward:
            return self._note_backward(*args, **kwargs)
        if func is torch.autograd.backward:
            return self._note_backward_of_several(*args, **kwargs)
        self.differentiates |= func is torch.autograd.grad
        self.has_hooks |= func is torch.Tensor.register_hook
        if not self._effects.is_known:
            self._note_changes(func, args, kwargs)
        result = self._call(func, args, kwargs)
        if not self._effects.is_known:
            self._note_made_here(args, kwargs, result)
        if put and any(True for _ in _tensors(result)):  # and not into a question about its shape
            self.substituted |= put
        if self._stand_ins and not torch.is_grad_enabled():
            # Forward mode does not heed no_grad: what is computed under it would still carry a
            # tangent.
            return _detach(result)
        return result

    def substitute(self, value: Any) -> Any:
        """``value`` with stand-ins in place of parameters, also inside lists, tuples and dicts."""
        if not self._stand_ins:
            return value
        if isinstance(value, Tensor):
            if id(value) not in self._stand_ins:
                return value
            self._put_now.add(id(value))
            return self._stand_ins[id(value)]
        if type(value) in (list, tuple):
            return type(value)(self.substitute(part) for part in value)
        if type(value) is dict:
            return {key: self.substitute(part) for key, part in value.items()}
        return value

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in LOSSES:
            result, outputs = call_loss(func, args, kwargs, cut=self._cut)
            self.outputs += outputs
            self.losses.add(func)
            return result
        if (func in _RANDOM_BY_LAYOUT or func in _LIKE) and args and isinstance(args[0], Tensor):
            return self._random(func, args, kwargs)
        # Native kernels are slower forward, and can be differentiated as often as one likes.
        if getattr(func, "__name__", None) in _RECURRENT:
            with _native_kernels():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        if self._stand_ins:
            return None  # forward mode could not follow a closure that sets it to zero in place, and need not
        gradient = _GRAD(parameter)
        if gradient is not None:
            self._gradients |= {id(gradient), id(base_of(gradient))}
        return gradient

    def _random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Draw as at this call of the closure's first run, however the first argument lies in memory now."""
        call, tensor = self._random_calls, args[0]
        self._random_calls += 1
        if call == len(self._effects.layouts):
            self._effects.layouts.append(tensor.stride())
        # Under torch.func a tensor may lie in another order than in the first run, and the mask
        # would be drawn for other elements.
        stride = self._effects.layouts[call]
        if stride == tensor.stride() and not self._stand_ins:  # as a checkpoint will call it again
            return func(*args, **kwargs)
        if func in _LIKE:
            tensor = torch.empty_strided(
                tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
            )
            return func(tensor, *args[1:], **kwargs)
        order = sorted(range(tensor.ndim), key=lambda dim: 0 if 0 in stride else -stride[dim])
        result = func(tensor.permute(order).contiguous(), *args[1:], **kwargs)
        return result.permute([order.index(dim) for dim in range(len(order))])

    def _note_changes(self, func: Any, args: Any, kwargs: Any) -> None:
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator):
            self._effects.track_generator(generator)
        for tensor in _find_changed(func, args, kwargs):
            # What has a history belongs to the graph, and what was made in this run is nobody's
            # state.
            base = base_of(tensor)
            base = tensor if base is None else base
            if (
                base.grad_fn is None
                and not base.requires_grad
                and not (self._is_new(tensor) or self._is_new(base))
            ):
                self._effects.track_tensor(base, is_gradient=id(base) in self._gradients)

    def _note_made_here(self, args: Any, kwargs: Any, result: Any) -> None:
        """Remember new tensors, which need no putting back; not what shares memory with older ones."""
        results = [t for t in _tensors(result) if not t.requires_grad]
        if results:
            older = {_memory(t) for t in _tensors((args, kwargs)) if not self._is_new(t)}
            self._made_here.update(
                {id(t): weakref.ref(t) for t in results if _memory(t) not in older}
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
        self.roots.append(root.sum() if gradient is None else (root * gradient).sum())

    def _note_backward_of_several(
        self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any
    ) -> None:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = (
            [grad_tensors]
            if isinstance(grad_tensors, Tensor)
            else grad_tensors or [None] * len(tensors)
        )
        for root, gradient in zip(tensors, gradients, strict=True):
            self._note_backward(root, gradient)


@contextmanager
def _native_kernels() -> Iterator[None]:
    # Their flags() contexts also set TF32, which warns on machines that have none.
    libraries = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]


def _find_changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    name = getattr(func, "__name__", "")
    if func in _NORMS_BY_BATCH:
        flag, default = _NORMS_BY_BATCH[func]
        if args[5] if len(args) > 5 else kwargs.get(flag, default):
            yield from _tensors([args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")])
    if (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or name in _IN_PLACE_OPERATORS
    ):
        yield from _tensors(args[:1])
    yield from _tensors(kwargs.get("out"))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or inside torch.func.vmap
        return id(tensor)


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_detach(part) for part in value)
    return value
