"""Faults of `sdipc tune`, rows 1 to 15 of the project's list, with the numbers that stand there.

Run by `make faults-tuning`. Runs are processes of their own, with a checkpoint in miniature. Damage to checkpoints, a
full disk and an error in the saving thread (rows 5, 6, 7, 8, 10) are in tests/test_tune_checkpoints.py, with the
numbers of the list; here the command meets them.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdipc_jax.records import digest_of
from sdipc_jax.tuning.checkpoints import MANIFEST, Checkpoints, _verify
from tests.tuning_runs import Run, end, kill, write_pictures, write_small_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ct_values(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirty steps on five pictures, saved every third."""
    data = write_pictures(tmp_path_factory.mktemp("five") / "data", {"thing": 5})
    return {
        "model": str(checkpoint),
        "data": str(data),
        "prompt_length": 2,
        "learning_rate": 1e-3,
        "save_every": 3,
    }


@pytest.fixture(scope="session")
def make_ct(ct_values: dict[str, Any], cache: Path) -> Callable[..., Run]:
    def make(folder: Path, *, devices: int = 1, **values: Any) -> Run:
        return Run(folder, "ct", cache, ct_values | values, devices)

    return make


@pytest.fixture(scope="session")
def clean(make_ct: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happens to."""
    run = make_ct(tmp_path_factory.mktemp("clean") / "run")
    run.finish()
    return run


@pytest.fixture(scope="session")
def half(make_ct: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was asked to stop when two checkpoints were there."""
    run = make_ct(tmp_path_factory.mktemp("half") / "run")
    process = run.start()
    assert run.wait_for(lambda: len(run.steps()) == 2, process)
    process.send_signal(signal.SIGTERM)
    end(process, 75)
    return run


@pytest.fixture
def started(half: Run, make_ct: Callable[..., Run], tmp_path: Path) -> Run:
    """A copy of `half` to do things to."""
    run = make_ct(tmp_path / "run")
    shutil.copytree(half.folder, run.folder)
    return run


def check_same(run: Run, clean: Run) -> None:
    assert run.result() == clean.result()
    assert [line["step"] for line in run.metrics()] == list(range(1, len(clean.metrics()) + 1))
    assert run.leftovers() == []


def begun(run: Run) -> int:
    """How often a run has come to its first update."""
    return logged(run, "starts at") + logged(run, "goes on after")


def logged(run: Run, words: str) -> int:
    return sum(line.startswith(words) for line in run.log())


def test_01_killed_25_times(make_ct: Callable[..., Run], clean: Run, tmp_path: Path) -> None:
    generator = random.Random(1)
    run = make_ct(tmp_path / "run")
    # Before the first save, while one is written, while one is read, and in between; not far enough to be done.
    plan = ["start"] * 2 + generator.sample(["saving"] * 6 + ["restoring"] * 5 + ["steps"] * 12, 23)
    hits: Counter[str] = Counter()
    for moment in plan:
        process, began = run.start(), begun(run)
        target = generator.choice([1, 1, 1, 2, 2, 3] if run.steps() else [4])

        def reached(moment: str = moment, began: int = began, target: int = target) -> bool:
            if moment == "saving":
                return run.saving()
            # The lines after the checkpoint are taken away before they are written anew.
            waits = moment == "steps" and run.lines() < (run.steps() or [0])[-1] + target
            return begun(run) > began and not waits

        if moment == "restoring" and not run.steps():
            moment = "start"
        assert run.wait_for(reached, process), end(process)
        time.sleep({"start": 0.2, "saving": 0.03, "restoring": 0.05, "steps": 0.05}[moment] * generator.random())
        during = run.saving()
        kill(process)
        hits["saving" if during else moment] += 1
        assert process.returncode == -signal.SIGKILL
    assert sum(hits.values()) == 25
    assert hits["saving"] >= 5
    assert hits["restoring"] >= 3
    assert hits["start"] >= 2
    run.finish()
    check_same(run, clean)


def test_02_fine_tuning_killed_10_times(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", {f"class-{number}": 5 for number in range(20)})
    values = {
        "model": str(checkpoint),
        "data": str(data),
        "variant": "kv",
        "epochs": 2,
        "save_every": 4,
        "ab_training": True,
        "random_flip": True,
    }
    clean, run = (Run(tmp_path / name, "ft", cache, values) for name in ("clean", "run"))
    clean.finish()
    generator = random.Random(2)
    for _ in range(10):
        process, saved = run.start(), (run.steps() or [0])[-1]
        starts = len(run.log())
        goal = saved + generator.randint(1, 6)
        assert run.wait_for(lambda s=starts, g=goal: len(run.log()) > s and run.lines() >= g, process)  # type: ignore[misc]
        kill(process)
    run.finish()
    check_same(run, clean)
    seen = Counter(number for line in run.metrics() for number in line["pictures"])
    assert seen == dict.fromkeys(range(100), 2)


def test_03_sigterm_5_times(make_ct: Callable[..., Run], clean: Run, tmp_path: Path) -> None:
    generator = random.Random(3)
    run = make_ct(tmp_path / "run")
    for turn in range(5):
        process, starts = run.start(), len(run.log())
        goal = 6 * turn + generator.randint(1, 5)
        assert run.wait_for(lambda s=starts, g=goal: len(run.log()) > s and run.lines() >= g, process)  # type: ignore[misc]
        before, started = run.lines(), time.monotonic()
        process.send_signal(signal.SIGTERM)
        end(process, 75)
        assert time.monotonic() - started < 10
        assert run.steps()[-1] == run.lines()
        # The step that was running, and one that had begun when the signal was handled.
        assert run.lines() <= before + 2
    run.finish()
    check_same(run, clean)


def test_04_sigint_once_and_twice(make_ct: Callable[..., Run], clean: Run, tmp_path: Path) -> None:
    run = make_ct(tmp_path / "run")
    process = run.start()
    assert run.wait_for(lambda: run.lines() >= 4, process)
    process.send_signal(signal.SIGINT)
    end(process, 75)
    assert run.steps()[-1] == run.lines()
    process, steps = run.start(), run.steps()
    assert run.wait_for(lambda: logged(run, "goes on after") > 0 and run.lines() > steps[-1], process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    end(process, 130)
    assert time.monotonic() - started < 1
    assert set(steps) <= set(run.steps())
    run.finish()
    check_same(run, clean)


def test_04_sigint_twice_while_compiling(make_ct: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ct(tmp_path / "run")
    run.cache = tmp_path / "empty-cache"
    process = run.start()
    assert run.wait_for(lambda: logged(run, "starts at") > 0, process)
    time.sleep(3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    end(process, 130)
    assert run.lines() == 0


def test_05_to_07_damaged_checkpoints(started: Run, clean: Run) -> None:
    newest, older = (started.checkpoints / str(step) for step in reversed(started.steps()))
    foreign = started.checkpoints / "3.orbax-checkpoint-tmp"
    foreign.mkdir()
    (started.checkpoints / "99").mkdir()
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 16
    largest.write_bytes(content)
    message = started.finish()
    assert "checkpoint 99 is damaged" in message
    assert f"checkpoint {newest.name} is damaged ({largest.relative_to(newest)} is not what was written)" in message
    assert f"goes on after step {older.name}" in message
    assert foreign.is_dir()
    assert started.result() == clean.result()
    # With nothing whole it does not start anew.
    for step in started.steps():
        (started.checkpoints / str(step) / MANIFEST).unlink()
    lines = started.lines()
    message = started.finish(code=2)
    assert "found no checkpoint that is whole" in message
    assert all(f"{step}" in message for step in (27, 30))
    assert started.lines() == lines


def test_08_a_full_disk(half: Run, make_ct: Callable[..., Run], clean: Run, small_disk: Path) -> None:
    run = make_ct(small_disk / "run")
    shutil.copytree(half.folder, run.folder)
    state = os.statvfs(small_disk)
    filler = small_disk / "filler"
    # Room for a line of metrics, and for half a checkpoint.
    filler.write_bytes(bytes(state.f_bavail * state.f_frsize - 40_000))
    steps = run.steps()
    message = run.finish(code=2)
    assert "No space left on device" in message
    assert str(small_disk) in message
    assert "bytes" in message
    assert run.steps() == steps
    assert [_verify(run.checkpoints / str(step), step).step for step in steps] == steps
    filler.unlink()
    run.finish()
    check_same(run, clean)


def test_09_folders_that_will_not_do(make_ct: Callable[..., Run], started: Run, clean: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = make_ct(tmp_path / "file" / "run")
    config = tmp_path / "refused.yaml"
    config.write_text(json.dumps(run.values | {"output_dir": str(run.folder)}))
    begun = time.monotonic()
    command = [sys.executable, "-m", "sdipc_jax.cli", "tune", "ct", str(config)]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert refused.returncode == 2
    assert "cannot write there" in refused.stderr
    # Importing JAX is nearly all of it.
    assert time.monotonic() - begun < 5
    # Another process at work there.
    process = started.start()
    assert started.wait_for(lambda: logged(started, "goes on after") > 0, process)
    process.send_signal(signal.SIGSTOP)
    assert f"process {process.pid} is at work there" in started.finish(code=2)
    kill(process)
    started.finish()
    check_same(started, clean)


def test_09_a_folder_that_is_removed(started: Run) -> None:
    process = started.start()
    assert started.wait_for(lambda: logged(started, "goes on after") > 0, process)
    shutil.rmtree(started.folder)
    message = end(process, 2)
    assert any(words in message for words in ("No such file", "the folder is gone", "could not be read"))
    assert "same command again" in message


def test_11_a_changed_run_is_refused(started: Run, half: Run, clean: Run, tmp_path: Path) -> None:
    other = write_small_checkpoint(tmp_path / "other", seed=1)
    data = write_pictures(tmp_path / "data", {"thing": 6})
    for changes, message in [
        (["learning_rate=1e-4"], "learning_rate: 0.001 -> 0.0001"),
        (["prompt_length=3"], "prompt_length: 2 -> 3"),
        ([f"model={other}"], "checkpoint: "),
        ([f"data={data}"], "data: 5 pictures, "),
        (["batch_size=2"], "batch_size: 4 -> 2"),
        (["batch_size=2", "--allow-change", "batch_size"], "allow-change is batch_size"),
    ]:
        assert message in started.finish(*changes, code=2)
    started.devices = 2
    assert "devices: 1 -> 2" in started.finish(code=2)
    started.devices = 1
    assert started.result() == half.result()
    message = started.finish("learning_rate=1e-4", "--allow-change", "learning_rate")
    assert "changed: learning_rate: 0.001 -> 0.0001" in message
    assert started.metrics()[-1]["learning_rate"] == float(np.float32(1e-4))
    assert started.result() != clean.result()


def test_12_other_versions_are_told(started: Run, clean: Run) -> None:
    path = started.checkpoints / str(started.steps()[-1]) / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["versions"]["jax"] = "0.9.2"
    path.write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    message = started.finish()
    assert "warning: jax 0.9.2 -> " in message
    assert "may differ in the last bits" in message
    assert "warning: jax 0.9.2" in "\n".join(started.log())
    check_same(started, clean)


def test_13_a_loss_that_is_not_finite(started: Run, half: Run) -> None:
    steps = started.steps()
    message = started.finish("learning_rate=1e30", "--allow-change", "learning_rate", code=2)
    first = started.lines() + 1
    assert f"in update {first}, on pictures " in message
    numbers = message.split("on pictures ")[1].split(" of pictures.jsonl")[0].split(", ")
    assert len(numbers) == 4
    assert set(map(int, numbers)) <= set(range(5))
    assert started.steps()[0] in steps
    saved = _verify(started.checkpoints / str(started.steps()[-1]), started.steps()[-1])
    assert saved.step < first


READ = """
import sys
from pathlib import Path
import jax, numpy as np
from sdipc_jax import parallel
from sdipc_jax.tuning.checkpoints import Checkpoints, _sha256
with Checkpoints(Path(sys.argv[1]), 2, print) as checkpoints:
    saved = checkpoints.newest()
like = {}
for name, array in saved.arrays.items():
    like[name] = np.empty(array["shape"], array["dtype"])
mesh = parallel.make_mesh()
placed = parallel.replicate(mesh, saved.restore(like))
assert mesh.size == int(sys.argv[2]) == len(jax.devices())
for name, array in placed.items():
    for shard in array.addressable_shards:
        assert _sha256(np.asarray(shard.data)) == saved.arrays[name]["sha256"]
print("equal on", mesh.size)
"""


def test_14_another_number_of_devices(make_ct: Callable[..., Run], ct_values: dict[str, Any], tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", {"thing": 8})
    run = make_ct(tmp_path / "run", devices=4, steps=4, save_every=2, batch_size=8, data=str(data), keep=9)
    run.finish()
    for devices in (1, 2, 8):
        read = subprocess.run(
            [sys.executable, "-c", READ, str(run.checkpoints), str(devices)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert f"equal on {devices}" in read.stdout, read.stderr
    # The command goes on with them for those who ask for it; what differs is rounding.
    expected = run.metrics()
    shutil.rmtree(run.checkpoints / "4")
    run.devices = 2
    assert "changed: devices: 4 -> 2" in run.finish("--allow-change", "devices")
    for found, line in zip(run.metrics(), expected, strict=True):
        assert found["pictures"] == line["pictures"]
        np.testing.assert_allclose(found["loss"], line["loss"], rtol=1e-4)


SAVE = """
import sys
from pathlib import Path
import numpy as np
from sdipc_jax.tuning.checkpoints import Checkpoints
generator = np.random.default_rng(0)
with Checkpoints(Path(sys.argv[1]), 3, lambda line: print(line, flush=True)) as checkpoints:
    for step in range(1, 10**6):
        checkpoints.save(step, {"x": generator.standard_normal(20_000)}, {"step": step})
"""


def test_15_killed_as_soon_as_it_says_saved_10_times(tmp_path: Path) -> None:
    generator = random.Random(15)
    for turn in range(10):
        folder = tmp_path / str(turn)
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(generator.randint(1, 8)):
            line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        # What it said before it was dead counts too.
        said = [line, *process.communicate()[0].splitlines()]
        last = max(int(each.removeprefix("saved step ")) for each in said)
        warnings: list[str] = []
        with Checkpoints(folder, 3, warnings.append) as checkpoints:
            saved = checkpoints.newest()
        assert saved is not None
        assert warnings == []
        assert saved.step >= last
        assert saved.restore({"x": np.empty(20_000)})["x"].shape == (20_000,)
