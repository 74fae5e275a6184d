"""An accelerator that is only pretended: its tensors hold memory of the CPU, and what it cannot do it refuses.

    python -m helpers.pretended_device

runs every scenario on the CPU and on the device, and prints what came out as JSON. It registers a device with torch,
which cannot be undone: that is why tests run it in a process of its own.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from ngd_optim import KFAC, Diagonal, NaturalCG, Nystrom, least_squares

aten = torch.ops.aten
HOST, NAME = torch.device("cpu"), "gpu"


class _Backend(_DummyBackendModule):
    """What torch asks a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


READS: Counter[str] = Counter()
"""How often the host waited, by the line that made it wait."""


class OnDevice(torch.Tensor):
    """A tensor of the pretended device, around one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        result.held = held
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        _note_read()
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Makes ``torch.zeros(..., device="gpu")`` work."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_here(kwargs.get("device")) or any(issubclass(t, OnDevice) for t in types):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


_COPIES = (aten._to_copy.default, aten.copy_.default)
_TAKES_INDICES_OF_THE_HOST = (aten.index.Tensor, aten.index_put_.default)
_SIZES_DEPEND_ON_VALUES = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
)


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _note_read() -> None:
    frames = [f for f in traceback.extract_stack() if "ngd_optim/" in f.filename]
    inner = [f for f in frames if not f.filename.endswith("reading.py")]
    READS[f"{inner[-1].filename.split('ngd_optim/')[-1]}: {inner[-1].line}" if inner else "?"] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    here = [isinstance(t, OnDevice) for t in tensors]
    asked = kwargs.get("device")
    if any(here) and func not in (*_COPIES, *_TAKES_INDICES_OF_THE_HOST):
        for tensor, is_here in zip(tensors, here, strict=True):
            if not is_here and tensor.ndim:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func} got gpu:0 and cpu"
                )
    to_host = func is aten._to_copy.default and asked is not None and not _is_here(asked)
    into_host = func is aten.copy_.default and not isinstance(args[0], OnDevice)
    if any(here) and (func in _SIZES_DEPEND_ON_VALUES or to_host or into_host):
        _note_read()

    def unwrap(a: Any) -> Any:
        if isinstance(a, OnDevice):
            return a.held
        return HOST if isinstance(a, torch.device) and a.type == NAME else a

    out = func(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs))
    if to_host or into_host or not (_is_here(asked) or any(here)):
        return out
    out = pytree.tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any(here) else out


def to_device(module: nn.Module) -> nn.Module:
    """A copy there; ``module.to`` would ask the device for a guard that it does not have."""
    module = deepcopy(module)
    for inner in module.modules():
        for name, p in list(inner.named_parameters(recurse=False)):
            setattr(inner, name, nn.Parameter(OnDevice(p.detach().clone())))
    return module


Closure = Callable[[nn.Module, Tensor, Tensor], Any]


class Scenario(NamedTuple):
    """A model, its closure and settings of an optimizer."""

    make: Callable[[], nn.Module]
    closure: Closure
    settings: dict[str, Any]
    kind: type[NaturalCG] | type[KFAC] = NaturalCG


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(model(x), y)


def fit(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return least_squares(model(x)[:, 0] - y.sin())


def scalar(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return (model(x)[:, 0] - y.sin()).square().mean().log1p()


def policy(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    distribution = Categorical(logits=model(x), validate_args=False)
    log_prob = distribution.log_prob(y)
    return -((log_prob - log_prob.detach()).exp() * x[:, 0]).mean(), distribution


def gaussian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    distribution = Normal(model(x), torch.ones_like(x[:, :3]), validate_args=False)
    return -distribution.log_prob(x[:, :3]).mean(), distribution


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


SCENARIOS = {
    "cg": Scenario(mlp, classify, {"preconditioner": None}),
    "kfac": Scenario(mlp, classify, {"preconditioner": "kfac"}),
    "diagonal": Scenario(mlp, classify, {"preconditioner": Diagonal()}),
    "nystrom": Scenario(mlp, classify, {"preconditioner": Nystrom(4)}),
    "convolutions": Scenario(cnn, classify, {"preconditioner": "kfac"}),
    "groups": Scenario(
        mlp, classify, {"weight_decay": 1e-3, "trust_region": "damped", "max_kl": 0.01}
    ),
    "dense": Scenario(mlp, fit, {"solver": "dense"}),
    "sample": Scenario(mlp, fit, {"solver": "sample", "momentum": 0.5}),
    "hessian": Scenario(mlp, scalar, {"max_cg_iters": 20}),
    "policy": Scenario(mlp, policy, {"trust_region": "damped", "cg_tol": 1e-3}),
    "gaussian": Scenario(mlp, gaussian, {"preconditioner": "kfac"}),
    "boundary": Scenario(mlp, policy, {"trust_region": "boundary", "adapt_damping": False}),
    "stream": Scenario(mlp, classify, {"weight_decay": 1e-2}, KFAC),
    "stream of images": Scenario(cnn, classify, {"renew_every": 2}, KFAC),
    "stream of residuals": Scenario(mlp, fit, {"adapt_radius": False}, KFAC),
}


def compare(scenario: Scenario, steps: int = 4) -> dict[str, Any]:
    """The same steps on the CPU and on the device."""
    torch.manual_seed(0)
    model = scenario.make()
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    there, x_there, y_there = to_device(model), OnDevice(x.clone()), OnDevice(y.clone())
    own = scenario.kind(model.parameters(), **scenario.settings)
    other = scenario.kind(there.parameters(), **scenario.settings)
    if isinstance(own, KFAC) or isinstance(other, KFAC):
        return compare_streams(scenario, (model, x, y, own), (there, x_there, y_there, other))
    reads, iterations = [], []
    for _ in range(steps):
        own.step(lambda: scenario.closure(model, x, y))
        READS.clear()
        other.step(lambda: scenario.closure(there, x_there, y_there))
        assert other.last_step is not None
        reads.append(dict(READS))
        iterations.append(other.last_step.cg_iters)
    pairs = zip(model.parameters(), there.parameters(), strict=True)
    return {
        "difference": max((p - q.held).abs().max().item() for p, q in pairs),
        "moved": own.last_step.accepted,
        "iterations": iterations,
        "reads": reads,
    }


def register() -> None:
    """Have torch know the device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


def compare_streams(scenario: Scenario, here: Any, there: Any, steps: int = 12) -> dict[str, Any]:
    """Steps of KFAC, by a closure and by a watched block in turn."""
    reads, renewed = [], []
    for step in range(steps):
        for model, x, y, optimizer in (here, there):
            optimizer.zero_grad()
            READS.clear()
            if step % 2:
                optimizer.step(lambda: scenario.closure(model, x, y))  # noqa: B023
            else:
                with optimizer.watch():
                    loss = scenario.closure(model, x, y)
                loss.backward()
                optimizer.step()
        reads.append(dict(READS))
        renewed.append(there[-1].last_step.renewed)
    pairs = zip(here[0].parameters(), there[0].parameters(), strict=True)
    return {
        "difference": max((p - q.held).abs().max().item() for p, q in pairs),
        "moved": here[-1].last_step.accepted,
        "renewed": renewed,
        "reads": reads,
    }


def main() -> None:
    """Print what came out of every scenario."""
    torch.set_num_threads(1)
    register()
    found: dict[str, Any] = {}
    with Factories():
        for name, scenario in SCENARIOS.items():
            if len(sys.argv) < 2 or name in sys.argv[1:]:
                try:
                    found[name] = compare(scenario)
                except Exception as error:
                    traceback.print_exc()
                    found[name] = {"error": repr(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
