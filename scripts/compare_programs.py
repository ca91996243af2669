"""Compares the programs of tests/programs.py with those of another commit, and writes tests/golden/programs.json anew.

python scripts/compare_programs.py                 # beside the last commit: what does this change compile anew?
python scripts/compare_programs.py --against main~5
"""

import argparse
import difflib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/programs.json"
SHOWN = 12


def programs_of(checkout: Path, folder: Path) -> dict[str, str]:
    """The programs of a checkout, by their names."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", "tests.programs", folder], cwd=checkout, env=environment, check=True)
    return {path.stem: path.read_text() for path in sorted(folder.iterdir())}


def main() -> None:
    """Prints what differs, and writes the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", metavar="COMMIT", help="another commit (default: the last)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        now = programs_of(ROOT, Path(temporary, "now"))
        other = Path(temporary, "checkout")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", other, arguments.against], check=True)
        try:
            before = programs_of(other, Path(temporary, "before")) if (other / "tests/programs.py").is_file() else {}
        finally:
            subprocess.run([*git, "remove", "--force", other], check=True)
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) == before.get(name):
            print(f"{name}: the same")
            continue
        print(f"{name}: differs")
        lines = difflib.unified_diff(
            before.get(name, "").splitlines(),
            now.get(name, "").splitlines(),
            arguments.against,
            "now",
            n=0,
            lineterm="",
        )
        for line in itertools.islice(lines, SHOWN):
            print(f"    {line[:200]}")
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in now.items()}
    GOLDEN.write_text(json.dumps({"jax": jax.__version__, "programs": digests}, indent=2) + "\n")


if __name__ == "__main__":
    main()
