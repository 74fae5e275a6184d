"""The examples of the library's parts run, draw, and say what is true."""

import re

import pytest
import torch
from helpers.scripts import run_example


@pytest.fixture(autouse=True)
def dtype_restored():
    yield
    torch.set_default_dtype(torch.float32)


def test_a_laplace_approximation_calibrates(tmp_path, capsys):
    _, printed = run_example("laplace", tmp_path, capsys, "--train", "300", "--rounds", "2")
    rows = re.findall(r"likelihood (\S+), off by (\S+)%", printed)
    (network, laplace, evidence) = ([float(v) for v in row] for row in rows)
    for better in (laplace, evidence):
        assert better[0] < 0.8 * network[0]
        assert better[1] < 0.8 * network[1]


def test_influence_functions_find_wrong_labels(tmp_path, capsys):
    _, printed = run_example("influence", tmp_path, capsys, "--train", "200", "--retrained", "5")
    assert int(re.findall(r"(\d+)% of the wrong labels", printed)[0]) > 60
    exact, anew = (float(v) for v in re.findall(r"correlation with .+: (\S+)", printed))
    assert exact >= 0.9
    assert anew >= 0.9


@pytest.mark.parametrize("samples", [0, 500])
def test_variational_monte_carlo_finds_the_ground_energy(samples, tmp_path, capsys):
    arguments = ("--spins", "6", "--features", "2", "--steps", "60", "--samples", str(samples))
    _, printed = run_example("vmc_ising", tmp_path, capsys, *arguments)
    # Of a ring at h = 1: −Σ_k √(2 − 2 cos k) over k = π (2 m + 1) / 6 (Pfeuty 1970).
    k = torch.pi * (2 * torch.arange(6) + 1).double() / 6
    exact = -(2 - 2 * k.cos()).sqrt().sum().item()
    assert float(re.findall(r"exact energy: (\S+)", printed)[0]) == pytest.approx(exact, abs=1e-6)
    adam, natural = (float(error) for error in re.findall(r"relative error (\S+) after", printed))
    assert natural < (5e-3 if samples else 1e-3)
    assert natural < adam
