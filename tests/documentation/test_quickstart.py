"""The first thing that a new user runs: it runs, says what happened, and refuses nonsense."""

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.mnist_files import write_mnist
from helpers.scripts import EXAMPLES, load_script
from matplotlib.image import imread


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; with a wide terminal, so that no table cell wraps."""
    monkeypatch.setenv("COLUMNS", "160")
    return load_script(EXAMPLES / "quickstart.py")


def rows(printed: str, method: str) -> list[list[str]]:
    """The cells of the method's rows in the tables; progress bars left out."""
    lines = [
        line for line in printed.splitlines() if line.strip().startswith(method) and "━" not in line
    ]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_compares_all_methods_on_both_tasks(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curves.png"
    quickstart.main(["--seconds", "0.2", "--figure", str(picture)])
    printed = capsys.readouterr().out
    assert str(picture) in printed
    for method in ("Adam, lr", "L-BFGS", "NaturalCG"):
        classifier, autoencoder = rows(printed, method)
        for label, loss, _accuracy, seconds, steps, gradients, products in (
            classifier,
            autoencoder,
        ):
            assert math.isfinite(float(loss))
            assert float(seconds) > 0
            assert 0 < int(steps) <= int(gradients)
            assert (int(products) > 0) == label.startswith("NaturalCG")
        assert re.fullmatch(r"\d+\.\d% \d+\.\d%", classifier[2])
        assert autoencoder[2] == "-"
    assert float(classifier[1]) < math.log(
        10
    )  # better than a guess, after however few steps of NaturalCG
    assert float(autoencoder[1]) < 64 * math.log(2)
    height, width = imread(picture).shape[:2]
    assert width > height > 600


def test_mnist_is_read_from_torchvisions_files(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchvision")
    images, labels = write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    X, y = quickstart.load_images("mnist")
    assert X.shape == (50, 784)
    torch.testing.assert_close(X, torch.tensor(images.reshape(50, 784) / 255, dtype=torch.float32))
    assert y.tolist() == labels.tolist()

    quickstart.main(["--data", "mnist", "--seconds", "0.05", "--figure", "curves.png"])
    printed = capsys.readouterr().out
    for method in ("Adam, lr", "L-BFGS", "NaturalCG"):
        assert [math.isfinite(float(loss)) for _, loss, *_ in rows(printed, method)] == [True, True]
    assert Path("curves.png").exists()


def test_counts_what_lbfgs_evaluates(quickstart: ModuleType) -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([parameter], line_search_fn="strong_wolfe")
    values = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (torch.tensor([1.0, 10.0]) * parameter**2).sum()
        loss.backward()
        values.append(loss.item())
        return loss

    steps = quickstart.lbfgs_step(optimizer, closure)
    assert [step.loss for step in steps] == [min(values[: i + 1]) for i in range(len(values))]
    assert sum(step.gradients for step in steps) == len(values)
    assert sum(step.steps for step in steps) == optimizer.state[parameter]["n_iter"]


def test_adam_gets_the_best_of_its_rates(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        quickstart.METHODS,
        "Adam",
        (torch.optim.Adam, quickstart.adam_step, [{"lr": 1e-9}, {"lr": 1e-2}, {"lr": 1e-8}]),
    )
    task = quickstart.make_tasks(*quickstart.load_images("digits"), seed=0)["classifier"]
    history = quickstart.run_best(task, "Adam", 0.2, quickstart.Progress(disable=True))
    assert history.label == "Adam, lr 0.01"
    assert history.steps[-1].loss < history.steps[0].loss


def test_every_run_starts_from_the_same_weights(quickstart: ModuleType) -> None:
    task = quickstart.make_tasks(*quickstart.load_images("digits"), seed=3)["autoencoder"]
    losses = {
        quickstart.run(task, method, settings[0], 1e-9, quickstart.Progress(disable=True))
        .steps[0]
        .loss
        for method, (_, _, settings) in quickstart.METHODS.items()
    }
    assert losses == {task.loss(task.model).item()}


def test_solved_runs_end_early(quickstart: ModuleType) -> None:
    task = quickstart.make_tasks(*quickstart.load_images("digits"), seed=0)["classifier"]
    _, _, (settings, *_) = quickstart.METHODS["L-BFGS"]
    history = quickstart.run(task, "L-BFGS", settings, 60.0, quickstart.Progress(disable=True))
    assert history.steps[-1].loss < quickstart.SOLVED
    assert history.total_before("seconds")[-1] < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "-1"], "--seconds must be a number above 0, got -1.0"),
        (["--seconds", "0"], "--seconds must be a number above 0, got 0.0"),
        (["--seconds", "nan"], "--seconds must be a number above 0, got nan"),
        (["--seconds", "inf"], "--seconds must be a number above 0, got inf"),
        (["--seconds", "soon"], "--seconds: invalid float value: 'soon'"),
        (["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
        (["--data", "cifar"], "--data: invalid choice: 'cifar'"),
        (
            ["--figure", "curves.svg"],
            "--figure must be a .png file",
        ),
        (["--figure", "curves.pdf"], "--figure must be a .png file"),
    ],
)
def test_bad_values_are_refused(
    quickstart: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        quickstart.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
