"""What README and docs say: every name that they import or mention is there."""

import ast
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import sdipc_jax
from sdipc_jax import cli
from sdipc_jax.evaluate.table_settings import read_table

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
    assert len([*names_in(PAGES[0].read_text(encoding="utf-8"))]) > 5
    with pytest.raises(AttributeError):
        find("sdipc_jax.tuning.nothing_of_the_kind")


def blocks(page: Path, language: str) -> list[str]:
    """What stands between the fences of a language."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(page: Path) -> Iterator[str]:
    """What stands behind `sdipc` in a page's blocks, a command each."""
    for language in ("", "text", "sh", "bash"):
        for block in blocks(page, language):
            yield from re.findall(r"^(?:\S+=\S+ )*sdipc (.*)$", block.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What README's commands need of a clone, as the folder that they are run in."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_the_readme_run_as_they_stand(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(ROOT / "README.md", "sh")
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [line[:2] for line in lines] == [["sdipc", "vary"], ["sdipc", "edit"]]
    for line in lines:
        assert cli.main(line[1:]) == 0, capsys.readouterr().err
    for folder in ("vary-001", "edit-001"):
        assert len(list((clone / "out" / folder).glob("*-00?.png"))) == 4
        assert (clone / "out" / folder / "sheet.png").is_file()
        assert len((clone / "out" / folder / "manifest.jsonl").read_text().splitlines()) == 4


def test_python_of_the_readme_runs_as_it_stands(clone: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    assert [path.name for path in (clone / "out/taxi").iterdir()] == ["picture-000.png"]


def test_commands_in_every_page_are_understood_with_all_that_is_typed() -> None:
    seen = 0
    for page in PAGES:
        for line in commands(page):
            try:
                cli._parse(shlex.split(line, comments=True))
            except sdipc_jax.InputError as error:
                pytest.fail(f"{page.name}: sdipc {line}: {error}")
            seen += 1
    assert seen > 30


def test_files_in_every_page_are_what_the_commands_read(tmp_path: Path) -> None:
    tables = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            yaml.safe_load(block)
            if (found := re.match(r"# (\S+\.yaml): sdipc (.*)\n", block)) is None:
                continue
            (tmp_path / found[1]).write_text(block)
            cli._parse(shlex.split(found[2]))
            read_table(tmp_path / found[1])
            tables += 1
    assert tables == 4


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def slug(heading: str) -> str:
    """What a heading's anchor is called.

    >>> slug("How a picture's features become a text state (eq. 6)")
    'how-a-pictures-features-become-a-text-state-eq-6'
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_anchors_between_pages_are_there() -> None:
    seen = 0
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            there = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(each) for each in headings}, f"{page.name}: {target}#{anchor}"
            seen += 1
    assert seen > 50


def test_locks_are_what_the_constraints_say_with_hashes_and_no_addresses() -> None:
    for lock in sorted((ROOT / "locks").glob("*.txt")):
        own = ROOT / f"constraints-{lock.stem}.txt"
        text = (own if own.is_file() else ROOT / "constraints.txt").read_text(encoding="utf-8")
        wanted = {_normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
        found = lock.read_text(encoding="utf-8")
        packages = re.split(r"^(?=\S)", found, flags=re.MULTILINE)[1:]
        assert "://" not in found
        assert packages
        for block in packages:
            (name, version), *_ = re.findall(r"^([\w.-]+)==([^\s;]+)", block)
            assert wanted.get(_normal(name), version) == version, f"{lock.name}: {name}"
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"{lock.name}: {name}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_page_is_in_the_index() -> None:
    listed = re.findall(r"^([\w-]+)$", "\n".join(blocks(ROOT / "docs/index.md", "{toctree}")), re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    # The notebook comes with `make docs`.
    assert sorted(listed) == sorted(pages | {"tour"})


def test_actions_are_pinned_by_digest_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for workflow in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = workflow.read_text(encoding="utf-8")
        used = re.findall(r"uses: (.*)", text)
        assert used
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", each) for each in used), workflow.name
        targets = [name for names in re.findall(r"target: \[(.*)\]", text) for name in names.split(", ")]
        for target in [*targets, *re.findall(r"run: make ([\w.-]+)$", text, re.MULTILINE)]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_the_notebook_is_stored_without_results_and_names_what_is_there() -> None:
    cells = json.loads((ROOT / "examples/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
    code = "\n".join("".join(cell["source"]) for cell in codes)
    names = [*names_in(f"```python\n{code}\n```\n")]
    assert len(names) > 8
    for name in names:
        find(name)
    for file in re.findall(r'"([\w-]+\.png)"', code):
        assert (ROOT / "examples" / file).is_file()
