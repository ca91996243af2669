"""What README and docs say: every name that they import or mention is there."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdipc_jax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "sdipc_jax").rglob("*.md"))]
# What people import, wherever the rooms are; the names at the root are those of `__all__`.
PROMISED = [
    *(f"sdipc_jax.{name}" for name in sdipc_jax.__all__),
    *(f"sdipc_jax.tuning.{name}" for name in sdipc_jax.tuning.__all__),
    *("sdipc_jax.parallel.generate", "sdipc_jax.parallel.make_mesh", "sdipc_jax.parallel.replicate"),
    *("sdipc_jax.compilation.keep_compiled", "sdipc_jax.compilation.use_eigen"),
    *("sdipc_jax.checkpoints.load", "sdipc_jax.checkpoints.save", "sdipc_jax.checkpoints.bridge"),
]


def names_in(text: str) -> Iterator[str]:
    """The package's names in a Markdown page: imported in its Python, used as `sdipc.NAME`, mentioned in backticks."""
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdipc_jax"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sdipc":
                yield f"sdipc_jax.{node.attr}"
    yield from re.findall(r"`(sdipc_jax(?:\.\w+)+)(?:\([^`]*\))?`", text)


def find(name: str) -> object:
    """What has a dotted name: a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(find(module), attribute)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_a_page_are_there(page: Path) -> None:
    for name in names_in(page.read_text(encoding="utf-8")):
        find(name)


@pytest.mark.parametrize("name", PROMISED)
def test_what_people_import_does_not_move(name: str) -> None:
    find(name)


def test_the_root_names_what_is_imported_from_it_for_type_checkers() -> None:
    tree = ast.parse(Path(sdipc_jax.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        found |= {alias.name: getattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names}
    assert found == {name: getattr(sdipc_jax, name) for name in sdipc_jax.__all__}
    assert set(sdipc_jax.__all__) <= set(dir(sdipc_jax))
    with pytest.raises(AttributeError, match="module 'sdipc_jax' has no attribute 'nothing_of_the_kind'"):
        find("sdipc_jax.nothing_of_the_kind")


def test_tests_that_are_named_as_proof_exist() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)::(test_\w+)`", page)
    assert len(named) > 100
    for module in {module for module, _ in named}:
        tree = ast.parse((ROOT / f"tests/{module}.py").read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing = {test for each, test in named if each == module} - there
        assert not missing, f"docs/reliability.md names tests that tests/{module}.py has not"


def test_names_are_found_in_pages() -> None:
    page = "`sdipc_jax.a.b`\n```python\nimport sdipc_jax as sdipc\nfrom sdipc_jax.c import d\nsdipc.e(sdipc.f.g)\n```\n"
    assert sorted(names_in(page)) == ["sdipc_jax.a.b", "sdipc_jax.c.d", "sdipc_jax.e", "sdipc_jax.f"]
    assert len([*names_in(PAGES[0].read_text(encoding="utf-8"))]) > 10
    with pytest.raises(AttributeError):
        find("sdipc_jax.tuning.nothing_of_the_kind")
