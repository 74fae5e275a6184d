"""The examples of least squares run, draw, and say what is true."""

import re

import pytest
import torch
from helpers.scripts import run_example


@pytest.fixture(autouse=True)
def dtype_restored():
    yield
    torch.set_default_dtype(torch.float32)


def test_curve_fitting_prints_certified_values(tmp_path, capsys):
    module, printed = run_example("curve_fitting", tmp_path, capsys)
    rows = [
        [float(v) for v in re.findall(r"-?\d[\d.e+-]*", line)[1:]]
        for line in printed.splitlines()
        if "±" in line
    ]
    rows = [row for row in rows if len(row) == 4]
    assert len(rows) == len(module.CERTIFIED) == 7
    for value, error, certified, certified_error in rows:
        assert value == pytest.approx(certified, rel=1e-6)
        assert error == pytest.approx(certified_error, rel=1e-4)


def test_poisson_compares_three_methods(tmp_path, capsys):
    module, printed = run_example(
        "pinn_poisson", tmp_path, capsys, "--seconds", "0.5", "--hidden", "8"
    )
    errors = {
        method: float(e)
        for method, e in re.findall(r"(\S+): RMS error (\S+) after 0.5 seconds", printed)
    }
    assert set(errors) == set(module.COLORS)
    assert all(error < 1 for error in errors.values())


def test_burgers_equation_and_its_exact_solution(tmp_path, capsys):
    module, printed = run_example(
        "pinn_burgers", tmp_path, capsys, "--seconds", "0.5", "--points", "100"
    )
    assert re.search(r"relative error \S+ after [1-9]\d* steps", printed)
    points = torch.tensor([[0.3, 0.2], [0.5, -0.4], [0.8, 0.7]], dtype=torch.float64)
    viscosity = 0.1
    residual = module.equation(
        lambda p: module.exact(p[:, 0], p[:, 1], viscosity), points, viscosity
    )
    assert residual.abs().max() < 1e-10
    at_start = module.exact(torch.full((3,), 1e-12, dtype=torch.float64), points[:, 1], viscosity)
    torch.testing.assert_close(at_start, -torch.sin(torch.pi * points[:, 1]), rtol=1e-5, atol=1e-5)
