"""The examples of the library's parts run, draw, and say what is true."""

import math
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


def dense_energy(spins: int, angle: float) -> float:
    """The least eigenvalue of ``−Σ ZZ − Σ (cos φ X + sin φ Y)``, from Pauli matrices."""
    phase = torch.polar(torch.ones(()), torch.tensor(-angle)).to(torch.complex128)
    up, field = torch.diag(torch.tensor([1, -1])), torch.zeros(2, 2, dtype=torch.complex128)
    field[0, 1], field[1, 0] = phase, phase.conj()

    def at(places: dict[int, torch.Tensor]) -> torch.Tensor:
        result = torch.ones(1, 1, dtype=torch.complex128)
        for i in range(spins):
            result = torch.kron(result, places.get(i, torch.eye(2)).to(result))
        return result

    H = -sum(at({i: up, (i + 1) % spins: up}) + at({i: field}) for i in range(spins))
    return torch.linalg.eigvalsh(H)[0].item()


@pytest.mark.parametrize(("samples", "angle"), [(0, 0), (500, 0), (0, 60)])
def test_variational_monte_carlo_finds_the_ground_energy(samples, angle, tmp_path, capsys):
    options = {"spins": 6, "features": 2, "steps": 60, "samples": samples, "angle": angle}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    _, printed = run_example("vmc_ising", tmp_path, capsys, *arguments)
    exact = dense_energy(6, math.radians(angle))
    assert float(re.findall(r"exact energy: (\S+)", printed)[0]) == pytest.approx(exact, abs=1e-6)
    adam, natural = (float(error) for error in re.findall(r"relative error (\S+) after", printed))
    assert natural < (5e-3 if samples else 1e-3)
    assert natural < adam
