"""Faults of `sdipc tune` on two processes, rows 16 to 18 and 21 of the project's list. Run by `make faults-scale`."""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import free_port
from tests.tuning_runs import PATIENCE, Run, end, kill, write_pictures, write_small_checkpoint

HEARTBEAT = 10


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sixty steps on five pictures, four of them a batch, saved every third."""
    folder = tmp_path_factory.mktemp("tuning")
    return {
        "model": str(write_small_checkpoint(folder / "small")),
        "data": str(write_pictures(folder / "data", {"thing": 5})),
        "prompt_length": 2,
        "learning_rate": 1e-3,
        "steps": 60,
        "save_every": 3,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start_two(run: Run, *changes: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """The run on two processes or so; `changes` are those of all but the first."""
    joining = ("--coordinator-address", f"localhost:{free_port()}", "--num-processes", str(count), "--process-id")
    limits = ("--initialization-timeout", "60", "--heartbeat-timeout", str(HEARTBEAT))
    return [run.start(*(changes if process else ()), *joining, str(process), *limits) for process in range(count)]


@contextmanager
def two(run: Run) -> Iterator[list[subprocess.Popen[str]]]:
    """Both, and none left in the end."""
    processes = start_two(run)
    try:
        yield processes
    finally:
        for each in processes:
            each.kill()
            each.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def clean(values: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on two processes that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("clean") / "run", "ct", cache, values)
    for process in start_two(run):
        end(process)
    assert run.lines() == 60
    return run


@pytest.mark.parametrize(
    "killed, number, limit, times",
    [(1, signal.SIGKILL, 15, 5), (0, signal.SIGKILL, 5, 5), (1, signal.SIGSTOP, 15, 1)],
    ids=["16-worker-killed", "17-coordinator-killed", "18-worker-stopped"],
)
def test_a_process_goes(
    killed: int, number: int, limit: float, times: int, values: dict[str, Any], cache: Path, clean: Run, tmp_path: Path
) -> None:
    """The other ends in time, non-zero; both started again go on, and end as a run that nothing happened to."""
    generator = random.Random(number + killed)
    run = Run(tmp_path / "run", "ct", cache, values)
    for _ in range(times):
        with two(run) as processes:
            goal = (run.steps() or [0])[-1] + generator.randint(1, 8)
            begun = len(run.log())
            assert run.wait_for(lambda g=goal, b=begun: len(run.log()) > b and run.lines() >= g, processes[0])  # type: ignore[misc]
            processes[killed].send_signal(number)
            began = time.monotonic()
            assert processes[1 - killed].wait(PATIENCE) != 0
            assert time.monotonic() - began <= limit
    assert run.lines() < 60
    for process in start_two(run):
        end(process)
    assert run.result() == clean.result()
    assert [line["step"] for line in run.metrics()] == list(range(1, 61))


def test_a_host_is_lost_for_good(values: dict[str, Any], cache: Path, clean: Run, tmp_path: Path) -> None:
    """The other goes on alone, takes its batches in turns, and is killed and started again; then both are there."""
    run = Run(tmp_path / "run", "ct", cache, values)
    with two(run) as processes:
        assert run.wait_for(lambda: bool(run.steps()), processes[0])
    told = (
        "each device takes its 4 pictures of a batch in 2 turns, since it had 2 at once when the run began: the "
        "batches are the same, and the results to rounding"
    )
    for turn in range(2):
        begun, steps = len(run.log()), run.steps()
        (alone,) = start_two(run, count=1)
        assert run.wait_for(lambda s=steps: len(run.steps()) > 1 and run.steps()[-1] > s[-1], alone)  # type: ignore[misc]
        kill(alone)
        changed = [] if turn else ["changed: devices: 2 -> 1", "changed: processes: 2 -> 1"]
        assert run.log()[begun : begun + len(changed) + 2] == [*changed, told, f"goes on after step {steps[-1]}"]
    assert run.lines() < 60
    for process in start_two(run):
        assert "turns" not in end(process)
    assert "changed: processes: 1 -> 2" in run.log()
    for found, line in zip(run.metrics(), clean.metrics(), strict=True):
        assert (found["step"], found["pictures"]) == (line["step"], line["pictures"])
        assert found["loss"] == pytest.approx(line["loss"], rel=1e-3)
    assert run.result()["data"] == clean.result()["data"]


@pytest.mark.parametrize("change", ["learning_rate=2e-3", "batch_size=2"])
def test_21_settings_differ(change: str, values: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "ct", cache, values)
    name = change.partition("=")[0]
    for process in start_two(run, change):
        message = end(process, 2)
        assert f"sdipc: {name} is " in message
        assert "on process 1 and" in message
    assert run.steps() == []
