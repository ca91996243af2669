"""Rehearses what happens between hosts: `python -m tests.hosts.rehearsal`, as root, or `make faults-hosts`.

Two and four hosts in network namespaces run `sdipc tune --distributed` and `sdipc vary --distributed` on a checkpoint
in miniature; `sdipc batch` runs on an object store, and on a folder that each host sees as NFS would show it. Each row
does one thing to them, looks at how they end, gives the same command again, and compares the results with those of
hosts that nothing happened to. Outcomes are kept, so that rows can be done one by one, and written as a table into
docs/scale.md.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.hosts import stores
from tests.hosts.network import CUT, WHOLE, Link, Network
from tests.processes import free_port
from tests.tuning_runs import Run, write_pictures, write_small_checkpoint

HEARTBEAT = 10
# Seconds within which hosts end that lose each other: the heartbeat, and what it takes to notice and to leave.
LIMIT = 2 * HEARTBEAT + 5
_PATIENCE = 180
_SDIPC = sys.executable, "-m", "sdipc_jax.cli"
Process = subprocess.Popen[bytes]
Fault = Callable[[Network, list[Process]], None]
_REPOSITORY = Path(__file__).parents[2]
# When JAX ends a process because it misses another.
_OF_JAX = "unhealthy", "Socket closed", "JAX distributed service detected fatal errors"
# What is not as it should be is told in capitals.
_BAD = "FAILED|OTHER|HANGS|LATE|LEFT|LOST|DOUBLED|NO LINE|NOTHING"
_MARKS = "<!-- rehearsed -->", "<!-- /rehearsed -->"


@dataclass(frozen=True)
class Ended:
    """How a host's process ended: its exit code, None if it did not, and what it said."""

    code: int | None
    text: str


@dataclass
class Job:
    """One command on all hosts.

    Attributes:
        run: its folder.
        own: what differs on a host: words of the command.
        environment: the same of the environment.
    """

    network: Network
    run: Run
    words: Sequence[object]
    own: Mapping[int, Sequence[object]] = field(default_factory=dict)
    environment: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    def log(self, host: int) -> Path:
        """What a host says."""
        return self.run.folder.with_name(f"{self.run.folder.name}.{host}.log")

    @contextmanager
    def started(self, count: int | None = None) -> Iterator[list[Process]]:
        """The command on the first so many hosts; none is left in the end."""
        count = len(self.network.names) if count is None else count
        joining = ("--distributed", "--coordinator-address", f"host-a:{free_port()}", "--num-processes", count)
        limits = ("--heartbeat-timeout", HEARTBEAT, "--initialization-timeout", 120)
        processes = []
        for host in range(count):
            words = [*_SDIPC, *self.words, *self.own.get(host, ()), *joining, "--process-id", host, *limits]
            environment = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.run.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "PYTHONPATH": str(_REPOSITORY),
            }
            environment |= self.environment.get(host, {})
            folder = self.run.folder.parent
            processes.append(self.network.start(host, words, folder, environment, self.log(host)))
        try:
            yield processes
        finally:
            for each in processes:
                each.kill()
                each.wait()

    def ended(self, processes: Mapping[int, Process], seconds: float = _PATIENCE) -> dict[int, Ended]:
        """How each has ended; those that are late are killed."""
        found = {}
        deadline = time.monotonic() + seconds
        for host, each in processes.items():
            code: int | None
            try:
                code = each.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
                code = None
            found[host] = Ended(code, self.log(host).read_text(errors="replace"))
        return found

    def finish(self, count: int | None = None) -> dict[int, Ended]:
        """From where it is to its end."""
        with self.started(count) as processes:
            return self.ended(dict(enumerate(processes)))


@dataclass
class Place:
    """Where the rehearsals' files are: a checkpoint, pictures, compiled programs."""

    folder: Path

    @cached_property
    def checkpoint(self) -> Path:
        return self._made("small", write_small_checkpoint)

    @cached_property
    def other(self) -> Path:
        return self._made("other", partial(write_small_checkpoint, seed=1))

    @cached_property
    def data(self) -> Path:
        return self._made("data", lambda folder: write_pictures(folder, {"thing": 5}))

    def _made(self, name: str, make: Callable[[Path], Path]) -> Path:
        return path if (path := self.folder / name).exists() else make(path)

    def tuning(self, network: Network, name: str, steps: int = 40) -> Job:
        """A run of `tune`."""
        values = {"model": str(self.checkpoint), "data": str(self.data), "prompt_length": 2, "learning_rate": 1e-3}
        values |= {"steps": steps, "save_every": 4, "batch_size": 4}
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        config = folder.with_suffix(".yaml")
        config.write_text(json.dumps(values | {"output_dir": str(folder)}))
        return Job(network, Run(folder, "ct", self.folder / "cache", values), ["tune", "ct", config])

    def varying(self, network: Network, name: str) -> Job:
        """Four pictures by `vary`, in batches of one on each host, many steps each."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        words = ["vary", self.data / "thing/000.png", "--model", self.checkpoint, "--num-images", 4, "--steps", 400]
        words += ["--batch-size", 1, "--output-dir", folder, "--overwrite"]
        return Job(network, Run(folder, "", self.folder / "cache", {}), words)

    def clean(self, count: int) -> Run:
        """A run of `tune` on so many hosts that nothing happened to."""
        with Network(count) as network:
            if not (self.folder / f"clean-{count}/tuned.safetensors").exists():
                job = self.tuning(network, f"clean-{count}")
                if not _well(ended := job.finish()):
                    raise SystemExit(f"the run that nothing happens to has failed: {ended}")
        return Run(self.folder / f"clean-{count}", "ct", self.folder / "cache", {})


@dataclass(frozen=True)
class Row:
    """What is done to the hosts.

    Attributes:
        what: in words.
        rehearse: does it, and says what came of it.
    """

    what: str
    rehearse: Callable[[Place], str]


def tuning_goes_on(place: Place, hosts: int, fault: Fault) -> str:
    """A fault in the middle of a run: it goes on, or all end, and the same command goes on."""
    clean = place.clean(hosts)
    with Network(hosts) as network:
        job = place.tuning(network, "run")
        with job.started() as processes:
            if not _begins(lambda: job.run.lines() >= 10, processes):
                return _told("did not start: FAILED", network, job.ended(dict(enumerate(processes))))
            began = time.monotonic()
            fault(network, processes)
            told = _ends(network, job, processes, began)
        network.join(WHOLE)
        if job.run.lines() < 40 or not (job.run.folder / "tuned.safetensors").exists():
            again = job.finish()
            if not _well(again):
                return _told(f"{told}; the same command again: FAILED", network, again)
            told += "; the same command goes on"
        same = job.run.result() == clean.result()
        return f"{told}, {_bits(same)}{_leftovers(job.run.leftovers())}"


def tuning_is_refused(place: Place, **own: Any) -> str:
    """Something on the second host is not as on the first."""
    with Network(2) as network:
        job = place.tuning(network, "run", steps=8)
        for name, make in own.items():
            setattr(job, name, make(place))
        ended = job.finish()
        return _told(f"exit {_codes(ended)}", network, ended) + _leftovers([str(step) for step in job.run.steps()])


def tuning_does_not_care(place: Place, steps: int = 40, link: Link = WHOLE, **own: Any) -> str:
    """Something is odd from beginning to end."""
    clean = place.clean(2)
    with Network(2) as network:
        network.join(link)
        job = place.tuning(network, "run", steps)
        for name, make in own.items():
            setattr(job, name, make(place))
        ended = job.finish()
        if not _well(ended):
            return _told(f"exit {_codes(ended)}", network, ended)
        same = job.run.metrics() == clean.metrics()[:steps]
        return f"goes on, {_bits(same)}{_leftovers(job.run.leftovers())}"


def tuning_goes_on_with_fewer(place: Place) -> str:
    """Two of four hosts are lost for good."""
    clean = place.clean(4)
    with Network(4) as network:
        job = place.tuning(network, "run")
        with job.started() as processes:
            if not _begins(lambda: job.run.lines() >= 10, processes):
                return _told("did not start: FAILED", network, job.ended(dict(enumerate(processes))))
            began = time.monotonic()
            for lost in (2, 3):
                _lose(network, processes, lost)
            told = _ends(network, job, processes, began)
        again = job.finish(count=2)
        if not _well(again):
            return _told(f"{told}; on two hosts: FAILED", network, again)
        pairs = list(zip(job.run.metrics(), clean.metrics(), strict=True))
        same = all(here["pictures"] == there["pictures"] for here, there in pairs)
        apart = max(abs(here["loss"] / there["loss"] - 1) for here, there in pairs)
        turns = next((line for line in job.run.log() if "turns" in line), "NOTHING")
        return (
            f"{told}; two hosts go on, {'the same' if same else 'OTHER'} batches, losses within {apart:.0e}: {turns!r}"
        )


def varying_goes_on(place: Place, fault: Fault) -> str:
    """A fault while two hosts sample."""
    with Network(2) as network:
        clean = place.varying(network, "pictures")
        if not _well(ended := clean.finish()):
            return _told("the run that nothing happens to: FAILED", network, ended)
        job = place.varying(network, "varied")
        with job.started() as processes:
            if not _begins((job.run.folder / "manifest.jsonl").exists, processes):
                return _told("did not start: FAILED", network, job.ended(dict(enumerate(processes))))
            began = time.monotonic()
            fault(network, processes)
            told = _ends(network, job, processes, began)
        network.join(WHOLE)
        partial_files = [path.name for path in job.run.folder.glob(".*")]
        if not (job.run.folder / "sheet.png").exists():
            again = job.finish()
            if not _well(again):
                return _told(f"{told}; the same command again: FAILED", network, again)
            told += "; the same command, with `--overwrite`, begins again"
        here, there = (
            {path.name: path.read_bytes() for path in each.run.folder.glob("*.png")} for each in (job, clean)
        )
        return f"{told}, {_bits(here == there)}{_leftovers(partial_files)}"


def _begins(condition: Callable[[], bool], processes: Sequence[Process]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and all(each.poll() is None for each in processes):
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def _ends(network: Network, job: Job, processes: Sequence[Process], began: float) -> str:
    """Waits until all have ended, or have done all that there was to do, and says how."""
    lost = [host for host, each in enumerate(processes) if each.poll() == -signal.SIGKILL]
    stopped = [host for host, each in enumerate(processes) if host not in lost and _is_stopped(each.pid)]
    rest = {host: each for host, each in enumerate(processes) if host not in (*lost, *stopped)}
    ended = job.ended(rest)
    seconds = time.monotonic() - began
    if _well(ended):
        return "goes on"
    late = "" if seconds <= LIMIT else f", LATE for a heartbeat of {HEARTBEAT} s"
    told = _told(f"exit {_codes(ended)} after {seconds:.0f} s{late}", network, ended)
    for host in stopped:
        processes[host].send_signal(signal.SIGCONT)
    if stopped:
        told += (
            f"; the one that came back: exit {_codes(job.ended({host: processes[host] for host in stopped}, LIMIT))}"
        )
    return told


def _told(outcome: str, network: Network, ended: Mapping[int, Ended]) -> str:
    """The outcome, with the line of this program's own that names a host and says the most."""
    lines = [line for each in ended.values() for line in each.text.splitlines()]
    naming = [line for line in lines if line.startswith("sdipc: ") and any(name in line for name in network.names)]
    of_jax = any(words in line for words in _OF_JAX for line in lines)
    if said := [line for line in naming if not line.startswith("sdipc: processes: ")]:
        return f"{outcome}, `{said[0]}`"
    return f"{outcome}, {f'the message of JAX, after `{naming[0]}`' if naming and of_jax else 'NO LINE NAMES A HOST'}"


def _well(ended: Mapping[int, Ended]) -> bool:
    return all(each.code == 0 for each in ended.values())


def _codes(ended: Mapping[int, Ended]) -> str:
    codes = dict.fromkeys(each.code for each in ended.values())
    return " and ".join("HANGS" if code is None else str(code) for code in codes)


def _bits(same: bool) -> str:
    return "the same bits" if same else "OTHER BITS"


def _leftovers(names: Sequence[str]) -> str:
    return f", LEFT {', '.join(names)}" if names else ""


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# What is done to hosts in the middle of their work.


def _cut(network: Network, _: Any, *, seconds: float | None, hosts: Sequence[int] = (1,)) -> None:
    network.join(CUT, *hosts)
    if seconds is not None:
        time.sleep(seconds)
        network.join(WHOLE, *hosts)


def _cut_one_way(network: Network, _: Any, *, source: int, target: int) -> None:
    network.links[source, target] = CUT


def _stop(_: Network, processes: Sequence[Process], *, host: int, seconds: float | None) -> None:
    processes[host].send_signal(signal.SIGSTOP)
    if seconds is not None:
        time.sleep(seconds)
        processes[host].send_signal(signal.SIGCONT)
    else:
        time.sleep(0.5)


def _lose(network: Network, processes: Sequence[Process], host: int) -> None:
    """No connection is closed: a host that has lost its power says nothing."""
    network.join(CUT, host)
    processes[host].kill()
    processes[host].wait()


def _another_commit(place: Place) -> dict[int, dict[str, str]]:
    copy = place.folder / "another-commit"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(_REPOSITORY / "sdipc_jax", copy / "sdipc_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "sdipc_jax/errors.py").open("a") as stream:
        stream.write("# Another commit.\n")
    return {1: {"PYTHONPATH": str(copy)}}


def _another_jaxlib(place: Place) -> dict[int, dict[str, str]]:
    """What is installed there says that it is another version."""
    folder = place.folder / "another-jaxlib"
    (folder / "jaxlib-0.9.9.dist-info").mkdir(parents=True, exist_ok=True)
    (folder / "jaxlib-0.9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: jaxlib\nVersion: 0.9.9\n")
    return {1: {"PYTHONPATH": f"{folder}{os.pathsep}{_REPOSITORY}"}}


def _another_model(place: Place) -> dict[int, list[str]]:
    return {1: [f"model={place.other}"]}


def _an_hour_ahead(place: Place) -> dict[int, dict[str, str]]:
    """As Python tells it: hosts share the kernel's clock, and libfaketime shifts how long threads wait too."""
    folder = place.folder / "an-hour-ahead"
    folder.mkdir(parents=True, exist_ok=True)
    shifted = "now, now_ns = time.time, time.time_ns\ntime.time = lambda: now() + 3600\n"
    (folder / "sitecustomize.py").write_text(
        f"import time\n\n{shifted}time.time_ns = lambda: now_ns() + 3600 * 10**9\n"
    )
    return {1: {"PYTHONPATH": f"{folder}{os.pathsep}{_REPOSITORY}"}}


def _tune(count: int, fault: Callable[..., None], /, **options: Any) -> Callable[[Place], str]:
    return lambda place: tuning_goes_on(place, count, partial(fault, **options))


def _vary(fault: Callable[..., None], /, **options: Any) -> Callable[[Place], str]:
    return lambda place: varying_goes_on(place, partial(fault, **options))


def _s3(**options: Any) -> Callable[[Place], str]:
    return lambda place: stores.on_an_object_store(place.folder, place.checkpoint, **options)


def _nfs(disturb: str) -> Callable[[Place], str]:
    return lambda place: stores.on_nfs(place.folder, place.checkpoint, disturb=disturb)


ROWS = {
    "tune-cut-3": Row("`tune`, 2 hosts: the link is cut for 3 s", _tune(2, _cut, seconds=3)),
    "tune-cut": Row("`tune`, 2 hosts: the link is cut for longer than the heartbeat", _tune(2, _cut, seconds=None)),
    "tune-deaf": Row(
        "`tune`, 2 hosts: what host-a sends does not arrive at host-b", _tune(2, _cut_one_way, source=0, target=1)
    ),
    "tune-dumb": Row(
        "`tune`, 2 hosts: what host-b sends does not arrive at host-a", _tune(2, _cut_one_way, source=1, target=0)
    ),
    "tune-slow": Row(
        "`tune`, 2 hosts: 200 ms of delay and 5% loss each way, all along (4 updates)",
        lambda place: tuning_does_not_care(place, 4, Link(loss=0.05, delay=0.2)),
    ),
    "tune-stop-3": Row("`tune`, 2 hosts: host-b's process is stopped for 3 s", _tune(2, _stop, host=1, seconds=3)),
    "tune-stop": Row(
        "`tune`, 2 hosts: host-b's process is stopped until the other has ended", _tune(2, _stop, host=1, seconds=None)
    ),
    "tune-worker": Row("`tune`, 2 hosts: host-b is lost", _tune(2, _lose, host=1)),
    "tune-coordinator": Row("`tune`, 2 hosts: host-a, the coordinator's, is lost", _tune(2, _lose, host=0)),
    "tune-clock": Row(
        "`tune`, 2 hosts: host-b's clock, as Python tells it, is an hour ahead",
        lambda place: tuning_does_not_care(place, environment=_an_hour_ahead),
    ),
    "tune-weights": Row(
        "`tune`, 2 hosts: host-b has other weights", lambda place: tuning_is_refused(place, own=_another_model)
    ),
    "tune-commit": Row(
        "`tune`, 2 hosts: host-b has another commit",
        lambda place: tuning_is_refused(place, environment=_another_commit),
    ),
    "tune-jaxlib": Row(
        "`tune`, 2 hosts: host-b has another jaxlib",
        lambda place: tuning_is_refused(place, environment=_another_jaxlib),
    ),
    "tune-4-cut": Row("`tune`, 4 hosts: host-c's link is cut", _tune(4, _cut, seconds=None, hosts=(2,))),
    "tune-4-coordinator": Row("`tune`, 4 hosts: host-a, the coordinator's, is lost", _tune(4, _lose, host=0)),
    "tune-4-fewer": Row("`tune`, 4 hosts: host-c and host-d are lost for good", tuning_goes_on_with_fewer),
    "vary-cut-3": Row("`vary`, 2 hosts: the link is cut for 3 s", _vary(_cut, seconds=3)),
    "vary-cut": Row("`vary`, 2 hosts: the link is cut for longer than the heartbeat", _vary(_cut, seconds=None)),
    "vary-stop": Row(
        "`vary`, 2 hosts: host-b's process is stopped until the other has ended", _vary(_stop, host=1, seconds=None)
    ),
    "vary-coordinator": Row("`vary`, 2 hosts: host-a, the coordinator's, is lost", _vary(_lose, host=0)),
    "s3-1": Row("`batch` on S3, 1 process, killed twice", _s3(hosts=1, kills=2)),
    "s3-4": Row("`batch` on S3, 4 processes, each killed once", _s3(hosts=4, kills=4)),
    "nfs": Row("`batch` on a folder as NFS shows it, 4 hosts", _nfs("nothing")),
    "nfs-kill": Row("`batch` on such a folder, 4 hosts: one is killed and started again", _nfs("kill")),
    "nfs-restart": Row("`batch` on such a folder, 4 hosts: the server is away for 6 s", _nfs("restart")),
    "nfs-stale": Row(
        "`batch` on such a folder, 4 hosts: the server is away for 6 s and knows no handle of before", _nfs("stale")
    ),
}


def table(outcomes: Mapping[str, str]) -> str:
    """All rows that were rehearsed, as Markdown."""
    lines = ["| what was done | what came of it |", "|---|---|"]
    lines += [f"| {row.what} | {outcomes[name]} |" for name, row in ROWS.items() if name in outcomes]
    return "\n".join(lines)


def main() -> int:
    """Rehearses the rows that are named, or all, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="all if left out")
    parser.add_argument("--folder", type=Path, default=_REPOSITORY / "build/hosts")
    parser.add_argument("--write", action="store_true", help="write the table into docs/scale.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = arguments.folder / "outcomes.json"
    outcomes: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    print(f"jax {version('jax')}, a heartbeat of {HEARTBEAT} s", flush=True)
    for name in arguments.rows or ROWS:
        outcomes[name] = ROWS[name].rehearse(Place(arguments.folder))
        kept.write_text(json.dumps(outcomes, indent=1))
        print(f"{name}: {outcomes[name]}", flush=True)
    if arguments.write:
        path = _REPOSITORY / "docs/scale.md"
        text = re.sub(
            rf"{_MARKS[0]}.*{_MARKS[1]}",
            lambda _: f"{_MARKS[0]}\n\n{table(outcomes)}\n\n{_MARKS[1]}",
            path.read_text(),
            flags=re.DOTALL,
        )
        path.write_text(text)
    return int(any(re.search(_BAD, outcome) for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
