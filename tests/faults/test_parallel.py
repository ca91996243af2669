"""Rows 16 to 21 of the faults, on processes that take steps together: one dies, stops, sleeps, or does not come.

Each process is real and exchanges arrays through gloo over loopback. `sdipc tune` is tested in test_scale.py.
"""

import random
import shutil
import signal
import subprocess
import threading
import time
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image

from tests.processes import finish, free_port, start
from tests.test_parallel import job, levels, quick, quick_folder  # noqa: F401

HEARTBEAT = 10

STEPS = f"""
import sys, time
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from sdipc_jax import parallel
address, count, process, sleeps_at = sys.argv[1], *map(int, sys.argv[2:])
parallel.initialize(address, count, process, initialization_timeout=60, heartbeat_timeout={HEARTBEAT})
mesh = parallel.make_mesh()
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
rows = parallel.place(mesh, jnp.ones(mesh.size))

def stuck_before_a_collective():
    time.sleep(600)

with parallel.Watchdog(factor=10, least=5) as watchdog:
    for i in range(100_000):
        with watchdog.step():
            if i == sleeps_at and process == 1:
                stuck_before_a_collective()
            jax.block_until_ready(total(rows))
        print(i, flush=True)
        time.sleep(0.01)
"""


class Pair:
    """Two processes that take steps together.

    Attributes:
        steps: how many each has taken.
    """

    def __init__(self, sleeps_at: int = -1) -> None:
        address = f"localhost:{free_port()}"
        self.processes = [start(["-c", STEPS, address, 2, process, sleeps_at], devices=1) for process in range(2)]
        self.steps = [0, 0]
        self.errors = ["", ""]
        self._threads = [
            threading.Thread(target=each, args=(process,), daemon=True)
            for process in range(2)
            for each in (self._count, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def _count(self, process: int) -> None:
        for line in self.processes[process].stdout or ():
            if line.strip().isdecimal():
                self.steps[process] = int(line) + 1

    def _listen(self, process: int) -> None:
        for line in self.processes[process].stderr or ():
            self.errors[process] += line

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 90
        while min(self.steps) < step:
            assert time.monotonic() < deadline, (self.steps, self.errors)
            assert all(each.poll() is None for each in self.processes), self.errors
            time.sleep(0.01)

    def end(self, process: int, seconds: float) -> int:
        """The exit code of a process that must end by itself in so many seconds."""
        try:
            return self.processes[process].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {process} did not end within {seconds} s: {self.errors}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.processes:
            each.kill()
            each.wait()
        for thread in self._threads:
            thread.join()
        for each in self.processes:
            for stream in (each.stdout, each.stderr):
                if stream:
                    stream.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_is_killed(seed: int) -> None:
    """Row 16: the other ends within 15 s, non-zero."""
    with Pair() as pair:
        pair.wait_for_step(random.Random(seed).randrange(1, 100))
        pair.processes[1].kill()
        assert pair.end(0, 15) != 0


@pytest.mark.parametrize("seed", range(5))
def test_the_coordinator_is_killed(seed: int) -> None:
    """Row 17: the other ends within 5 s, non-zero."""
    with Pair() as pair:
        pair.wait_for_step(random.Random(seed).randrange(1, 100))
        pair.processes[0].kill()
        assert pair.end(1, 5) != 0


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_is_stopped(stopped: int) -> None:
    """Row 18: the other ends within 15 s, non-zero."""
    with Pair() as pair:
        pair.wait_for_step(10)
        pair.processes[stopped].send_signal(signal.SIGSTOP)
        assert pair.end(1 - stopped, 15) != 0


def test_a_worker_is_alive_but_stuck() -> None:
    """Row 19: the watchdog ends both within 30 s, and both tell where they were."""
    with Pair(sleeps_at=20) as pair:
        pair.wait_for_step(20)
        began = time.monotonic()
        codes = [pair.end(process, 30) for process in range(2)]
        assert time.monotonic() - began < 30
        # The one that is ended first takes the other down, if its own watchdog does not come before.
        assert 75 in codes
        assert 0 not in codes
    assert "in stuck_before_a_collective" in pair.errors[1]
    assert "in <module>" in pair.errors[0]
    for error in pair.errors:
        assert "sdipc: a step has taken more than 5 s" in error


def test_a_worker_never_starts(quick_folder: Any, tmp_path: Any) -> None:  # noqa: F811
    """Row 20: the other says so after 20 s and ends."""
    port, began = free_port(), time.monotonic()
    joining = ("--coordinator-address", f"localhost:{port}", "--num-processes", 2, "--process-id", 0)
    arguments = ("text", "a", "--model", quick_folder, "--output-dir", tmp_path / "out", *joining)
    limit = ("--initialization-timeout", 20)
    ((code, _, error),) = finish([start(["-m", "sdipc_jax.cli", *arguments, *limit], devices=1)], 60)
    assert code == 75
    assert "sdipc: 1 of 2 processes joined within 20 s, process 1 did not: see why, and start all again" in error
    assert 20 <= time.monotonic() - began < 45
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "each, message",
    [
        ({"seed": [1, 2]}, "seed is 2 on process 1 and 1 on process 0"),
        ({"steps": [2, 3]}, "settings.steps is 3 on process 1 and 2 on process 0"),
        ({"num_images": [2, 3]}, "settings.num_images is 3 on process 1 and 2 on process 0"),
    ],
)
def test_settings_differ(each: dict[str, list[Any]], message: str, quick_folder: Any, tmp_path: Any) -> None:  # noqa: F811
    """Row 21: refused by both at the start."""
    for code, _, error in job(2, 1, "text", "a", "--model", quick_folder, "--output-dir", tmp_path / "out", **each):
        assert code == 2
        assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("differing", ["inputs", "checkpoint"])
def test_files_differ(differing: str, quick_folder: Any, tmp_path: Any) -> None:  # noqa: F811
    """Row 21: two hosts with other files under the same names."""
    for process in range(2):
        folder = tmp_path / str(process)
        shutil.copytree(quick_folder, folder / "model")
        level = 50 * process if differing == "inputs" else 50
        Image.new("RGB", (32, 32), (level, 10, 10)).save(folder / "a.png")
        if differing == "checkpoint" and process == 1:
            path = folder / "model" / "scheduler" / "scheduler_config.json"
            path.write_text(path.read_text() + "\n")
    running = []
    port = free_port()
    for process in range(2):
        joining = ("--coordinator-address", f"localhost:{port}", "--num-processes", 2, "--process-id", process)
        words = ("vary", "a.png", "--model", "model", "--output-dir", "out", "--heartbeat-timeout", HEARTBEAT, *joining)
        here = str(tmp_path / str(process))
        script = f"import os, sys; os.chdir({here!r}); from sdipc_jax import cli; sys.exit(cli.main())"
        running.append(start(["-c", script, *words], devices=1))
    for code, _, error in finish(running, 90):
        assert code == 2
        assert f"sdipc: {differing}." in error
        assert "start all processes with the same settings, inputs and files" in error


def test_four_processes_make_the_pictures_of_one(quick_folder: Any, tmp_path: Any) -> None:  # noqa: F811
    """5 prompts on purpose: neither 2 nor 4 divide them."""
    arguments = ["text", *"abcde", "--num-images", 1, "--steps", 2, "--batch-size", 2, "--model", quick_folder]
    made = {}
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        ended = job(count, 1, *arguments, "--output-dir", folder)
        assert [code for code, _, _ in ended] == [0] * count, ended
        made[count] = levels(folder)
        assert len(made[count]) == 5
    for count in (2, 4):
        for name, picture in made[1].items():
            assert np.abs(made[count][name] - picture).max() <= 2
