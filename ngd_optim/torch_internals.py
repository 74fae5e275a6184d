"""Private names of torch, each with why it is used. All are in torch 2.7, the oldest supported, to 2.13, but for one.

What a new torch breaks breaks here, and ``tests/test_torch_internals.py`` says which name it was.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import Node
from torch.distributions import kl
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


class DispatchMode(TorchDispatchMode):
    """Sees every aten operation of its thread; no public mode looks below autograd.

    Torch's own ``__enter__`` and ``__exit__`` also set flags of the whole process for the compiler,
    which two threads leave set.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # As below autograd without a mode: there, what is computed from subclasses of tensors is plain.
        with torch._C.DisableTorchFunctionSubclass():
            return self.call(materialize(func), args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Closures run without the compiler; the guard against it would import it, and cost time at
        # each call.
        return False


class FunctionMode(TorchFunctionMode):
    """Sees every torch call of its thread.

    Torch takes a mode from its stack while that runs. A signal whose handler raises may come before
    it is back there; to leave the mode would then take another one's place, or raise.
    """

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Take it from the stack if it is there: an exit that was interrupted may be made good."""
        if any(_get_function_stack_at(i) is self for i in range(_len_torch_function_stack())):
            super().__exit__(None, None, None)


class RealZeros(DispatchMode):
    """Makes zeros of ``aten._efficientzerotensor``, by which forward mode saves memory.

    In any other dispatch mode, a user's for example, an operation on them ends the process (torch
    2.13: ``mul`` by a number, in what ``mse_loss`` is differentiated by).
    """


def materialize(operation: Any) -> Any:
    """``aten.zeros`` for ``aten._efficientzerotensor``, any other operation as it is; see :class:`RealZeros`."""
    return _ZEROS if operation is _LAZY_ZEROS else operation


_LAZY_ZEROS, _ZEROS = torch.ops.aten._efficientzerotensor.default, torch.ops.aten.zeros.default


def is_watched() -> bool:
    """``_len_torch_dispatch_stack``: whether some dispatch mode is active in this thread."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed(values: Iterable[Any]) -> bool:
    """``is_functorch_wrapped_tensor``: whether a tensor belongs to a running ``torch.func`` transform."""
    return any(isinstance(v, Tensor) and is_functorch_wrapped_tensor(v) for v in values)


@cache
def load_forward_mode() -> None:
    """``torch._decomp.decompositions_for_jvp``, which forward mode imports when it is first used.

    The import uses what torch itself deprecates, and would fail where warnings are errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def schema_of(operation: Any) -> Any:
    """``OpOverload._schema``, the dispatcher's own record of which arguments an operation writes to."""
    return operation._schema


def version_of(tensor: Tensor) -> int:
    """``Tensor._version``: how often it was written to in place; what autograd itself compares."""
    return tensor._version


def keep_versions(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """``_unsafe_preserve_version_counter``: writes are not counted, for values that are put back.

    Autograd refuses a graph that has saved a tensor which was written to since.
    """
    return _unsafe_preserve_version_counter(tuple(tensors))


def flatten_dense(tensors: Sequence[Tensor]) -> Tensor:
    """``_flatten_dense_tensors``: a new flat tensor of their elements, by one call for however many."""
    flat = _flatten_dense_tensors(tuple(tensors))
    return flat.clone() if len(tensors) == 1 else flat  # of one tensor it is a view


def unflatten_dense(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """``_unflatten_dense_tensors``: views of a flat tensor, of the shapes of others."""
    views = _unflatten_dense_tensors(flat, tuple(like))
    # What has no elements is given a shape of (0,).
    return [v if v.numel() else v.view(t.shape) for v, t in zip(views, like, strict=True)]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``_foreach_copy_``: each source's values into its target."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def base_of(tensor: Tensor) -> Tensor | None:
    """``Tensor._base``: what it is a view of; there is no public question."""
    return tensor._base


def memory_of(tensor: Tensor) -> int:
    """The same for tensors that share memory, while one of them is held."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # sparse, a wrapper, or inside torch.func.vmap
        return id(tensor)


def hooks_of(parameter: Any) -> Any:
    """``Tensor._backward_hooks``: those of ``register_hook``, None or empty where there are none."""
    return parameter._backward_hooks


def outputs_of(node: Any) -> Any:
    """``Node._input_metadata``: shape and dtype of each output in the forward pass, or None.

    Torch calls them inputs because the gradient comes in there.
    """
    return getattr(node, "_input_metadata", ())  # Python functions have none


def saved_by(node: Any, name: str) -> Any:
    """``Node._saved_<name>``: what a node keeps for its backward pass; None if it has no such thing.

    Of a subclass of tensors it is the plain one: what the subclass adds is not saved.
    """
    value = getattr(node, f"_saved_{name}", None)
    return plain(value) if isinstance(value, Tensor) else value


def plain(tensor: Tensor) -> Tensor:
    """``Tensor.__torch_dispatch__``: the same, without a subclass that only adds methods and attributes.

    One that has the dispatcher call it, as it holds other tensors, stays what it is.
    """
    kind: Any = type(tensor)
    base: Any = Tensor
    holds_others = kind.__torch_dispatch__ is not base.__torch_dispatch__
    return tensor if kind is Tensor or holds_others else tensor.as_subclass(Tensor)


def variable_of(node: Node | None) -> Tensor | None:
    """``AccumulateGrad.variable``: the tensor whose ``.grad`` a node adds to; None for other nodes."""
    return getattr(node, "variable", None)


def reduction_of(size_average: Any, reduce: Any) -> str:
    """``torch.nn._reduction``: what the two old flags of a loss function mean, which losses still take."""
    return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def kl_function_of(kind: type) -> Any:
    """What ``kl_divergence`` calls for two distributions of a class; ``NotImplemented``: nothing.

    It is looked up in ``torch.distributions.kl._KL_MEMOIZE``, which ``register_kl`` clears, and
    found by ``_dispatch_kl``.
    """
    if (kind, kind) not in kl._KL_MEMOIZE:
        kl._KL_MEMOIZE[kind, kind] = kl._dispatch_kl(kind, kind)
    return kl._KL_MEMOIZE[kind, kind]


def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """``_scaled_dot_product_attention_math``: what ``SDPBackend.MATH`` takes; the choice itself is the process's."""
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def is_in_compiled_call() -> bool:
    """Whether something that ``torch.compile`` made is running, eagerly: its wrapper is on the stack of this thread.

    In ``torch._dynamo.eval_frame`` that is ``compile_wrapper``, in older versions ``_fn``, with the compiler
    as ``callback``; what ``torch.compiler.disable`` has made is another ``_fn``, without.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "callback" in code.co_freevars and code.co_filename.endswith(_WRAPPERS):
            return True
        frame = frame.f_back
    return False


_WRAPPERS = os.path.join("torch", "_dynamo", "eval_frame.py")


_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_top_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8


def saves_by_hooks() -> bool:
    """``_top_saved_tensors_default_hooks``: whether what autograd saves is handed to hooks, as in a checkpoint."""
    return _hooks_refuse_to_go() if _top_hooks is None else _top_hooks(True) is not None


def _hooks_refuse_to_go() -> bool:
    """For torch 2.7, and dearer: hooks cannot be disabled while there are any."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


def fsdp_states() -> list[Any]:
    """``_composable_state._module_state_mapping``: those of all modules that ``fully_shard`` was called on.

    No way leads from a parameter to its module.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    found = [reference() for reference in list(_module_state_mapping.values())]
    return [s for s in dict.fromkeys(found) if isinstance(s, FSDPState) and hasattr(s, "_modules")]


def fsdp_groups_of(state: Any) -> list[Any]:
    """``FSDPState._fsdp_param_groups``: the parameters that are gathered together; one group at most in older torch."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in [state._fsdp_param_group] if g] if groups is None else list(groups)


def whole_weight_of(one: Any) -> Tensor:
    """``FSDPParam._unsharded_param``: what a gathered weight is, in the dtype of its mixed precision."""
    return one._unsharded_param


def begin_fsdp(state: Any) -> None:
    """``FSDPState._lazy_init``: what the first forward pass of the outermost module prepares."""
    state._lazy_init()


@contextmanager
def casting_only(state: Any) -> Iterator[None]:
    """``FSDPState._training_state``: while it is that of a backward pass, which recomputes, hooks cast and no more.

    They neither gather, nor give up, nor put nodes of their own into the graph.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    before, state._training_state = state._training_state, TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        state._training_state = before
