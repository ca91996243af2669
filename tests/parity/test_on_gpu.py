"""The list for a GPU, rehearsed: every step at tiny sizes, PyTorch's modes among them."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "on_gpu.py"


def test_every_step_can_be_run(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--rehearse", "--seconds", "3600", "--output", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {each["outcome"] for each in results} == {"done"}
    names = {each["step"] for each in results}
    # What is left out for want of a package is no file.
    modes = {f"PyTorch's {mode}, batch 1" for mode in ("reduce-overhead", "max-autotune")}
    assert {"correctness", "picture, batch 1", "as it is, batch 1", "SDXL, batch 1", "tuning step"} | modes <= names
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in names)
