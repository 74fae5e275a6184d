"""Run a training closure again and again, and see what it computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

LOSS_FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.cross_entropy: ("input",),
    F.mse_loss: ("input", "target"),
    F.binary_cross_entropy_with_logits: ("input",),
}
"""Loss functions that define a Gauss-Newton matrix, and the names of their leading arguments that are outputs of the
model. The loss must be convex in each of them."""

# Questions about a Parameter itself, which a tensor standing in for it must not answer.
_ABOUT_THE_PARAMETER = {
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__set__,  # type: ignore[attr-defined]
}

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Evaluation:
    """What one run of a closure computed, with the graph (or the tangents) that lead to it.

    Attributes:
        loss: what is minimised, a 0-dim tensor: the sum of all that the closure called ``backward`` on, or what it
            returned if it called ``backward`` on nothing.
        outputs: the model's outputs, as the recognised loss functions saw them, in call order.
        metric: what the closure returned beside the loss: distributions, a scalar tensor, or None.
        called_backward: whether the closure called ``backward``.
    """

    loss: Tensor
    outputs: tuple[Tensor, ...]
    metric: Any
    called_backward: bool


class ReplayedClosure:
    """A closure that can run many times, with the effect on torch's global random numbers of running once.

    Every run draws the numbers that the first one drew, so dropout masks and sampled noise agree between the gradient,
    the curvature and every trial point. ``backward`` inside the closure is noted and not carried out.

    Args:
        function: the user's closure, without arguments.
        params: the parameters that it is a function of.
    """

    def __init__(self, function: Closure, params: Sequence[Tensor]) -> None:
        self._function = function
        self._params = params
        self._devices = {p.device for p in params if p.device.type != "cpu"}
        self._start = self._random_state()
        self._after: list[Tensor] | None = None
        self._differentiates = False
        self.count = 0

    def __call__(self, stand_ins: Sequence[Tensor] | None = None, *, graph: bool = True) -> Evaluation:
        """Run the closure.

        Args:
            stand_ins: used wherever a torch function is given one of the parameters.
            graph: build the graph that leads to the loss. Without it, only a closure that itself differentiates
                builds what it needs.

        Raises:
            TypeError, ValueError: the closure returned something that is not a loss or a metric.
            Exception: whatever the closure raises.
        """
        replaced = {} if stand_ins is None else {id(p): t for p, t in zip(self._params, stand_ins, strict=True)}
        mode = _ClosureMode(replaced)
        self.count += 1
        self._set_random_state(self._start)
        with torch.set_grad_enabled(graph or self._differentiates):
            with mode:
                returned = self._function()
            loss, metric = _loss_and_metric(mode.substitute(returned), mode.roots)
        self._differentiates |= mode.differentiates
        if self._after is None:
            self._after = self._random_state()
        self._set_random_state(self._after)
        return Evaluation(loss, tuple(mode.outputs), metric, bool(mode.roots))

    @contextmanager
    def rewound_on_error(self) -> Iterator[None]:
        """Put the random number generators where they were before the first run, if the block raises."""
        try:
            yield
        except BaseException:
            self._set_random_state(self._start)
            raise

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states + [torch.get_device_module(device).get_rng_state(device) for device in self._devices]

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


class _ClosureMode(TorchFunctionMode):
    """Sees every torch function that a closure calls: puts stand-ins for parameters, and notes outputs and losses."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins
        self.outputs: list[Tensor] = []
        self.roots: list[Tensor] = []
        self.differentiates = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_THE_PARAMETER:
            return func(*args, **kwargs)
        args, kwargs = self.substitute(args), self.substitute(kwargs)
        if func is torch.Tensor.backward:
            return self._note_backward(*args, **kwargs)
        if func is torch.autograd.backward:
            return self._note_backward_of_several(*args, **kwargs)
        if func is torch.autograd.grad:
            self.differentiates = True
        if func in LOSS_FUNCTIONS:
            args, kwargs = self._note_outputs(LOSS_FUNCTIONS[func], args, kwargs)
        result = func(*args, **kwargs)
        if self._stand_ins and not torch.is_grad_enabled():
            # Forward mode does not heed no_grad: what is computed under it would still carry a tangent.
            return _detached(result)
        return result

    def substitute(self, value: Any) -> Any:
        """``value`` with stand-ins in place of parameters, also inside lists, tuples and dicts."""
        if not self._stand_ins:
            return value
        if isinstance(value, Tensor):
            return self._stand_ins.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self.substitute(part) for part in value)
        if type(value) is dict:
            return {key: self.substitute(part) for key, part in value.items()}
        return value

    def _note_outputs(self, names: tuple[str, ...], args: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = list(args), dict(kwargs)
        for position, name in enumerate(names):
            place, key = (args, position) if position < len(args) else (kwargs, name)
            if isinstance(place[key], Tensor):
                # An alias: differentiating at it, not at the tensor, leaves out the tensor's other uses.
                place[key] = place[key].view_as(place[key])
                self.outputs.append(place[key])
        return args, kwargs

    def _note_backward(self, root: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        if gradient is None and root.numel() != 1:
            raise RuntimeError(f"backward() needs a scalar loss, got one of shape {tuple(root.shape)}")
        self.roots.append(root.sum() if gradient is None else (root * gradient).sum())

    def _note_backward_of_several(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors or [None] * len(tensors)
        for root, gradient in zip(tensors, gradients, strict=True):
            self._note_backward(root, gradient)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_detached(part) for part in value)
    return value


def _loss_and_metric(returned: Any, roots: list[Tensor]) -> tuple[Tensor, Any]:
    loss, metric = returned, None
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise TypeError(f"the closure must return a loss or (loss, metric), got a tuple of {len(returned)}")
        loss, metric = returned
    if isinstance(metric, Tensor) and metric.numel() != 1:
        raise ValueError(f"a tensor returned as the metric must be a scalar KL, got shape {tuple(metric.shape)}")
    if roots and isinstance(loss, Tensor | Number):
        return torch.stack([root.reshape(()) for root in roots]).sum(), metric
    if isinstance(loss, Distribution):
        raise TypeError("the closure must return the loss first, then the distribution: (loss, distribution)")
    if not isinstance(loss, Tensor):
        raise TypeError(f"the closure must return the loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the closure must return a scalar loss, got shape {tuple(loss.shape)}; reduce it by mean()")
    return loss.reshape(()), metric
