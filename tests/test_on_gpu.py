"""The list of what is measured on a GPU: it can be cut off, goes on, and says what failed."""

import json
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest
from on_gpu import Options, Result, Step


def command(code: str) -> tuple[str, ...]:
    return ("-c", code, "{output}")


WRITE = "import sys, json; json.dump({'seen': 1}, open(sys.argv[1], 'w'))"
LIST = [
    Step("good", 60, command(WRITE)),
    Step("bad", 60, command("import sys; print('what is wrong'); sys.exit(3)")),
    Step("endless", 1, command("import time; time.sleep(60)")),
    Step(
        "flags", 60, command("import os, sys, json; json.dump(os.environ['XLA_FLAGS'], open(sys.argv[1], 'w'))"), "--b"
    ),
]


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "steps", lambda rehearse: LIST)
    monkeypatch.setenv("XLA_FLAGS", "--a")
    on_gpu.main(Options(output=tmp_path))
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: each["outcome"] for name, each in results.items()} == {
        "good": "done",
        "bad": "failed",
        "endless": "out of time",
        "flags": "done",
    }
    assert results["good"]["found"] == {"seen": 1}
    assert results["bad"]["last_lines"] == ["what is wrong"]
    assert results["flags"]["found"] == "--a --b"
    (tmp_path / "good.json").unlink()
    ran = []
    monkeypatch.setattr(on_gpu, "run", lambda step, *_: ran.append(step.name) or Result(step.name, "done", 0.0))
    on_gpu.main(Options(output=tmp_path))
    assert ran == ["good"]


def test_without_time_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "steps", lambda rehearse: LIST)
    monkeypatch.setattr(on_gpu, "run", lambda *_: 1 / 0)
    on_gpu.main(Options(output=tmp_path, seconds=5))
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_understood() -> None:
    """Each step's script takes its options; running them is `python scripts/on_gpu.py --rehearse`."""
    names = [step.name for rehearse in (False, True) for step in on_gpu.steps(rehearse)]
    assert len({*names}) > 10
    for step in on_gpu.steps(True):
        assert sum("{output}" in each for each in step.command) == 1
    script = str(on_gpu.SCRIPTS / "benchmark.py")
    told = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    used = {part for step in on_gpu.steps(False) for part in step.command if part.startswith("--")}
    assert not [option for option in used if option not in told]
