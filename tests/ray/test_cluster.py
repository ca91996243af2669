"""`sdipc batch --on ray` on several nodes of one machine: the same job, whoever comes, goes or dies."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.commands import batch as command
from sdipc_jax.errors import InputError
from tests.batch_jobs import Stub, draw_all, manifest, records, write_job
from tests.processes import finish, start
from tests.ray.conftest import Outcome
from tests.ray.nodes import Nodes, started, wait_for

Make = Callable[..., Path]
_MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with started(tmp_path_factory.mktemp("compiled")) as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """The head alone, and alone again."""
    yield cluster
    cluster.clear()


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> Make:
    """Writes a job's file for the checkpoint in miniature."""

    def make(name: str, **values: Any) -> Path:
        settings = {"model": tiny_folder, "steps": 1, "scale": 5.0, "batch_size": 4, "shard_size": 5} | values
        return write_job(tmp_path / f"{name}.yaml", **settings)

    return make


def on_ray(job: Path, *device: Any, **options: Any) -> Any:
    """The command in this process, which is the driver."""
    settings = BatchSettings(job=job, on="ray", worker_needs="CPU=1", **options)
    return command.batch(settings, lambda done: None, *device)


def shards(folder: Path) -> set[str]:
    """Those that are finished."""
    return {path.name for path in folder.glob("shard-*.jsonl")}


def each_once(folder: Path, rows: int) -> None:
    """Nothing lost and nothing twice, and nothing left lying about."""
    lines = records(folder)
    assert [line["row"] for line in lines] == list(range(rows))
    assert {line["status"] for line in lines} == {"done"}
    assert len({line["id"] for line in lines}) == rows
    assert not list(folder.glob(".*.tmp"))


def digests(folder: Path) -> tuple[str, str]:
    found = manifest(folder)
    return found["digest"], found["pictures"]


def test_on_one_two_and_four_workers_and_on_none(nodes: Nodes, job: Make, tmp_path: Path, outcome: Outcome) -> None:
    source = draw_all(tmp_path / "in", 37)
    [(code, _, errors)] = finish([start(["-m", "sdipc_jax.cli", "batch", job("none", source=source)], 1)], 300)
    assert code == 0, errors
    for _ in range(4):
        nodes.add()
    for count in (1, 2, 4):
        found = on_ray(job(f"ray-{count}", source=source), workers=count)
        assert (found.progress.done, found.progress.shards) == (37, 8)
        each_once(tmp_path / f"ray-{count}", 37)
        assert digests(tmp_path / f"ray-{count}") == digests(tmp_path / "none")
        for path in (tmp_path / "none").glob("shard-*"):
            assert (tmp_path / f"ray-{count}" / path.name).read_bytes() == path.read_bytes()
    outcome("37 items on no, 1, 2 and 4 workers", "one digest, all files equal byte for byte")


def test_a_node_is_killed_and_another_one_added(nodes: Nodes, job: Make, tmp_path: Path, outcome: Outcome) -> None:
    source, out = draw_all(tmp_path / "in", 60), tmp_path / "out"
    clean = command.batch(BatchSettings(job=job("clean", source=source)), lambda done: None, Stub())
    gone, there = nodes.add(), nodes.add()
    # Ray starts nodes in the main thread alone.
    with ThreadPoolExecutor() as pool:
        running = pool.submit(on_ray, job("out", source=source), Stub(1.0))
        wait_for(lambda: len(shards(out)) > 2)
        nodes.kill(gone)
        nodes.add()
        assert len(shards(out)) < 12
        found = running.result()
    assert there in nodes.nodes
    # Ray may try to put one more on the node before it sees that it is gone.
    assert any(note.startswith("workers that were lost: ") for note in found.notes)
    each_once(out, 60)
    assert found.manifest == clean.manifest  # type: ignore[union-attr]
    outcome(
        "one of two nodes is killed, another one added", "the job ends; 60 of 60 items once, the digest of one process"
    )


class Hungry(Stub):
    """Takes memory until the kernel ends it: at the shard with row 7, `times` times."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self.folder, self.times = folder, times

    def pictures(self, batch: Any) -> Any:
        eaten = len(list(self.folder.iterdir()))
        if any(item.row == 7 for item in batch.items) and eaten < self.times:
            (self.folder / str(eaten)).touch()
            (_MEMORY / "sdipc-test" / "cgroup.procs").write_text(str(os.getpid()))
            for _ in range(10_000):
                _LARGE.append(np.ones(2**20))
        return super().pictures(batch)


_LARGE: list[np.ndarray] = []


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A group of processes that may have 64 MB more than they bring."""
    group = _MEMORY / "sdipc-test"
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(64 * 2**20))
    except OSError:
        pytest.skip("limiting memory needs rights and a kernel that are not there")
    yield
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.mark.usefixtures("little_memory")
def test_a_worker_dies_of_memory(nodes: Nodes, job: Make, tmp_path: Path, outcome: Outcome) -> None:
    nodes.add()
    source = draw_all(tmp_path / "in", 20)
    (tmp_path / "eaten").mkdir()
    found = on_ray(job("out", source=source), Hungry(tmp_path / "eaten", times=2))
    assert len(list((tmp_path / "eaten").iterdir())) == 2
    assert found.manifest is not None
    each_once(tmp_path / "out", 20)
    outcome("the kernel ends a worker that takes too much memory, twice", "the job ends; 20 of 20 items once")


@pytest.mark.usefixtures("little_memory")
def test_a_shard_that_ends_every_worker_is_given_up(
    nodes: Nodes, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    monkeypatch.setattr("sdipc_jax.batch.driver._ATTEMPTS", 3)
    nodes.add()
    (tmp_path / "eaten").mkdir()
    found = on_ray(job("out", source=draw_all(tmp_path / "in", 20)), Hungry(tmp_path / "eaten", times=100))
    assert len(list((tmp_path / "eaten").iterdir())) == 3
    assert shards(tmp_path / "out") == {"shard-00000.jsonl", "shard-00002.jsonl", "shard-00003.jsonl"}
    assert found.failures[0]["error"].startswith("shard 1 was given up, since 3 workers were lost at it")
    assert "shards are missing: start it again" in str(found)
    (tmp_path / "eaten").rename(tmp_path / "before")
    (tmp_path / "eaten").mkdir()
    assert on_ray(job("out", source=tmp_path / "in"), Hungry(tmp_path / "eaten", times=0)).manifest is not None
    each_once(tmp_path / "out", 20)
    outcome("a shard whose rows end every worker", "given up and told, the others done; the same command does it later")


def drive(job: Path, seconds: float, *options: str) -> Any:
    """The command in a process of its own, which is the driver and may touch no device."""
    arguments = ["-m", "tests.batch_jobs", seconds, "batch", job, "--on", "ray", "--worker-needs", "CPU=1", "--json"]
    return start([*arguments, *options], 1, JAX_PLATFORMS="tpu")


def test_the_driver_is_killed_and_started_again(nodes: Nodes, job: Make, tmp_path: Path, outcome: Outcome) -> None:
    nodes.add(2)
    source, out = draw_all(tmp_path / "in", 60), tmp_path / "out"
    path = job("out", source=source, container="folder")
    driver = drive(path, 0.5)
    wait_for(lambda: len(shards(out)) > 2)
    driver.kill()
    driver.communicate()
    finished = {name: (out / name).stat().st_mtime_ns for name in shards(out)}
    driver = drive(path, 0.5)
    wait_for(lambda: len(shards(out)) > len(finished) + 2)
    driver.send_signal(signal.SIGTERM)
    [(code, output, errors)] = finish([driver], 60)
    assert code == 75, errors
    assert json.loads(output)["interrupted"]
    wait_for(lambda: not nodes.workers())
    [(code, output, errors)] = finish([drive(path, 0.0)], 120)
    assert code == 0, errors
    found = json.loads(output)
    assert found["shards_skipped"] >= len(finished) + 3
    assert found["manifest"]["done"] == 60
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    each_once(out, 60)
    outcome(
        "the driver is killed, started again, stopped with SIGTERM, started again",
        "what was finished is not touched; 60 of 60 items once",
    )


class Refuses(Stub):
    """A device that one node does not have."""

    def __init__(self, node: str) -> None:
        super().__init__(0.5)
        self.node = node

    def __call__(self, *_: Any) -> Stub:
        import ray

        if ray.get_runtime_context().get_node_id() == self.node:
            raise InputError("no such thing here")
        return self


def test_what_is_wrong_on_a_node_is_told_with_its_name(nodes: Nodes, job: Make, tmp_path: Path) -> None:
    only = nodes.add()
    source = draw_all(tmp_path / "in", 4)
    path = job("out", source=source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text("{}")
    [(code, _, errors)] = finish([drive(path, 0.0)], 120)
    assert (code, "holds another job" in errors) == (2, True)
    (tmp_path / "out" / "job.json").unlink()
    with pytest.raises(InputError, match=r"^on \S+: no such thing here$"):
        on_ray(path, Refuses(only.node_id))


def test_a_node_that_will_not_do_is_left_out(
    nodes: Nodes, job: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    bad, _ = nodes.add(), nodes.add()
    path = job("out", source=draw_all(tmp_path / "in", 40))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(on_ray, path, Refuses(bad.node_id))
        wait_for(lambda: len(shards(tmp_path / "out")) > 1)
        # The next worker has the choice of both nodes.
        for worker in nodes.workers():
            os.kill(worker, signal.SIGKILL)
        found = running.result()
    assert (found.progress.done, found.manifest["done"]) == (40, 40)
    assert "workers that were lost: 1; what they had not finished was begun again" in found.notes
    each_once(tmp_path / "out", 40)
    [told] = [line for line in capsys.readouterr().err.splitlines() if "no such thing here" in line]
    assert told.endswith(": no such thing here (the others go on without it)")
    outcome("one of two nodes will not do", "named once and left out; 40 of 40 items once")


class Slow:
    """The sampler, but for a pause before each batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, *arguments: Any) -> "Slow":
        self.sampler = Sampler.make(*arguments)
        return self

    def vectors(self, items: Any) -> Any:
        return self.sampler.vectors(items)

    def pictures(self, batch: Any) -> Any:
        time.sleep(self.seconds)
        return self.sampler.pictures(batch)


def test_twenty_kills_of_workers_and_nodes(nodes: Nodes, job: Make, tmp_path: Path, outcome: Outcome) -> None:
    source, out, luck = draw_all(tmp_path / "in", 500), tmp_path / "out", random.Random(26)
    values = {"source": source, "shard_size": 10, "batch_size": 5}
    [(code, _, errors)] = finish([start(["-m", "sdipc_jax.cli", "batch", job("clean", **values)], 1)], 300)
    assert code == 0, errors
    for _ in range(2):
        nodes.add()
    seen: dict[str, tuple[int, int]] = {}
    kills = {"workers": 0, "nodes": 0}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(on_ray, job("out", **values), Slow(1.5))
        while (kill := sum(kills.values())) < 20 and not running.done():
            # While workers start, or some while after one more shard was there.
            if kill % 4:
                before = shards(out)
                wait_for(lambda before=before: shards(out) != before or running.done())
            wait_for(lambda: nodes.workers() or running.done())
            time.sleep(luck.uniform(0, 0.5))
            if kill % 5 == 4:
                nodes.kill(luck.choice(nodes.nodes))
                nodes.add()
                kills["nodes"] += 1
            elif workers := nodes.workers():
                with suppress(ProcessLookupError):
                    os.kill(luck.choice(workers), signal.SIGKILL)
                    kills["workers"] += 1
            for name in shards(out):
                data = (out / name).with_suffix(".tar").stat()
                # What was finished is never touched again.
                assert seen.setdefault(name, (data.st_ino, data.st_mtime_ns)) == (data.st_ino, data.st_mtime_ns)
        early = running.done()
        found = running.result()
    # Otherwise it was not disturbed to the end.
    assert not early
    assert sum(kills.values()) == 20, kills
    each_once(out, 500)
    assert found.manifest is not None
    assert manifest(out) == manifest(tmp_path / "clean")
    for path in out.glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "clean" / path.name).read_bytes()
    outcome(
        f"20 kills at random over 500 items: {kills['workers']} workers, {kills['nodes']} nodes",
        "the job ends; nothing lost, nothing twice; all files equal byte for byte to one process's",
    )
