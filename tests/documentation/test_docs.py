"""The documentation: its code runs, it builds without a warning, and it shows everything that it should."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import load_script, run_python

import ngd_optim
from ngd_optim import KFAC, NaturalCG, StepReport
from ngd_optim.linearization import linearization

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = {"transformers": ("transformers", "peft")}
"""What pages need that the tests are not installed with."""
PACKAGES = (
    "ngd_optim",
    "ngd_optim.factors",
    "ngd_optim.losses",
    "ngd_optim.operators",
    "ngd_optim.testing",
    "ngd_lightning",
    "ngd_rl",
)
PUBLIC = [
    f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__
]


hooks = load_script(ROOT / "docs" / "hooks.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_of_a_page_run_one_after_another(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), namespace)


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path):
    # Not --quiet, with which mkdocs does not count warnings.
    run_python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, folder=ROOT)
    for page in PAGES:
        html = (tmp_path / page.with_suffix(".html").name).read_text()
        assert not re.search(r"<!-- (README|CONTRIBUTING|CHANGELOG)|:(class|func|meth|attr):", html)
        assert not re.findall(r'(?:src|<link[^>]* href)="?(https?:[^" >]*)', html)
        for picture in re.findall(r'<img[^>]* src="?([^" >]+)', html):
            assert (tmp_path / picture).is_file()
    examples = (tmp_path / "examples.html").read_text()
    assert all(
        f'id="{path.stem}"' in examples or f"id={path.stem}" in examples
        for path in ROOT.glob("examples/*.py")
    )


def test_the_pictures_can_be_drawn_again(tmp_path: Path):
    load_script(ROOT / "docs" / "pictures.py").main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "images").iterdir())


def test_every_option_and_every_field_of_a_report_is_explained():
    options = {
        name: p.default
        for name, p in inspect.signature(NaturalCG).parameters.items()
        if name != "params"
    }
    page = (ROOT / "docs" / "settings.md").read_text()
    reports, table = page.split("## All options")
    cells = re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.MULTILINE)
    explained = {
        name: default
        for names, defaults in cells
        for name, default in zip(
            re.findall(r"`(\w+)`", names), re.split(", ", defaults.replace("`", "")), strict=True
        )
    }
    assert {name: ast.literal_eval(default) for name, default in explained.items()} == options
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", reports, re.MULTILINE)))
    assert sorted(fields) == sorted(StepReport.__dataclass_fields__)


def test_the_version_is_the_same_everywhere():
    newest = re.findall(r"^## (\S+) - (?:unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert newest[0] == ngd_optim.__version__
    assert f"\nversion: {ngd_optim.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_is_one():
    """As Keep a Changelog has it: versions, newest first, with the kinds of changes in its order."""
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    _, *versions = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)
    numbers = [tuple(map(int, text.split(" - ")[0].split("."))) for text in versions]
    assert numbers == sorted(numbers, reverse=True)
    for text in versions:
        found = re.findall(r"^### (.+)$", text, re.MULTILINE)
        assert found
        assert [kind for kind in kinds if kind in found] == found


def test_what_is_deprecated_is_told_with_what_to_use():
    page = (ROOT / "docs" / "migration.md").read_text()
    _, _, told = CHANGELOG.partition("### Deprecated")
    told, _, _ = told.partition("### Removed")
    for name in ("CGResult", *linearization._FORMER):
        assert f"`{name}`" in told
        assert re.search(rf"[`.]{name}\b", page)


def test_every_option_of_kfac_is_explained():
    options = {
        name: p.default
        for name, p in inspect.signature(KFAC).parameters.items()
        if name != "params"
    }
    page = (ROOT / "docs" / "streams.md").read_text()
    _, table = page.split("## Settings")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.MULTILINE)
    explained = {
        name: ast.literal_eval(default)
        for names, default in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    assert explained == options


@pytest.mark.parametrize(
    "path",
    [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"],
    ids=lambda path: path.stem,
)
def test_the_files_and_names_that_a_page_sends_to_are_there(path: Path):
    text = path.read_text()
    code = set(re.findall(r"`([^`\n]+)`", text))
    files = {name for name in code if re.fullmatch(r"[\w/]+\.(py|md|txt)", name)}
    assert len(files) > 20
    assert [
        name
        for name in files
        if not any((root / name).is_file() for root in (ROOT, ROOT / "ngd_optim"))
    ] == []
    sources = "".join(
        p.read_text() for folder in ("ngd_optim", "tests") for p in (ROOT / folder).rglob("*.py")
    )
    names = {
        part
        for name in code - files
        if re.fullmatch(r"[A-Za-z_][\w.]*", name)
        for part in name.split(".")
    }
    assert len(names) > 50
    assert {name for name in names if not re.search(rf"\b{name}\b", sources)} == set()


def test_the_doors_of_the_rooms_are_those_of_the_packages():
    rows = re.findall(
        r"^\| `(\w+)` \| .+ \| (.+) \|$",
        hooks.section_of("CONTRIBUTING", "The rooms"),
        re.MULTILINE,
    )
    rooms = {path.parent.name for path in (ROOT / "ngd_optim").glob("*/__init__.py")}
    assert {room for room, _ in rows} == rooms
    for room, door in rows:
        assert sorted(re.findall(r"`(\w+)`", door)) == sorted(
            importlib.import_module(f"ngd_optim.{room}").__all__
        )


def test_the_stops_of_a_closure_are_numbered_and_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^\| (\d+) \| `(.+?)` \| `(.+?)`", page, re.MULTILINE)
    assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
    assert f"{len(stops)} stops in {len({file for _, file, _ in stops})} files" in page
    for _, file, name in stops:
        body = ast.parse((ROOT / "ngd_optim" / file).read_text()).body
        for part in name.split("."):
            (found,) = (
                n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part
            )
            body = found.body


def test_the_api_page_has_every_public_name():
    paths = re.findall(r"^::: (.+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(paths) == sorted(PUBLIC)


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_has_a_docstring_with_an_example_that_runs(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    package, _, name = path.rpartition(".")
    public = getattr(importlib.import_module(package), name)
    assert inspect.getdoc(public)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(public) or "")
    assert examples, f"{path} has no example"
    test = doctest.DocTest(examples, {}, path, None, None, None)
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert result.failed == 0, "".join(output)
