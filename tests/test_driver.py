"""Who does which shard of a job when workers refuse, die, or are believed dead. Ray's part is played in this process,
so that each of these happens where a test wants it; `make ray-test` has real clusters."""

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from etils import epath

import sdipc_jax as sdipc
from sdipc_jax.batch import storage
from sdipc_jax.batch.driver import Driver
from sdipc_jax.batch.job import Job, Work
from sdipc_jax.batch.pipeline import Progress
from sdipc_jax.batch.settings import BatchSettings, read_job
from sdipc_jax.batch.workers import Worker
from sdipc_jax.commands import batch as command
from sdipc_jax.errors import InputError
from tests.batch_jobs import Stub, draw_all, manifest, records, write_job

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def loaded(tiny: sdipc.Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loads nothing again that is in memory, and leaves the user's cache alone."""
    monkeypatch.setattr("sdipc_jax.prompts.converter.load_weights", lambda config, tuned: tiny)
    monkeypatch.setattr("sdipc_jax.batch.workers.keep_compiled", lambda: None)
    monkeypatch.setattr("sdipc_jax.batch.workers.use_eigen", lambda: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    """Writes a job of ten rows in five shards."""
    source = draw_all(tmp_path / "in", 10)

    def job(name: str = "out", **values: Any) -> Path:
        settings = {"model": tiny_folder, "source": source, "steps": 1, "scale": 5.0, "shard_size": 2}
        return write_job(tmp_path / f"{name}.yaml", **(settings | values))

    return job


class RayError(Exception):
    """What Ray raises for what became of a worker."""


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Cluster:
    """What the driver calls of Ray: a call is made when somebody waits for it, the oldest first.

    Args:
        nodes: for each, a worker in place of `Worker` or None.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, **nodes: Callable[..., Any] | None) -> None:
        self.kinds = nodes
        self.free = deque(nodes)
        self.calls: deque[Any] = deque()
        self.placed: list[str] = []
        self.selectors: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in self.kinds]

    def remote(self, kind: type) -> Any:
        def options(label_selector: dict[str, str] | None = None, **_: Any) -> Any:
            self.selectors.append(label_selector)
            return SimpleNamespace(remote=self._actor)

        return SimpleNamespace(options=options)

    def _actor(self, *arguments: Any) -> Any:
        node = self.free.popleft()
        self.placed.append(node)
        worker = (self.kinds[node] or Worker)(*arguments)
        return SimpleNamespace(
            place=node,
            node=SimpleNamespace(remote=lambda: SimpleNamespace(result=node)),
            start=SimpleNamespace(remote=partial(self._call, worker.start)),
            work=SimpleNamespace(remote=partial(self._call, worker.work)),
        )

    def _call(self, method: Callable[..., Any], *given: Any) -> Any:
        self.calls.append(call := Call(method, given))
        return call

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        call = next(call for call in self.calls if call in calls)
        self.calls.remove(call)
        call.make()
        return [call], [each for each in calls if each is not call]

    def get(self, call: Any, timeout: float | None = None) -> Any:
        if isinstance(call.result, RayError):
            raise call.result
        return call.result

    def kill(self, worker: Any) -> None:
        self.free.append(worker.place)


class Call:
    def __init__(self, method: Any, given: Any) -> None:
        self.method, self.given, self.result = method, given, None

    def make(self) -> None:
        try:
            self.result = self.method(*self.given)
        except RayError as error:
            self.result = error
        except InputError as error:
            self.result = RayTaskError(error)


def drive(cluster: Cluster, path: Path, **options: Any) -> tuple[Progress, list[str]]:
    """The job on the cluster: what has happened, and what was told."""
    job, told = Job.make(read_job(path)), list[str]()
    job.manifest.claim()
    settings = BatchSettings(job=path, on="ray", **options)
    driver = Driver(cluster, job, settings, Stub(), told.append)
    try:
        progress = driver(job.left(range(job.shards)), lambda progress: False, lambda done: None)
    finally:
        driver.close()
    job.manifest.sum_up(job.shards)
    return progress, told


def whole(path: Path, clean: Path) -> None:
    """The job is what one process makes."""
    command.batch(BatchSettings(job=clean), lambda done: None, Stub())
    folder, expected = path.with_suffix(""), clean.with_suffix("")
    assert [line["row"] for line in records(folder)] == list(range(10))
    assert manifest(folder) == manifest(expected)
    assert not list(folder.glob(".*.tmp"))
    for each in expected.rglob("shard-*"):
        found = folder / each.relative_to(expected)
        assert each.is_dir() or each.suffix == ".png" or found.read_bytes() == each.read_bytes()


class Other(Worker):
    """On a node where the package was updated since the driver started."""

    def __init__(self, job: Any, folder: str, offline: bool, versions: Any, make_device: Any) -> None:
        super().__init__(job, folder, offline, versions | {"sdipc_jax": "before the update"}, make_device)


def test_a_node_with_other_software_gets_no_work(make: Make) -> None:
    cluster = Cluster(one=None, two=Other, three=None)
    progress, told = drive(cluster, make())
    assert (progress.done, progress.shards) == (10, 5)
    [line] = told
    assert line.startswith("on ")
    assert "there and before the update with the driver, expected the same software on all nodes" in line
    assert line.endswith("(the others go on without it)")
    assert cluster.placed == ["one", "two", "three"]
    whole(make(), make("clean"))


def test_another_node_is_tried_for_the_only_worker(make: Make) -> None:
    cluster = Cluster(one=Other, two=None)
    progress, _ = drive(cluster, make(), workers=1)
    assert progress.shards == 5
    assert cluster.placed == ["one", "two"]
    assert cluster.selectors == [None, {"ray.io/node-id": "!in(one)"}]


def test_a_job_that_no_node_will_do_ends(make: Make, tmp_path: Path) -> None:
    cluster = Cluster(one=Other, two=Other)
    with pytest.raises(InputError, match=r"^on \S+: sdipc_jax is \S+ there and before the update with the driver"):
        drive(cluster, make())
    assert sorted(cluster.placed) == ["one", "two"]
    assert not list((tmp_path / "out").glob("shard-*"))


class Unmade(Worker):
    """On a node without the package: Ray has no more to say than this."""

    def start(self) -> tuple[str, ...]:
        told = "The actor died because of an error raised in its creation task, ray::Worker.__init__()"
        raise RayError(f"{told}\nTraceback:\n  ...\nModuleNotFoundError: No module named 'sdipc_jax'\n")


def test_nodes_on_which_no_worker_gets_ready(make: Make, tmp_path: Path) -> None:
    lost = "it could not be made there (ModuleNotFoundError: No module named 'sdipc_jax')"
    with pytest.raises(InputError, match=r"^10 workers were lost one after the other before they were ready, the last"):
        drive(Cluster(one=Unmade), make())
    # Beside one that does, it is left alone after as many.
    progress, told = drive(Cluster(one=None, two=Unmade), make())
    assert progress.shards == 5
    assert told == [f"a worker was lost while it got ready: {lost}"]
    whole(make(), make("clean"))


class Unheard(Worker):
    """Loses its connection when it begins its first shard, and goes on unheard when the test wants it to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.heard = True
        UNHEARD.append(self)

    def work(self, work: Work, most_failures: int | None) -> Progress:
        if len(UNHEARD) > 1 or not self.heard:
            return super().work(work, most_failures)
        self.heard = False
        self.missed = work
        raise RayError("the actor is unavailable")


UNHEARD: list[Unheard] = []


def times(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which file each is, and when it was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("values", [{}, {"container": "folder"}, {"vectors": True}], ids=["tar", "folder", "vectors"])
def test_a_worker_believed_dead_changes_nothing_that_is_finished(
    make: Make, tmp_path: Path, values: dict[str, Any]
) -> None:
    UNHEARD.clear()
    progress, told = drive(Cluster(one=Unheard), make(**values))
    assert (progress.done, progress.shards) == (10, 5)
    assert told == ["a worker was lost at shard 0, which another one does: the actor is unavailable"]
    before = times(tmp_path / "out")
    first, _ = UNHEARD
    assert first.missed.shards == [0]
    first.work(first.missed, None)
    assert times(tmp_path / "out") == before
    whole(make(**values), make("clean", **values))


def test_a_row_that_two_try_again_is_there_once(make: Make, tmp_path: Path) -> None:
    picture = tmp_path / "in" / "00003.png"
    good = picture.read_bytes()
    picture.write_bytes(b"")
    drive(Cluster(one=None), make())
    picture.write_bytes(good)
    job = Job.make(read_job(make()))
    work = job.left(range(5), retry_failed=True)
    assert (work.shards, work.partly) == ([1], {1: {3}})
    for _ in range(2):
        assert job.do(work, Stub()).done == 1
    assert job.finished(work, 1) == job.manifest.header(1) != work.former[1]
    job.manifest.sum_up(5)
    whole(make(), make("clean"))


@pytest.mark.parametrize("container", ["tar", "folder"])
def test_who_tidies_up_between_making_and_holding(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    hold, taken = storage.hold, []

    def late(path: Path) -> int:
        # Another process is there first, every other time. It does not look into what is held.
        if path.parent == tmp_path / "out":
            taken.append(path)
            if len(taken) % 2:
                storage.remove_leftovers(epath.Path(tmp_path / "out"), "")
                assert not path.exists()
        return hold(path)

    monkeypatch.setattr(storage, "hold", late)
    drive(Cluster(one=None), make(container=container))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert len(taken) >= 20
    whole(make(container=container), make("clean", container=container))


def test_who_is_just_tidying_up(tmp_path: Path) -> None:
    held = list[int]()

    def touch(path: Path) -> None:
        path.touch()
        if not held:
            held.append(os.open(path, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)

    path, descriptor = storage.begin(epath.Path(tmp_path / "a"), touch)
    assert path.exists()
    for each in (*held, descriptor):
        os.close(each)
    with pytest.raises(FileNotFoundError):
        storage.begin(epath.Path(tmp_path / "missing" / "a"), Path.touch)


def test_folders_take_the_place_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(json.dumps(name))
    target = epath.Path(tmp_path / "old")
    storage.publish(tmp_path / "new", target)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]
    # What was there before comes back when the new one cannot be put there.
    (tmp_path / "third").mkdir()

    def refuse(source: Any, to: Any) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(storage, "rename", refuse)
    with pytest.raises(PermissionError):
        storage.publish(tmp_path / "third", target)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["new"]
