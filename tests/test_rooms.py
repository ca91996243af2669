"""The order of the rooms: a room imports those below it, never those above, and no two import each other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdipc_jax"
# From top to bottom.
ROOMS = [
    *("cli", "commands", "page", "evaluate", "tuning", "batch", "parallel", "sampling", "prompts", "checkpoints"),
    *("datasets", "samplers", "pictures", "models"),
]
GROUND = {
    *("batches", "compilation", "errors", "executables", "files", "interruption", "records", "settings", "spelling"),
    "tracing",
}
# What stands in the root re-exports the rooms, and what is only imported for its names imports them.
TOP = "__init__"


def imports(package: Path) -> Iterator[tuple[str, str, str]]:
    """Every import of the package in itself: the room, the room that it imports, and file and line."""
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                module = node.module or ""
                names = [f"{module}.{alias.name}" for alias in node.names] if module == "sdipc_jax" else [module]
            for name in names:
                if name.startswith("sdipc_jax."):
                    yield room, name.split(".")[1], f"{path.relative_to(package.parent)}:{node.lineno}"


def wrong(package: Path) -> list[str]:
    """What runs against the order, with file and line."""
    found = []
    for room, imported, where in imports(package):
        if room in (TOP, imported):
            continue
        if imported not in {*ROOMS, *GROUND}:
            found.append(f"{where}: {imported} is no room")
        elif room in GROUND:
            if imported not in GROUND:
                found.append(f"{where}: {room}, on the ground floor, imports {imported}")
        elif imported in ROOMS and ROOMS.index(imported) <= ROOMS.index(room):
            found.append(f"{where}: {room} imports {imported}, which stands above it")
    return found


def test_no_import_runs_upwards() -> None:
    assert not wrong(PACKAGE)


def test_every_file_stands_in_a_room() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == {TOP, *ROOMS, *GROUND}


@pytest.mark.parametrize("room", ROOMS[1:])
def test_every_room_has_a_door(room: str) -> None:
    """Its first line says what comes in and what goes out, its last sentence what it imports but the ground floor."""
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert re.search(" in, .* out", said.splitlines()[0])
    named = re.search(r"Imports ([^.]+)\.\Z", said)
    assert named
    expected = set() if named[1] == "no other room" else set(re.split(r",\s+|\s+and\s+", named[1]))
    assert expected == {imported for own, imported, _ in imports(PACKAGE) if own == room} - GROUND - {room}


def test_no_module_is_longer_than_it_should_be() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 400]


@pytest.mark.parametrize(
    "file, line, expected",
    [
        ("models/layers.py", "from sdipc_jax.checkpoints.load import load", "models imports checkpoints, which stands"),
        ("errors.py", "import sdipc_jax.models", "errors, on the ground floor, imports models"),
        ("batch/plan.py", "from sdipc_jax import tuning", "batch imports tuning, which stands above it"),
        ("batch/plan.py", "    from sdipc_jax.attic import things", "attic is no room"),
    ],
)
def test_the_check_finds_what_runs_upwards(tmp_path: Path, file: str, line: str, expected: str) -> None:
    package = tmp_path / "sdipc_jax"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(f"def function():\n    pass\n{line}\n" if line[0] != " " else f"def f():\n{line}\n")
    (message,) = wrong(package)
    assert message.startswith(f"sdipc_jax/{file}:{2 if line[0] == ' ' else 3}: ")
    assert expected in message
