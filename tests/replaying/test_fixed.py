"""Programs in memory of their own: what they hold, and whose constants they read."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.problems import real
from torch import Tensor

from ngd_optim.recording import record
from ngd_optim.replaying import Recording, fixed
from ngd_optim.replaying.fixed import FixedCalls

MATRIX = real(6, 6)


def chain(v: Tensor) -> Tensor:
    return torch.cat([(MATRIX @ v).mul(2)[:3], (MATRIX.t() @ v).view(2, 3).t().flatten()])


def prepared(v: Tensor) -> Recording:
    _, recording = record(chain, v)
    for _ in range(2):
        recording(v)
    assert recording.plan.prepared[FixedCalls] is not None
    return recording


def test_other_vectors_are_copied_to_where_it_is_read() -> None:
    recording = prepared(real(6))
    for v in (real(6), real(12)[::2], real(6).requires_grad_()):
        result = recording(v)
        torch.testing.assert_close(result, chain(v.detach()))
        assert not result.requires_grad


def test_results_are_not_overwritten() -> None:
    recording, u, v = prepared(real(6)), real(6), real(6)
    first, second = recording(u), recording(v)
    torch.testing.assert_close(first, chain(u))
    torch.testing.assert_close(second, chain(v))


def test_recordings_of_one_plan_take_turns() -> None:
    first, v = prepared(real(6)), real(6)
    second = Recording(first.plan, [3 * constant for constant in first.constants])
    for recording, factor in [(second, 3), (first, 1), (second, 3), (second, 3), (first, 1)]:
        torch.testing.assert_close(recording(v), factor * chain(v))


def test_constants_go_with_their_recording() -> None:
    first, v = prepared(real(6)), real(6)
    second = Recording(first.plan, [constant.clone() for constant in first.constants])
    second(v)
    held = [weakref.ref(constant) for constant in second.constants]
    gc.disable()
    try:
        del second
        assert not [one for one in held if one() is not None]
    finally:
        gc.enable()
    torch.testing.assert_close(first(v), chain(v))


def test_memory_is_given_up_and_had_again() -> None:
    recording, v = prepared(real(6)), real(6)
    recording.plan.let_go()
    assert not recording.plan.prepared
    torch.testing.assert_close(recording(v), chain(v))
    assert recording.plan.prepared


@pytest.mark.parametrize("held", [fixed._HELD, -1])
def test_threads_get_their_own_products(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "_HELD", held)
    matrix, vectors = real(200, 200), real(400, 200)

    def product(v: Tensor) -> Tensor:
        return (matrix.t() @ torch.tanh(matrix).mul(2).mm((matrix @ v).view(-1, 1))).flatten()

    _, recording = record(product, vectors[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(recording, vectors))
    expected = [product(v) for v in vectors]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
