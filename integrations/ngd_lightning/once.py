"""What happens once for each batch, however often ``training_step`` runs for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric, MetricCollection

Metrics = Sequence[Metric | MetricCollection]
Change = tuple[dict[str, Any], str, Any]
"""Where a module holds something, under which name, and what."""

_NOTHING: Any = object()


def metrics_of(model: nn.Module) -> Metrics:
    """The torchmetrics that are submodules."""
    return [m for m in model.modules() if isinstance(m, Metric | MetricCollection)]


@contextmanager
def unnoticed(model: pl.LightningModule, metrics: Metrics) -> Iterator[None]:
    """Let ``training_step`` run once more, for its loss alone: it logs nothing, and metrics do not count."""
    with ExitStack() as stack:
        stack.enter_context(own_states(metrics, keep=False))
        for module in model.modules():
            if isinstance(module, pl.LightningModule):
                stack.enter_context(replaced(module, "log", lambda *_, **__: None))
        yield


@contextmanager
def own_states(metrics: Metrics, *, keep: bool) -> Iterator[None]:
    """Let torchmetrics update copies of their states, and put the old ones back unless they are to be kept.

    A copy made inside the traced closure is no buffer of the model: forward mode can follow the
    closure.
    """
    saved = [dict(vars(metric)) for metric in metrics]
    copies: dict[int, Tensor] = {}
    for metric in metrics:
        for name, value in metric.metric_state.items() if isinstance(metric, Metric) else ():
            # Metrics of one collection may share a tensor.
            copy = (
                copies.setdefault(id(value), value.clone())
                if isinstance(value, Tensor)
                else list(value)
            )
            setattr(metric, name, copy)
    try:
        yield
    finally:
        if not keep:
            for metric, attributes in zip(metrics, saved, strict=True):
                vars(metric).clear()
                vars(metric).update(attributes)


class Start:
    """Random numbers, of Python and NumPy too, and what modules hold, as ``training_step`` found them.

    Args:
        model: the LightningModule.
        clones: keep copies of its buffers, where nobody undoes what is written to them.
    """

    def __init__(self, model: pl.LightningModule, *, clones: bool) -> None:
        self._cuda = model.device.type == "cuda"
        self._random = _collect_rng_states(self._cuda)
        metrics = {part for metric in metrics_of(model) for part in metric.modules()}
        self._held = [
            (place, dict(place))
            for module in model.modules()
            if module not in metrics
            for place in (vars(module), module._buffers)
        ]
        self._clones: list[Change] = [
            (place, name, value.detach().clone())
            for place, held in (self._held if clones else ())
            for name, value in held.items()
            if isinstance(value, Tensor)
        ]
        self._changes: list[Change] = []

    def note_changes(self) -> None:
        """After the first run: which attributes it has set, such as a hidden state or a count."""
        self._changes = [
            (place, name, held.get(name, _NOTHING))
            for place, held in self._held
            for name in {**held, **place}
            if held.get(name, _NOTHING) is not place.get(name, _NOTHING)
        ]
        self._held = []

    @contextmanager
    def again(self) -> Iterator[None]:
        """Start there once more, and leave random numbers and modules alone."""
        random = _collect_rng_states(self._cuda)
        _set_rng_states(self._random)
        with ExitStack() as stack:
            stack.callback(_set_rng_states, random)
            for place, name, value in self._changes:
                stack.enter_context(_in_place(place, name, value))
            for place, name, value in self._clones:
                stack.enter_context(_in_place(place, name, value.clone()))
            yield


class Taken:
    """An iterator that remembers what is taken out of it."""

    def __init__(self, source: Iterator[Any], *, clones: bool) -> None:
        self._source = source
        self._clones = clones
        self.items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._source)
        self.items.append(fresh(item, clones=self._clones))
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def fresh(batch: Any, *, clones: bool = False) -> Any:
    """A batch in containers of its own, from which ``training_step`` may take things out.

    Args:
        batch: any.
        clones: whether its tensors are its own as well.
    """
    if isinstance(batch, Tensor | Mapping | Sequence) or is_dataclass(batch):
        return apply_to_collection(batch, Tensor, _clone if clones else _same)
    return copy(batch)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()  # a subclass has its own, which keeps its attributes


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def without_broadcasts(model: Any) -> Iterator[None]:
    """Where the model is DistributedDataParallel, let it send no buffers."""
    if isinstance(model, DistributedDataParallel):
        with replaced(model, "require_forward_param_sync", False):
            yield
    else:
        yield


def replaced(thing: Any, name: str, value: Any) -> AbstractContextManager[None]:
    """Give an object an attribute of its own for a while."""
    return _in_place(vars(thing), name, value)


@contextmanager
def _in_place(place: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = place.get(name, _NOTHING)
    _set(place, name, value)
    try:
        yield
    finally:
        _set(place, name, before)


def _set(place: dict[str, Any], name: str, value: Any) -> None:
    if value is _NOTHING:
        place.pop(name, None)
    else:
        place[name] = value
