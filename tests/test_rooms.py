"""The house keeps its order: rooms are entered by their doors, and lower rooms know nothing of higher ones."""

import ast
from pathlib import Path

import pytest

import ngd_optim

ROOT = Path(ngd_optim.__file__).parent
# From the ground up: a room may import what stands before it.
ROOMS = [
    "distributed",
    "linalg",
    "operators",
    "replaying",
    "recording",
    "own_losses",
    "recognised",
    "tracing",
    "curvature",
    "jacobian",
    "kronecker",
    "factors",
    "linearization",
    "solvers",
    "preconditioners",
    "step",
    "testing",
]
MOST_NAMES, MOST_FILES = 6, 6
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
BASE = [
    "aten",
    "autograd_graph",
    "kernels",
    "layout",
    "lstm",
    "names",
    "parameters",
    "program",
    "reading",
    "real_parts",
    "shown",
    "torch_internals",
]


def imports(path: Path) -> list[str]:
    """The modules of the package that a file imports from."""
    tree = ast.parse((ROOT / path).read_text())
    found = [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    ]
    found += [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), (
        "imports are absolute"
    )
    return [name for name in found if name.split(".")[0] == "ngd_optim"]


def room_of(path: Path) -> str:
    """A room, ``"base"`` or ``"top"``."""
    if len(path.parts) > 1:
        return path.parts[0]
    return "base" if path.stem in BASE else "top"


def floor(room: str) -> int:
    return {"base": -1, "top": len(ROOMS)}.get(room, ROOMS.index(room) if room in ROOMS else -2)


def target(module: str) -> tuple[str, bool]:
    """The room that an import enters, and whether it does so by the door."""
    parts = module.split(".")[1:]
    if parts and parts[0] in ROOMS:
        return parts[0], len(parts) == 1
    return "base" if parts and parts[0] in BASE else "top", True


def test_every_room_is_known():
    assert {room_of(path) for path in FILES} == {*ROOMS, "base", "top"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_others_come_in_by_the_door_and_from_above(path: Path):
    here = room_of(path)
    for module in imports(path):
        there, by_the_door = target(module)
        if there == here:
            assert here not in ROOMS or not by_the_door, f"{path} imports the door of its own room"
            continue
        assert by_the_door, f"{path} imports {module}, which is behind a door"
        assert floor(there) < floor(here), f"{path} imports {module}, which stands above it"


def test_no_circle_within_a_room():
    graph = {path: imports(path) for path in FILES}
    named = {
        ".".join(("ngd_optim", *path.with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " → ".join(map(str, [*above, path]))
        for module in graph[path]:
            if (
                path.name != "__init__.py"
                and module in named
                and named[module].name != "__init__.py"
            ):
                visit(named[module], (*above, path))

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_has_a_narrow_door(room: str):
    files = [path for path in FILES if room_of(path) == room and path.name != "__init__.py"]
    assert 2 <= len(files) <= MOST_FILES
    door = ast.parse((ROOT / room / "__init__.py").read_text())
    names = next(ast.literal_eval(n.value) for n in door.body if isinstance(n, ast.Assign))
    assert 1 <= len(names) <= MOST_NAMES, names
