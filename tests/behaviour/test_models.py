"""Every kind of model, against matrices built row by row with plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import (
    BATCH,
    CASES,
    CLASSES,
    FEATURES,
    LOSSES,
    Apply,
    Problem,
    as_problem,
    mlp,
    tokens,
    vector,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ngd_optim import NaturalCG, linearize


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["torch.func", "double-backward"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_product_are_the_dense_ones(name, backend, loss, dtype):
    problem = Problem(CASES[name], loss, dtype)
    if backend == "torch.func" and CASES[name].backend != backend:
        with pytest.raises(
            RuntimeError, match=r"cannot form the products of this closure.*use backend='auto'"
        ):
            linearize(problem.closure, problem.params, backend=backend)
        return
    gradient, matrix = problem.dense()
    point = linearize(problem.closure, problem.params, backend=backend)
    assert point.backend == backend
    rtol = 1e-9 if dtype == torch.float64 else 2e-4
    assert (point.gradient - gradient).norm() <= rtol * gradient.norm()
    for _ in range(2):
        v = torch.randn_like(gradient)
        assert (point.curvature(v) - matrix @ v).norm() <= rtol * (matrix @ v).norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_double_backward_is_taken_where_both_are_right(name):
    """It runs the closure once less; but not for convolutions, where that is the cheaper part."""
    problem = Problem(CASES[name], "cross_entropy", torch.float64)
    point = linearize(problem.closure, problem.params)
    assert point.backend == ("torch.func" if name == "conv" else "double-backward")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_steps_lower_the_loss(name):
    problem = Problem(CASES[name], "cross_entropy", torch.float64)
    optimizer = NaturalCG(problem.model.parameters())
    for _ in range(3):
        before = optimizer.step(problem.closure)
        report = optimizer.last_step
        assert report.accepted
        assert report.new_loss < report.loss == before.item()


def test_batch_norm_statistics_move_once_a_step():
    problem = Problem(CASES["batch_norm"], "cross_entropy", torch.float64)
    reference = copy.deepcopy(problem.model)
    optimizer = NaturalCG(problem.model.parameters())
    for step in range(1, 4):
        reference.load_state_dict(dict(problem.model.named_parameters()), strict=False)
        reference(problem.x)
        optimizer.step(problem.closure)
        assert problem.model[1].num_batches_tracked == step
        for mine, plain in zip(problem.model.buffers(), reference.buffers(), strict=True):
            assert torch.equal(mine, plain)


def test_a_gradient_changed_after_backward_is_refused():
    model, x, y = mlp(), vector(), torch.randint(0, CLASSES, (BATCH,))
    optimizer = NaturalCG(model.parameters())
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    with pytest.raises(RuntimeError, match="the closure changes the gradients after backward"):
        optimizer.step(closure)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def half(model, x, y):
    model, x = model.half(), x.half()
    return lambda: F.cross_entropy(model(x).float(), y), TypeError


def half_in_a_part(model, x, y):
    model[-1].half()
    return lambda: F.cross_entropy(model[-1](model[:-1](x).half()).float(), y), TypeError


def autocast(dtype, of=lambda z, y: F.cross_entropy(z.float(), y)):
    def make(model, x, y):
        def closure():
            with torch.autocast("cpu", dtype=dtype):
                z = model(x)
            return of(z, y)

        return closure, RuntimeError

    return make


def around_the_loss(model, x, y):
    def closure():
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(x), y)

    return closure, RuntimeError


def cast_in_the_middle(model, x, y):
    return lambda: F.cross_entropy(model[-1](model[:-1](x).half().float()), y), RuntimeError


def through_a_frozen_part(model, x, y):
    last = nn.Linear(CLASSES, CLASSES).half().requires_grad_(False)
    return lambda: F.cross_entropy(last(model(x).half()).float(), y), RuntimeError


FLOAT16 = {
    "parameters": half,
    "some parameters": half_in_a_part,
    "the loss in it": around_the_loss,
    "logits cast back": autocast(torch.float16),
    "a distribution": autocast(
        torch.float16,
        lambda z, y: (F.cross_entropy(z.float(), y), torch.distributions.Categorical(logits=z)),
    ),
    "a loss by hand": autocast(torch.float16, lambda z, y: z.float().square().mean()),
    "a cast in the middle": cast_in_the_middle,
    "a frozen part": through_a_frozen_part,
}


class TestRefusals:
    def test_reentrant_checkpointing(self):
        model = Apply(
            lambda m, x: checkpoint(m.net, x.requires_grad_(), use_reentrant=True), net=mlp()
        )
        x, y = vector(), torch.randint(0, CLASSES, (BATCH,))
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            NaturalCG(model.parameters()).step(lambda: F.cross_entropy(model(x), y))

    def test_sparse_gradients(self):
        model = Apply(
            lambda m, x: m.head(m.table(x).mean(1)),
            table=nn.Embedding(7, 4, sparse=True),
            head=nn.Linear(4, CLASSES),
        )
        x, y = tokens(), torch.randint(0, CLASSES, (BATCH,))
        with pytest.raises(ValueError, match="Embedding\\(sparse=False\\)"):
            NaturalCG(model.parameters()).step(lambda: F.cross_entropy(model(x), y))

    @pytest.mark.parametrize("case", FLOAT16)
    def test_float16(self, case):
        model, x, y = mlp(), vector(), torch.randint(0, CLASSES, (BATCH,))
        closure, kind = FLOAT16[case](model, x, y)
        optimizer = NaturalCG(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            with pytest.raises(kind, match="bfloat16"):
                optimizer.step(closure)
        for p, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, value)

    def test_float16_after_bfloat16(self):
        model, x, y = mlp(), vector(), torch.randint(0, CLASSES, (BATCH,))
        optimizer = NaturalCG(model.parameters())
        optimizer.step(autocast(torch.bfloat16)(model, x, y)[0])
        with pytest.raises(RuntimeError, match="bfloat16"):
            optimizer.step(autocast(torch.float16)(model, x, y)[0])

    def test_float16_that_no_derivative_passes_is_fine(self):
        model, y = mlp(), torch.randint(0, CLASSES, (BATCH,))
        features, x = nn.Linear(FEATURES, FEATURES).half(), vector().half()
        seen = []

        def closure():
            with torch.no_grad():
                there = features(x).float()
            z = model(there)
            seen.append(z.detach().half())
            return F.cross_entropy(z, y)

        optimizer = NaturalCG(model.parameters())
        optimizer.step(closure)
        assert optimizer.last_step.accepted


def test_bfloat16_autocast_solves_in_float32():
    model, x, y = mlp(), vector(), torch.randint(0, CLASSES, (BATCH,))

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    _, matrix = Problem.dense(as_problem(model, x, y))
    point = linearize(closure, model.parameters())
    v = torch.randn(len(matrix))
    assert point.curvature(v).dtype == point.gradient.dtype == torch.float32
    assert (point.curvature(v) - matrix @ v).norm() <= 0.03 * (matrix @ v).norm()
    optimizer = NaturalCG(model.parameters())
    optimizer.step(closure)
    assert optimizer.last_step.accepted
