"""The list of what is measured on a GPU: it can be cut off, goes on, and says what failed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import on_gpu
import pytest
from benchmarks import candidates
from on_gpu import Options, Result, Step


def command(code: str) -> tuple[str, ...]:
    return ("-c", code, "{output}")


WRITE = "import sys, json; json.dump({'seen': 1}, open(sys.argv[1], 'w'))"
# As benchmark.py's sides are: stopped while they wait, so that they would never see that all is over.
LEAVES_ONE = """
import json, os, signal, subprocess, sys, time
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
left.send_signal(signal.SIGSTOP)
json.dump({"left": left.pid}, open(sys.argv[1], "w"))
print("as far as here", flush=True)
time.sleep(60)
"""
LIST = [
    Step("good", 60, command(WRITE)),
    Step("bad", 60, command("import sys; print('what is wrong'); sys.exit(3)")),
    Step("elsewhere", 60, command(WRITE), needs="no_such_package"),
    Step("endless", 3, command(LEAVES_ONE)),
    Step(
        "flags", 60, command("import os, sys, json; json.dump(os.environ['XLA_FLAGS'], open(sys.argv[1], 'w'))"), "--b"
    ),
]


def has_ended(process: int) -> bool:
    """Within a second; a process that nobody waits for stays in the table as a zombie."""
    for _ in range(20):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


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
    assert results["endless"]["last_lines"] == ["as far as here"]
    assert has_ended(results["endless"]["found"]["left"])
    assert results["bad"]["last_lines"] == ["what is wrong"]
    assert results["flags"]["found"] == "--a --b"
    # What is left out has no file, but a line in the table.
    assert "| elsewhere | left out |" in (tmp_path / "table.md").read_text()
    (tmp_path / "good.json").unlink()
    ran = []
    monkeypatch.setattr(on_gpu, "run", lambda step, *_: ran.append(step.name) or Result(step.name, "done", 0.0))
    on_gpu.main(Options(output=tmp_path))
    assert ran == ["good", "elsewhere"]


def test_what_is_wanted_may_lie_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    (tmp_path / "no_such_package/__init__.py").write_text("told = 7\n")
    assert on_gpu.missing("json no_such_package", tmp_path) == []
    wanted = on_gpu.missing("no_such_package build/none.npz", tmp_path / "empty")
    assert [each.partition(":")[0] for each in wanted] == ["there is no no_such_package", "there is no build/none.npz"]
    monkeypatch.setenv(candidates.PACKAGES, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["side", "--candidate=x"])
    assert candidates._package("no_such_package").told == 7
    # What reads flags of its own finds none of ours.
    assert sys.argv == ["side"]


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
    for script in ("benchmark.py", "measure_fast.py"):
        command = [sys.executable, str(on_gpu.SCRIPTS / script), "--help"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        commands = [step.command for step in on_gpu.steps(False) if step.command[0] == script]
        assert commands
        assert not [part for each in commands for part in each if part.startswith("--") and part not in told]
    assert {*on_gpu.IN_PLACE} == {*candidates.CANDIDATES}
