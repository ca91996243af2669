"""`sdipc batch` from several hosts on storage that they share: an object store, and a folder as NFS shows it."""

import collections
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from tests.batch_jobs import draw_all
from tests.hosts import nfs
from tests.processes import free_port, start

ITEMS, SHARD, HOSTS = 37, 3, 4
# Of a batch on a device that costs nothing else.
_SECONDS = 0.4
_PATIENCE = 240
_KEYS = {"AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal", "AWS_DEFAULT_REGION": "us-east-1"}

Environment = Mapping[str, str]


def on_an_object_store(folder: Path, model: Path, *, hosts: int, kills: int) -> str:
    """37 items on S3, where processes are killed in between."""
    with _s3() as environment:
        pictures = draw_all(folder / "pictures-of-s3", ITEMS)
        for path in sorted(pictures.glob("*.png")):
            (epath.Path("s3://rehearsal/pictures") / path.name).write_bytes(path.read_bytes())

        def job(name: str) -> tuple[Path, str]:
            target = f"s3://rehearsal/{name}"
            return _write_job(folder / f"{name}.yaml", model, "s3://rehearsal/pictures", target), target

        alone, whole = job("alone")
        code, errors = _finish([_begin(alone, 0, 1, environment)])[0]
        if code:
            return f"one process, undisturbed: exit {code}: FAILED {errors[-300:]}"
        shared, output = job("shared")
        return _shared([shared] * hosts, epath.Path(output), epath.Path(whole), hosts, kills, environment)


def on_nfs(folder: Path, model: Path, *, disturb: str) -> str:
    """37 items from four hosts, each with a mount of its own of one folder.

    Args:
        disturb: `nothing`; `kill` a host and start it again; `restart` the server in between, which is away for 6 s;
            the same with a server that has forgotten all handles, which are then `stale`.
    """
    root = folder / "nfs"
    shutil.rmtree(root, ignore_errors=True)
    export = root / "export"
    draw_all(export / "pictures", ITEMS)
    alone = _write_job(root / "alone.yaml", model, export / "pictures", export / "alone")
    code, errors = _finish([_begin(alone, 0, 1, {})])[0]
    if code:
        return f"one process, undisturbed: exit {code}: FAILED {errors[-300:]}"
    with nfs.mounted(export, [root / f"mount-{host}" for host in range(HOSTS)]) as server:
        jobs = [
            _write_job(
                root / f"shared-{host}.yaml", model, root / f"mount-{host}/pictures", root / f"mount-{host}/shared"
            )
            for host in range(HOSTS)
        ]

        def restart() -> None:
            server.stop()
            time.sleep(6)
            server.start(forgetful=disturb == "stale")

        return _shared(
            jobs,
            epath.Path(export / "shared"),
            epath.Path(export / "alone"),
            HOSTS,
            1 if disturb == "kill" else 0,
            {},
            None if disturb in ("nothing", "kill") else restart,
        )


def _shared(
    jobs: Sequence[Path],
    output: epath.Path,
    whole: epath.Path,
    hosts: int,
    kills: int,
    environment: Environment,
    disturb: Callable[[], None] | None = None,
) -> str:
    processes = [_begin(job, host, hosts, environment) for host, job in enumerate(jobs)]
    try:
        for kill in range(kills):
            # Each time another host has done a shard more.
            victim = (kill + 1) % hosts
            _wait_for(lambda v=victim, k=kill: _shards_of(output, v, hosts) > k // hosts, processes[victim])  # type: ignore[misc]
            processes[victim].kill()
            processes[victim].communicate()
            processes[victim] = _begin(jobs[victim], victim, hosts, environment)
        if disturb is not None:
            _wait_for(lambda: _shards_of(output, 0, hosts) > 0, processes[0])
            disturb()
        ended = _finish(processes)
    finally:
        for each in processes:
            each.kill()
    told = f"exit {' and '.join(str(code) for code in dict.fromkeys(code for code, _ in ended))}"
    if any(code for code, _ in ended):
        line = next(text.strip().splitlines()[-1] for code, text in ended if code)
        again = ("--retry-failed",) if any(code == 3 for code, _ in ended) else ()
        told += f" (`{line[:200]}`); the same command again{', with `--retry-failed`' if again else ''}: "
        ended = _finish([_begin(job, host, hosts, environment, *again) for host, job in enumerate(jobs)])
        told += f"exit {' and '.join(str(code) for code in dict.fromkeys(code for code, _ in ended))}"
        if any(code for code, _ in ended):
            return f"{told} FAILED {next(text for code, text in ended if code)[-300:]}"
    return f"{told}; {_compared(output, whole)}"


def _compared(output: epath.Path, whole: epath.Path) -> str:
    rows = collections.Counter(
        json.loads(line)["row"]
        for path in output.glob("shard-*.jsonl")
        for line in path.read_text().splitlines()[1:]
        if json.loads(line)["status"] == "done"
    )
    lost, doubled = ITEMS - len(rows), sum(rows.values()) - len(rows)
    left = sorted(path.name for path in output.iterdir() if path.name.endswith(".tmp") or path.name.startswith(".fuse"))
    here, there = (_summary(each) for each in (output, whole))
    same = "the digests of one host" if here == there else f"OTHER DIGESTS, {here} for {there}"
    doubles = f"{doubled} DOUBLED" if doubled else "none twice"
    losses = f"{lost} LOST" if lost else "none lost"
    return f"{len(rows)} items, {losses}, {doubles}, {same}{', LEFT ' + ', '.join(left) if left else ''}"


def _summary(folder: epath.Path) -> Any:
    path = folder / "manifest.json"
    if not path.exists():
        return "no manifest"
    found = json.loads(path.read_text())
    return found["digest"], found["pictures"], found["done"]


def _write_job(path: Path, model: Path, source: object, output: object) -> Path:
    values = {"model": str(model), "source": str(source), "output_dir": str(output)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values | {"shard_size": SHARD, "batch_size": SHARD}))
    return path


def _begin(job: Path, index: int, count: int, environment: Environment, *options: str) -> subprocess.Popen[str]:
    words = ["-m", "tests.batch_jobs", _SECONDS, "batch", job, "--process-index", index, "--process-count", count]
    return start([*words, *options], 1, **environment)


def _finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    found = []
    for each in processes:
        try:
            _, errors = each.communicate(timeout=_PATIENCE)
            found.append((each.returncode, errors))
        except subprocess.TimeoutExpired:
            each.kill()
            found.append((-9, f"{each.communicate()[1]}\nHANGS"))
    return found


def _shards_of(output: epath.Path, host: int, hosts: int) -> int:
    names = [path.name for path in output.iterdir()] if output.exists() else []
    numbers = [int(name[6:11]) for name in names if name.startswith("shard-") and name.endswith(".jsonl")]
    return sum(number % hosts == host for number in numbers)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


@cache
def _port() -> int:
    # One for all servers: etils keeps its connection.
    return free_port()


@contextmanager
def _s3() -> Iterator[Environment]:
    """An S3 server on this machine, with an empty bucket."""
    port = _port()
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **_KEYS}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = {name: os.environ.get(name) for name in environment}
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.1)
        os.environ.update(environment)
        import boto3
        import fsspec.config

        # Here, where others' files are looked for all the time; not in the processes that are looked at.
        fsspec.config.conf["s3"] = {"use_listings_cache": False}
        boto3.client("s3").create_bucket(Bucket="rehearsal")
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        server.kill()
        server.wait()
