"""Each pass over a recorded program, by the operations that it leaves; what they compute is the same."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_optim.recording import record
from ngd_optim.replaying import fixed, passes

A, B = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
PASSES = {
    "_remove_added_zeros": lambda program, *_: program,
    "_collapse_views": lambda program, *_: program,
    "_fuse_products": lambda program, *_: program,
    "_reuse_memory": lambda *_: None,
    "_split_off_views": lambda program: ([], program),
}
"""Each with what takes its place where it is left out."""


def views_of_the_vector(v):
    return v[:3] * v.new_ones(3) + v[3:6].view(3) * 2


def zeros_added(v):
    return (v[:3] * A[0] + torch.zeros(3).double()) * 2


def views_of_views(v):
    h = (v.view(3, 3) * A).t()
    return h.t().reshape(9)[:3] + h[0] + h.t()[:, 0].view(3)


def product_and_sum(v):
    w = v.view(3, 3) * 2
    return (w @ A + w).sum(0)


def pointwise_chain(v):
    return ((v[:3] * 2).mul(A[0]).add(B[0] - B[0])).mul(3.0)


CASES = {
    "_remove_added_zeros": (zeros_added, Counter({"add": 1})),
    "_collapse_views": (views_of_views, Counter({"t": 1})),
    "_fuse_products": (product_and_sum, Counter({"mm": 1, "add": 1})),
}
"""By pass, a function and operations that are gone with it."""


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.fresh = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls[str(func).split(".")[1]] += 1
        is_view = func.is_view or "as_strided" in str(func)
        self.fresh += not (
            is_view or any(a.is_out and a.name in kwargs for a in func._schema.arguments)
        )
        return result


def replay(function, monkeypatch, without=()):
    """The result for a vector, and the operations of a replay on a vector that comes again."""
    monkeypatch.setattr(fixed, "_HELD", 0)  # else views are made once, and so is memory
    for name in without:
        monkeypatch.setattr(passes, name, PASSES[name])
    _, recording = record(function, torch.randn(9).double())
    v = torch.arange(9.0).double()
    recording(v)
    with Counted() as counted:
        result = recording(v)
    monkeypatch.undo()
    torch.testing.assert_close(result, function(v))
    return counted


@pytest.mark.parametrize("name", CASES)
def test_a_pass_leaves_operations_out(name, monkeypatch):
    function, gone = CASES[name]
    shorter = replay(function, monkeypatch)
    longer = replay(function, monkeypatch, without=[name])
    assert gone <= longer.calls - shorter.calls
    assert longer.calls.total() > shorter.calls.total()


def test_views_of_the_vector_are_kept_while_it_is_the_same(monkeypatch):
    shorter = replay(views_of_the_vector, monkeypatch)
    longer = replay(views_of_the_vector, monkeypatch, without=["_split_off_views"])
    assert not shorter.calls["slice"] + shorter.calls["view"]
    assert longer.calls["slice"] == 2


def test_results_are_written_over_arguments_that_end_there(monkeypatch):
    reusing = replay(pointwise_chain, monkeypatch)
    fresh = replay(pointwise_chain, monkeypatch, without=["_reuse_memory"])
    assert reusing.calls == fresh.calls
    assert reusing.fresh < fresh.fresh


@pytest.mark.parametrize(
    "function",
    [views_of_the_vector, zeros_added, views_of_views, product_and_sum, pointwise_chain],
)
def test_without_any_pass_the_result_is_the_same(function, monkeypatch):
    replay(function, monkeypatch, without=list(PASSES))
