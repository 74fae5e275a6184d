"""What is recalled is what would be computed, and less is computed."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ngd_optim import linearize
from ngd_optim.recording import memory
from ngd_optim.recording.memory import Memory, Recall

W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
SHIFT = torch.randn(6, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(autouse=True)
def _everything_is_worth_remembering(monkeypatch):
    monkeypatch.setattr(memory, "WORTH_REMEMBERING", 0)


class Counted(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def twice(first, second=None):
    """What two runs gave, and what the second computed."""
    torch.manual_seed(3)
    with Memory() as seen:
        kept = first()
    torch.manual_seed(3)
    with Counted() as counted, Recall(seen):
        again = (second or first)()
    return kept, again, counted.calls


def chain():
    """Nothing keeps ``h``, and nothing but ``y`` needs it."""
    h = SHIFT @ W
    return h.tanh()


def saved_and_lost():
    h = W @ W
    y = h.exp()
    return y, h.sum(0)


def in_place():
    return (W @ W).relu_().exp().add_(1)


def view_written():
    h = W * 2
    h[0].zero_()
    return h @ W


def drawn():
    h = torch.bernoulli(torch.full((6, 6), 0.5)).double() @ W
    return h, torch.rand(6)


def several_results():
    values, places = (W * 2).max(0)
    return values * 1.0, places + 1


def numbers_that_are_equal():
    i = torch.arange(6)
    return i * 1, i * 1.0, i * True, torch.full((6,), 0.0) / -1.0, torch.full((6,), -0.0) / -1.0


def same_twice():
    return W @ W, W @ W


PROGRAMS = [chain, saved_and_lost, in_place, view_written, drawn, several_results, numbers_that_are_equal, same_twice]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_second_run_gives_the_same(program, keep):
    torch.manual_seed(3)
    expected = program()
    generator = torch.get_rng_state()

    def lost():
        program()

    _, again, _ = twice(program if keep else lost, program)
    assert torch.equal(torch.get_rng_state(), generator)
    for a, b in zip(_several(expected), _several(again), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert torch.equal(a.signbit(), b.signbit())


def _several(result):
    return result if isinstance(result, tuple) else (result,)


def test_what_is_kept_is_found():
    kept, again, calls = twice(chain)
    assert not calls["mm"] + calls["tanh"]
    assert again.data_ptr() == kept.data_ptr()


def test_what_is_lost_is_computed_once_and_only_if_it_is_needed():
    def first():
        return (W @ W).exp()

    y, again, calls = twice(first)
    assert not calls["mm"] + calls["exp"]

    def second():
        h = W @ W
        return h.exp(), h.sin(), h.cos()

    y, again, calls = twice(first, second)
    assert again[0].data_ptr() == y.data_ptr()
    assert torch.equal(again[1], (W @ W).sin())
    assert (calls["mm"], calls["exp"], calls["sin"], calls["cos"]) == (1, 0, 1, 1)


def test_results_that_are_put_off_in_a_row():
    def run():
        h = W
        for _ in range(5):
            h = h @ W + 1
        return h.tanh()

    def second():
        h = W
        for _ in range(5):
            h = h @ W + 1
        return h.tanh(), h.clone()

    _, _, calls = twice(run)
    assert not calls["mm"] + calls["add"] + calls["tanh"]
    _, (_, h), calls = twice(run, second)
    assert calls["mm"] == 5
    assert torch.equal(h.tanh(), run())


def test_what_was_written_to_is_not_given_back():
    def first():
        h = W @ W
        kept.append(h)
        return h.add_(1)

    kept = []
    _, again, calls = twice(first)
    assert calls["mm"] == 1
    assert again.data_ptr() != kept[0].data_ptr()
    assert torch.equal(again, W @ W + 1)


def test_a_write_to_what_was_given_back_is_refused():
    kept = (W @ W).clone()
    with pytest.raises(RuntimeError, match=r"add_.* changes in place what it did not change"):
        twice(lambda: W @ W, lambda: (W @ W).add_(1))
    assert torch.equal(kept, W @ W)


def test_nothing_is_kept_alive():
    with Memory() as seen:
        kept = (W @ W).tanh()
    (dead,), (alive,) = (results for results in seen.results.values())
    assert dead.storage.expired()
    assert not alive.storage.expired()
    del kept
    assert alive.storage.expired()


def test_small_results_are_not_remembered(monkeypatch):
    monkeypatch.setattr(memory, "WORTH_REMEMBERING", W.numel() * 8 + 1)
    _, _, calls = twice(chain)
    assert calls["tanh"] == 1


@pytest.mark.usefixtures("forward_mode")
def test_a_product_shares_the_memory_of_the_traced_run():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    with Counted() as counted:
        point.curvature(torch.ones_like(point.gradient))
    assert (counted.calls["addmm"], counted.calls["tanh"], counted.calls["gelu"]) == (0, 0, 0)
    # Forward two matrix products a layer and one for the input, which has no tangent; back two and one likewise.
    assert counted.calls["mm"] == 2 * (3 + 2) + 1


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Softmax(-1), nn.LayerNorm(4)])
def test_products_are_the_same_without_memory(module):
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    products = []
    for worth in (0, 2**40):
        memory.WORTH_REMEMBERING = worth
        torch.manual_seed(0)
        point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
        products.append([point.curvature(v) for v in torch.eye(len(point.gradient), dtype=torch.float64)])
    assert all(torch.equal(a, b) for a, b in zip(*products, strict=True))


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_checkpoint_recalls_no_random_numbers_of_another_pass(size, request):
    if size == "large":
        request.getfixturevalue("forward_mode")
    x, y, inner, outer = torch.randn(512, 64), torch.arange(512) % 5, nn.Linear(64, 64), nn.Linear(64, 5)
    params = [*inner.parameters(), *outer.parameters()]

    def block(x):
        return torch.tanh(inner(F.dropout(x, 0.5)))

    def twice(checkpointed):
        passes = [checkpoint(block, x, use_reentrant=False) if checkpointed else block(x) for _ in range(2)]
        return sum(F.cross_entropy(outer(z), y) for z in passes)

    v = torch.randn(sum(p.numel() for p in params))
    products = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        point = linearize(lambda checkpointed=checkpointed: twice(checkpointed), params)
        products.append([point.curvature(v), point.curvature(v)])
    for plain, found in zip(*products, strict=True):
        assert (found - plain).norm() <= 1e-6 * plain.norm()
