"""What CI installs, to the byte: locks/*.txt from pyproject.toml and the constraints, for Python 3.11.5 and later.

    pip install uv && python scripts/lock.py

Run it after a change of pyproject.toml or of a version in constraints*.txt. Every line has the sha256 of all files of
its release, so that `pip install --require-hashes` takes nothing else. PyTorch is left out: its builds for CPUs and for
CUDA, of which one is taken or the other, need different packages.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What is installed beside the core into one environment: its packages alone.
LAYERS = ("test", "lint", "notebook", "docs")
# Environments with versions of their own.
ALONE = {"page": "page-test", "parity": "parity", "newest": "newest"}
# The oldest that furo's packages run on.
_PYTHON = "3.11.5"
# hatchling asks for it where a package is installed from its folder.
_EDITABLE = "editables"


def main() -> None:
    core = locked("constraints.txt")
    write("core", core)
    for extra in LAYERS:
        found = locked("constraints.txt", extra)
        write(extra, {name: lines for name, lines in found.items() if core.get(name) != lines})
    for name, extra in ALONE.items():
        write(name, locked(f"constraints-{name}.txt", extra))


def locked(constraints: str, *extras: str) -> dict[str, str]:
    """Each package, with its version and hashes, as uv resolves them."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    no_torch = ROOT / "build" / "no-torch.txt"
    no_torch.parent.mkdir(exist_ok=True)
    no_torch.write_text("torch; python_version < '3'\n")
    command = ["uv", "pip", "compile", "--universal", "--python-version", _PYTHON, "--generate-hashes", "--quiet"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--override", str(no_torch)]
    command += ["--constraints", constraints, *(f"--extra={extra}" for extra in extras), "pyproject.toml", "-"]
    wanted = "\n".join([*build, _EDITABLE])
    found = subprocess.run(command, cwd=ROOT, input=wanted, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(found.returncode)
    # A package begins a line, its hashes are indented; one with markers may stand there twice.
    blocks: dict[str, str] = {}
    for block in re.split(r"^(?=\S)", found.stdout, flags=re.MULTILINE)[1:]:
        name = block.partition("=")[0]
        blocks[name] = blocks.get(name, "") + block
    return blocks


def write(name: str, blocks: dict[str, str]) -> None:
    """A file of packages."""
    folder = ROOT / "locks"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text("".join(blocks.values()))
    print(f"locks/{name}.txt: {len(blocks)} packages")


if __name__ == "__main__":
    main()
