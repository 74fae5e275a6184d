"""What the site takes from the rest of the repository, so that nothing is copied by hand.

A page may have these lines:

    <!-- README -->                 the README's beginning, up to its first section
    <!-- README: name -->           a section of the README, without its heading
    <!-- CONTRIBUTING: name -->     likewise of CONTRIBUTING.md
    <!-- CHANGELOG -->              CHANGELOG.md without its title
    <!-- examples -->               all examples: what they do, their pictures and their code
    <!-- benchmarks -->             all results of the benchmarks: tables and figures
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
EXAMPLES, BENCHMARKS, RESULTS = (
    ROOT / "examples",
    ROOT / "benchmarks",
    ROOT / "benchmarks" / "results",
)
SHOWN = (*EXAMPLES.glob("*.p[ny]*"), *RESULTS.glob("*.png"))
PLACE = re.compile(
    r"^<!-- (README|CONTRIBUTING|CHANGELOG|examples|benchmarks)(?:: (.+))? -->$", re.MULTILINE
)

CELL = re.compile(r"(?<=<t[dh]>)[^<]+|(?<=<t[dh] style=\"text-align: right;\">)[^<]+")
HYPHENATED = re.compile(r"\b(?:[\d.]+e-\d+|L-BFGS)\b")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Pictures and example files lie in the site where they lie in the repository."""
    for path in SHOWN:
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the places of a page."""
    return PLACE.sub(lambda place: _filled(*place.groups()), markdown)


def on_page_content(html: str, **_: object) -> str:
    """Numbers and names in cells do not break at their hyphen: 1.1e-4, L-BFGS."""
    return CELL.sub(
        lambda cell: HYPHENATED.sub(r'<span class="unbroken">\g<0></span>', cell[0]), html
    )


def _filled(what: str, name: str | None) -> str:
    if what in ("README", "CONTRIBUTING"):
        return _linked_within_the_site(section_of(what, name))
    if what == "CHANGELOG":
        return _linked_within_the_site((ROOT / "CHANGELOG.md").read_text().partition("\n")[2])
    if what == "examples":
        return "\n".join(map(_example, sorted(EXAMPLES.glob("*.py"))))
    return "\n".join(map(_benchmark, sorted(RESULTS.glob("*.md"))))


def section_of(document: str, name: str | None) -> str:
    """The section of that name in ``README`` or ``CONTRIBUTING``; None: the text before the first section.

    Raises:
        ValueError: there is no such section.
    """
    beginning, *sections = re.split(
        r"^## (.+)\n", (ROOT / f"{document}.md").read_text(), flags=re.MULTILINE
    )
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    if name is None:
        return beginning
    if name not in texts:
        raise ValueError(f"{document} has no section {name!r}; it has {', '.join(texts)}")
    return texts[name].strip()


def _linked_within_the_site(markdown: str) -> str:
    markdown = markdown.replace("](examples)", "](examples.md)")
    return re.sub(r"\]\(docs/([\w.#-]+)\)", r"](\1)", markdown)


def _docstring(path: Path) -> tuple[str, str]:
    """Its first line, and the rest as markdown."""
    first, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
    return first, rest.strip()


def _example(path: Path) -> str:
    title, text = _docstring(path)
    picture = (
        f"![what {path.name} draws](examples/{path.stem}.png)\n"
        if path.with_suffix(".png").exists()
        else ""
    )
    code = "\n".join(
        f"    {line}".rstrip() for line in ["```python", *path.read_text().splitlines(), "```"]
    )
    heading = f"## {path.stem} {{ #{path.stem} }}"
    return f'{heading}\n\n**{title}**\n\n{text}\n\n{picture}\n??? example "examples/{path.name}"\n\n{code}\n'


def _benchmark(table: Path) -> str:
    name = _benchmark_name(table.stem)
    script = name.partition("-")[0]  # which may be run for some methods alone, or on some device
    title, text = _docstring(BENCHMARKS / f"{script}.py")
    result = re.sub(r"^# .*\n", "", table.read_text())
    result = re.sub(r"\]\(([\w-]+)\.md\)", lambda link: f"](#{_benchmark_name(link[1])})", result)
    picture = (
        f"![figure](benchmarks/results/{name}.png)\n" if table.with_suffix(".png").exists() else ""
    )
    return f"## {name} {{ #{name} }}\n\n**{title}**\n\n{text}\n\n{result}\n{picture}"


def _benchmark_name(result: str) -> str:
    """The script that writes a result; one writes the folder's README."""
    return "goals" if result == "README" else result
