"""CUDA graphs, by a stand-in that does what they do: the same operations at the same addresses, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_optim import NaturalCG
from ngd_optim.recording import record
from ngd_optim.replaying import Recording, captured

MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()


class Graph(TorchDispatchMode):
    """Notes operations with the tensors themselves, and does them again."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What is given to a list is taken out of it afterwards.
        held = [list(a) if isinstance(a, list) else a for a in args]
        self.calls.append((func, held, dict(kwargs or {}), result))
        return result

    def replay(self) -> None:
        Graph.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if isinstance(result, Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


@contextmanager
def capture(graph: Graph, pool: Any = None) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(captured, "_share_pool", lambda: None)
    monkeypatch.setattr(captured, "_is_cuda", lambda v: True)
    monkeypatch.setattr(Graph, "replays", 0)
    return Graph


def by_graph(function: Any) -> Recording:
    _, recording = record(function, torch.randn(6).double())
    return Recording(recording.plan, recording.constants, captures=True)


def chain(v: Tensor) -> Tensor:
    a = (MATRIX @ v).view(2, 3)
    return torch.cat(
        [(a.t() * 2).add_(1).sub_(1).flatten()[:3], (a @ MATRIX[:3, :3]).flatten()[:3]]
    )


def test_a_graph_gives_what_the_function_gives(graphs: type[Graph]) -> None:
    recording = by_graph(chain)
    results = []
    for _ in range(4):
        v = torch.randn(6).double()
        results.append((recording(v), chain(v)))
    for result, expected in results:  # none was overwritten by the next one
        torch.testing.assert_close(result, expected)
    assert graphs.replays == 3


@pytest.mark.usefixtures("graphs")
def test_it_reads_the_constants_of_the_recording_that_is_called() -> None:
    first = by_graph(lambda v: MATRIX @ v)
    other = Recording(first.plan, [2 * c for c in first.constants], captures=True)
    v = torch.randn(6).double()
    for recording, factor in [(first, 1), (first, 1), (other, 2), (first, 1), (other, 2)]:
        torch.testing.assert_close(recording(v), factor * MATRIX @ v)


def test_steps_are_those_without_a_graph(graphs: type[Graph]) -> None:
    x, y = torch.randn(7, 30, 5).double(), torch.arange(30) % 3
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        NaturalCG(m.parameters(), max_cg_iters=6, cuda_graphs=graph)
        for m, graph in zip(models, (False, True), strict=True)
    ]
    for batch in x:
        before = graphs.replays
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(lambda m=model, b=batch: F.cross_entropy(m(b), y))
        assert graphs.replays > before
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_elsewhere_steps_are_as_without_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recording = by_graph(chain)
    with caplog.at_level("INFO", logger="ngd_optim"):
        for _ in range(4):
            v = torch.randn(6).double()
            torch.testing.assert_close(recording(v), chain(v))
    (message,) = [record.message for record in caplog.records]
    assert "without a CUDA graph, because cuda_graphs is for devices of CUDA" in message
