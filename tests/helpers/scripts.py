"""Run a script of the repository as a user does, or load it as a module."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.image import imread

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
TIMEOUT = 150


def make_environment() -> dict[str, str]:
    """The environment of a new process: one thread, and the tests' helpers can be imported."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_python(*arguments: str | Path, folder: Path | None = None) -> str:
    """Run Python with these arguments in a process of its own, and return what it printed.

    Raises:
        AssertionError: it failed; the message is what it printed.
    """
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=make_environment(),
        cwd=folder,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def load_script(path: Path) -> ModuleType:
    """The script as a module, not as the main one."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def run_example(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[ModuleType, str]:
    """Run an example with its picture drawn in that folder: its module, and what it printed."""
    module = load_script(EXAMPLES / f"{name}.py")
    picture = folder / f"{name}.png"
    module.main([*arguments, "--figure", str(picture)])
    assert imread(picture).std() > 0.01  # not blank
    return module, capsys.readouterr().out
