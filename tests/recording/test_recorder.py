"""What is replayed is what was recorded."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, Problem
from helpers.products import product_by
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_optim import NaturalCG, linearize
from ngd_optim.linearization.backend import Way
from ngd_optim.program import CannotReplayError
from ngd_optim.recording import record
from ngd_optim.replaying import Recording

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def vector(n=6):
    return torch.randn(n, dtype=torch.float64)


MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
OTHER = torch.randn(6, generator=torch.Generator().manual_seed(1)).double()

LINEAR = {
    "matmul": lambda v: MATRIX @ v,
    "identity": lambda v: v,
    "zero": lambda v: torch.zeros(6, dtype=torch.float64),
    "constant_added_and_taken_away": lambda v: (v + OTHER) - OTHER,
    "two_paths": lambda v: MATRIX @ v + OTHER * v,
    "product_used_twice": lambda v: (lambda p: (v.view(2, 3) + p).flatten() + p.flatten())(
        v.view(2, 3) @ MATRIX[:3, :3]
    ),
    "in_place_on_own_memory": lambda v: (v * OTHER).add_(v).mul_(2),
    "view_changed_in_place": lambda v: _negated_head(v * 1.0),
    "filled": lambda v: torch.empty_like(v).copy_(v) * 3,
    "several_results": lambda v: torch.cat(
        [part * (i + 1) for i, part in enumerate(v.split([1, 2, 3]))]
    ),
    "added_zeros": lambda v: (v[:3] + torch.zeros(2, 3, dtype=torch.float64)).flatten() * OTHER,
    "added_zeros_then_product": lambda v: (
        v[:3] + torch.zeros(3, 3, dtype=torch.float64) + v.view(3, 2) @ MATRIX[:2, :3]
    ).flatten()[:6],
    "same_tensor_twice": lambda v: (v + v) * OTHER,
    "result_read_again": lambda v: (lambda a: torch.cat([a, a + v])[3:9])(v * OTHER),
    "vector_times_matrix": lambda v: v @ MATRIX + torch.zeros(6, dtype=torch.float64),
    "dead_code": lambda v: (torch.sin(v).sum(), v * 2)[1],
    "views_of_views": lambda v: (
        lambda a: torch.cat([a.t().t().flatten(), a[1:].t()[1:].flatten(), a[1, 1:]])
    )((v * OTHER).view(2, 3))[:6],
    "view_of_a_copied_slice": lambda v: torch.cat(
        [_filled((v * OTHER)[2:4]).view(2, 1).t().flatten(), v[:4]]
    ),
    "view_of_a_copied_piece_of_the_vector": lambda v: torch.cat(
        [_filled(v[2:4]).view(2, 1).t().flatten(), v[:4]]
    ),
    "overlapping_views": lambda v: (v * OTHER).unfold(0, 3, 1).sum(1).repeat(2)[:6],
    "reshaped_and_reused": lambda v: (lambda a: (a.view(2, 3).t() * 2).t().reshape(6) + a[:1])(
        v * OTHER
    ),
    "added_zeros_of_its_own": lambda v: (v * OTHER + torch.zeros_like(v)) * 2,
    "zeros_that_are_filled": lambda v: (lambda z: v * OTHER + z.add_(v))(torch.zeros_like(v)),
    "writes_that_nobody_reads": lambda v: (lambda a, b: (b.mul_(2), a)[1])(v * OTHER, v + v),
    "a_write_through_a_view": lambda v: (lambda a: (a.view(2, 3)[1].mul_(3), a)[1])(v * OTHER),
    "a_read_before_a_write": lambda v: (lambda a, b: (b, a.add_(v))[0] + a)(
        *(lambda a: (a, a * 2))(v * OTHER)
    ),
    "log_softmax_backward": lambda v: torch.ops.aten._log_softmax_backward_data(
        v.view(2, 3), MATRIX[:2, :3].log_softmax(-1), -1, torch.float64
    ).flatten(),
    "squeezed_in_place": lambda v: (v * OTHER).view(1, 6).squeeze_(0) + v,
    "one_of_several_results": lambda v: torch.ops.aten.var_mean.correction(
        v.view(1, 6), [0], correction=0
    )[1],
    "batched_product": lambda v: (
        v.view(2, 3, 1) + v.view(2, 3, 1) @ MATRIX[:2, :1].view(2, 1, 1)
    ).flatten(),
}


def _filled(t):
    return torch.ops.aten._new_zeros_with_same_feature_meta(t, torch.empty(2, dtype=t.dtype)).copy_(
        t
    )


def _negated_head(t):
    t[:3].neg_()
    return t


@pytest.mark.parametrize("name", LINEAR)
def test_replay_equals_the_function(name):
    function, v = LINEAR[name], vector()
    before = v.clone()
    result, recording = record(function, v)
    assert torch.equal(result, function(before))
    for w in [vector() for _ in range(3)]:
        kept = w.clone()
        first, second = recording(w), recording(w)
        assert torch.equal(w, kept)
        assert torch.allclose(first, function(w), rtol=1e-14, atol=1e-14)
        assert torch.equal(first, second)
    assert torch.equal(v, before)


@pytest.mark.parametrize("name", LINEAR)
def test_replay_on_vectors_that_lie_in_other_ways(name):
    function = LINEAR[name]
    _, recording = record(function, vector())
    matrix = torch.randn(3, 12, dtype=torch.float64)
    for w in [
        matrix[1, 3:9],
        matrix[1, ::2],
        matrix.view(-1)[::6],
        vector().view(2, 3).t().flatten(),
    ]:
        assert torch.allclose(recording(w), function(w.clone()), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", LINEAR)
def test_replay_on_the_same_vector_with_other_values(name):
    function, w = LINEAR[name], vector()
    _, recording = record(function, w)
    for change in [
        lambda: None,
        lambda: w.mul_(2),
        lambda: w.copy_(vector()),
        lambda: setattr(w, "data", vector()),
    ]:
        change()
        assert torch.allclose(recording(w), function(w.clone()), rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("error")
def test_memory_of_a_replay_keeps_its_shape():
    # A product with a vector squeezes what it has computed in place, and torch resizes no result in silence.
    _, recording = record(LINEAR["vector_times_matrix"], vector())
    for _ in range(3):
        w = vector()
        assert torch.allclose(recording(w), LINEAR["vector_times_matrix"](w), rtol=1e-14, atol=0)


def test_results_do_not_share_memory():
    for function in LINEAR.values():
        _, recording = record(function, vector())
        first = recording(vector())
        kept = first.clone()
        recording(vector())
        assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", ["torch.func", "double-backward"])
@pytest.mark.parametrize("name", CASES)
def test_every_model(name, backend):
    if backend == "torch.func" and CASES[name].backend != backend:
        backend = CASES[name].backend
    problem = Problem(CASES[name], "cross_entropy", torch.float64)

    def product(recorded):
        return product_by(Way(backend, recorded), problem.closure, problem.params)

    state, buffers = torch.get_rng_state(), copy.deepcopy(problem.model.state_dict())
    vectors = [vector(sum(p.numel() for p in problem.params)) for _ in range(3)]
    torch.set_rng_state(state)
    direct = product(recorded=False)
    expected = [direct(v) for v in vectors]
    problem.model.load_state_dict(buffers)
    torch.set_rng_state(state)
    replayed = product(recorded=True)
    for v, image in zip(vectors, expected, strict=True):
        assert (replayed(v) - image).norm() <= 1e-12 * image.norm()
    assert isinstance(replayed._formed.product, Recording)


def test_a_hessian_is_replayed():
    model, x = nn.Linear(3, 2).double(), vector().view(2, 3)
    point = linearize(lambda: model(x).abs().pow(3).sum(), model.parameters())
    matrix = torch.stack([point.curvature(e) for e in torch.eye(8, dtype=torch.float64)])
    again = torch.stack([point.curvature(e) for e in torch.eye(8, dtype=torch.float64)])
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    assert torch.equal(matrix[1:], again[1:])


UNREPLAYABLE = {
    "random": lambda v: v * torch.bernoulli(v.clamp(0, 1)),
    "value_read": lambda v: v * v.sum().item(),
    "branch": lambda v: v if v.sum() > 0 else -v,
    "shape_from_values": lambda v: v[v > 0],
    "written_elsewhere": lambda v: torch.zeros(6, dtype=torch.float64).copy_(v),
}


@pytest.mark.parametrize("name", UNREPLAYABLE)
def test_what_cannot_be_replayed_is_refused(name):
    with pytest.raises(CannotReplayError):
        record(UNREPLAYABLE[name], vector())


class ReadsGradient(torch.autograd.Function):
    """Its backward's backward reads values of what it is given."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return Again.apply(g)


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g):
        return g * 1.0

    @staticmethod
    def backward(ctx, t):
        return t * 1.0 if t.abs().sum().item() >= 0 else t


def test_a_product_that_cannot_be_recorded_is_formed_directly(caplog):
    model, x, y = nn.Linear(3, 2).double(), vector().view(2, 3), torch.tensor([0, 1])
    optimizer = NaturalCG(model.parameters(), backend="double-backward")
    with caplog.at_level("INFO", logger="ngd_optim"):
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(ReadsGradient.apply(model(x)), y))
            assert optimizer.last_step.accepted
    assert len([r for r in caplog.records if "cannot be recorded" in r.message]) == 1


def test_long_chains_of_small_operations_are_not_recorded(caplog):
    """Autograd's engine is as fast as a replay, and to record one takes long."""
    model, x, y = (
        nn.GRU(3, 4, batch_first=True).double(),
        torch.randn(5, 60, 3).double(),
        torch.randn(5, 4).double(),
    )

    def point(steps):
        return linearize(lambda: F.mse_loss(model(x[:, :steps])[1][0], y), model.parameters())

    with caplog.at_level("INFO", logger="ngd_optim"):
        short, long = point(5), point(60)
    assert [point._point.product.ways[0].recorded for point in (short, long)] == [True, False]
    assert [("small operations takes longer" in record.message) for record in caplog.records] == [
        True
    ]
    v = torch.randn_like(long.gradient)
    product = long.curvature(v)
    recorded = product_by(
        Way("torch.func", recorded=True),
        lambda: F.mse_loss(model(x)[1][0], y),
        list(model.parameters()),
    )
    assert (product - recorded(v)).norm() <= 1e-10 * product.norm()


def test_rounding_in_the_middle_of_a_model_is_no_reason_against_a_recording():
    """Its outputs are float32, and what bfloat16 lost before is lost otherwise in a replay."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 4

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    point = linearize(closure, model.parameters())
    exact = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    assert point._point.product.ways[0].recorded
    for _ in range(2):
        v = torch.randn_like(point.gradient)
        assert (point.curvature(v) - exact.curvature(v)).norm() <= 0.05 * exact.curvature(v).norm()


def test_memory_is_released():
    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.token = Token()
            tokens.append(weakref.ref(ctx.token))
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        pass

    tokens = []
    model, x, y = nn.Linear(3, 2).double(), vector().view(2, 3), torch.tensor([0, 1])
    optimizer = NaturalCG(model.parameters())
    gc.disable()
    try:
        optimizer.step(lambda: F.cross_entropy(Held.apply(model(x)), y))
        optimizer.step(lambda: F.cross_entropy(Held.apply(model(x)), y))
        assert len(tokens) == 2
        assert not [token for token in tokens if token() is not None]
    finally:
        gc.enable()


def test_a_replay_does_what_the_mathematics_asks_for():
    """For each layer two matrix products forward and two back, less two for the input, which has no tangent."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    v = torch.ones_like(point.gradient)
    point.curvature(v)
    point.curvature(v)
    calls = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func).split(".")[1]] += 1
            return func(*args, **(kwargs or {}))

    with Counted():
        point.curvature(v)
    products = {"addmm": 2 * 3 - 1, "mm": 2 * 3 - 1}
    # Nothing that only looks at memory; the vector is copied to where it is read.
    rest = {"tanh_backward": 2 * 2, "mul": 1, "sum": 3, "_log_softmax_backward_data": 1, "cat": 1}
    rest |= {"copy_": 1}
    assert calls == products | rest


class TestOperationCounts:
    """A step does nothing twice."""

    def counted(self, backend):
        model, x, y = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
            vector().view(2, 3),
            torch.tensor([0, 1]),
        )
        calls = [0]

        def closure():
            calls[0] += 1
            return F.cross_entropy(model(x), y)

        optimizer = NaturalCG(
            model.parameters(), damping=1e-3, cg_progress_tol=0.0, backend=backend
        )
        optimizer.step(closure)
        calls[0] = 0
        return optimizer, closure, calls

    @pytest.mark.parametrize("backend", ["torch.func", "double-backward"])
    def test_a_closure_runs_once_a_step(self, backend):
        optimizer, closure, calls = self.counted(backend)
        for _ in range(3):
            calls[0] = 0
            optimizer.step(closure)
            report = optimizer.last_step
            assert report.backend == backend
            assert calls[0] == 1
            assert report.n_forward == 1 + report.backtracks + 1
            assert report.n_product == report.cg_iters + 1

    def test_backwards_are_the_gradient_and_the_recording(self, monkeypatch):
        optimizer, closure, _ = self.counted("torch.func")
        model_backwards, grad = [], torch.autograd.grad

        def counting(outputs, inputs, *args, **kwargs):
            if any(isinstance(t, nn.Parameter) for t in inputs):
                model_backwards.append(1)
            return grad(outputs, inputs, *args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counting)
        optimizer.step(closure)
        assert optimizer.last_step.n_product > 3
        assert len(model_backwards) == 2
