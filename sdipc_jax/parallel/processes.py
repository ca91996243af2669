"""Several processes, as on several hosts: how they find each other, agree, and leave."""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdipc_jax.errors import InputError, MissingProcessError, printable
from sdipc_jax.parallel.mesh import check_devices, make_mesh
from sdipc_jax.parallel.peers import Peers
from sdipc_jax.parallel.software import software
from sdipc_jax.settings import ParallelSettings

_SECONDS_BETWEEN_TRIES = 0.2
_LONGEST_LINE = 1000
_SHOWN = 200
_READY, _REFUSED = "ready", "refused: "

# Of this process, once it has joined others.
_peers: Peers | None = None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Makes this process one of several, before anything touches a device; does nothing if it is one already.

    Without an address the cluster is detected, as `jax.distributed.initialize` does: Slurm, Open MPI, Cloud TPU,
    Kubernetes. A process that dies later takes the others down within the heartbeat's timeout.

    Args:
        coordinator_address: `host:port` of process 0. Give all three or none.
        num_processes: of the whole job.
        process_id: 0 to num_processes - 1, another on every process.
        initialization_timeout: seconds to wait for all to join.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
        InputError: values that are out of range or do not fit those of process 0, or no cluster to be found.
        MissingProcessError: not all have joined in time.
    """
    if jax.distributed.is_initialized():
        return
    explicit = (coordinator_address, num_processes, process_id)
    timeouts: dict[str, Any] = {
        "initialization_timeout": initialization_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
    }
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        _check(coordinator_address, num_processes, process_id)
        _roll_call(coordinator_address, num_processes, process_id, initialization_timeout)
        jax.distributed.initialize(*explicit, cluster_detection_method="deactivate", **timeouts)
    elif explicit != (None, None, None):
        raise InputError(
            f"found coordinator_address {coordinator_address}, num_processes {num_processes} and process_id "
            f"{process_id}, expected all three or none: give the missing ones"
        )
    else:
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:
            raise InputError(
                f"no cluster found ({error}), expected one of Slurm, Open MPI, Cloud TPU or Kubernetes: give "
                "coordinator_address, num_processes and process_id"
            ) from None


def start(settings: ParallelSettings) -> Mesh:
    """Joins the other processes if the settings say so, and makes the mesh that they ask for.

    Raises:
        InputError, MissingProcessError: as `initialize` and `make_mesh`, or processes have other software.
    """
    if settings.is_one_of_several:
        initialize(
            settings.coordinator_address,
            settings.num_processes,
            settings.process_id,
            initialization_timeout=settings.initialization_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        _keep_stdout()
        _introduce(settings.heartbeat_timeout)
    return make_mesh(settings.mesh)


def _introduce(heartbeat: float) -> None:
    """Tells who is where, refuses software that is not the same, and begins to watch over the others."""
    global _peers
    check_devices()
    if jax.process_count() == 1 or _peers is not None:
        return
    hosts = gather(socket.gethostname())
    if len(set(hosts)) > 1:
        named = ", ".join(f"{process} on {host}" for process, host in enumerate(hosts))
        print(f"sdipc: processes: {printable(named)}", file=sys.stderr, flush=True)
    agree({"software": software()})
    try:
        # JAX has no public name for it. Without one, its own way to end has to do.
        from jax._src.distributed import global_state
    except ImportError:
        return
    if global_state.client is not None:
        _peers = Peers(hosts, jax.process_index(), heartbeat, global_state.client)
        _peers.start()


def is_first() -> bool:
    """Whether this is process 0, which writes and prints for all."""
    # Asking for the number touches devices, which who has no others need not.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The text of every process, in the order of their ids. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([data.size], np.int32))[:, 0]
    padded = np.zeros(max(lengths), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def agree(settings: Mapping[str, Any]) -> None:
    """Refuses settings that are not the same on every process. All processes must call it.

    Args:
        settings: what JSON can hold; of long lists, a digest.

    Raises:
        InputError: on every process, with what differs.
    """
    texts = gather(json.dumps([settings, socket.gethostname()], sort_keys=True))
    (first, first_host), *others = map(json.loads, texts)
    for process, (there, host) in enumerate(others, start=1):
        if there != first:
            name, *values = _difference("", there, first)
            found, expected = (json.dumps(value)[:_SHOWN] for value in values)
            where = "" if host == first_host else f"; process {process} is on {host}, process 0 on {first_host}"
            raise InputError(
                f"{name} is {found} on process {process} and {expected} on process 0: start all processes with the "
                f"same settings, inputs and files{where}"
            )


def abandon(code: int) -> None:
    """Ends a process of several at once, after the traceback of the error that is being handled; does nothing if it is
    the only one.

    Python's own exit would first wait for the others, and they, which wait for this one in a computation, for it.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        if _peers is not None:
            _peers.wait_for_word(sys.exception())
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _difference(name: str, here: Any, there: Any) -> tuple[str, Any, Any]:
    """Where two values differ first, and what is there.

    >>> _difference("", {"a": 1, "b": [{"c": 2}, 3]}, {"a": 1, "b": [{"c": 4}, 3]})
    ('b.0.c', 2, 4)
    """
    if isinstance(here, list) and isinstance(there, list):
        here, there = dict(enumerate(here)), dict(enumerate(there))
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return name.removeprefix("."), here, there
    key = next(key for key in sorted(here | there) if here.get(key) != there.get(key))
    return _difference(f"{name}.{key}", here.get(key), there.get(key))


def _keep_stdout() -> None:
    """Gloo, through which CPUs exchange arrays, prints to the standard output, which is for results alone."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _check(address: str, count: int, process: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"coordinator_address is {address!r}, expected host:port, such as 10.0.0.2:8476")
    if not 0 <= process < count:
        raise InputError(f"process_id is {process}, expected 0 to {count - 1}, one less than num_processes")


def _roll_call(address: str, count: int, process: int, seconds: float) -> None:
    """Waits until all processes are there, at the port that JAX's coordinator uses next.

    JAX ends a process that waits in vain by a signal, and does not tell for how many it waited.
    """
    deadline = time.monotonic() + seconds
    if process == 0:
        _call(int(address.rpartition(":")[2]), count, deadline, seconds)
    else:
        _answer(address, count, process, deadline, seconds)


def _call(port: int, count: int, deadline: float, seconds: float) -> None:
    family = socket.AF_INET6 if (dual := socket.has_dualstack_ipv6()) else socket.AF_INET
    joined: set[int] = set()
    members: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(
                socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual)
            )
        except OSError as error:
            raise InputError(
                f"port {port} cannot be listened at ({os.strerror(error.errno or 0)}): choose another"
            ) from None
        problem = None
        while len(joined) < count - 1 and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                break
            # Anything may knock at a port; what does not say who it is within a second is not one of us.
            connection.settimeout(1.0)
            words = _read_line(connection).split()
            if len(words) == 3 and words[0] == "sdipc" and words[1].isdecimal() and words[2].isdecimal():
                theirs, others_count = int(words[1]), int(words[2])
                if others_count != count:
                    problem = f"num_processes is {others_count} on process {theirs} and {count} on process 0"
                elif theirs in joined:
                    problem = f"process_id is {theirs} on two processes"
                joined.add(theirs)
                members.append(connection)
        missing = ", ".join(str(each) for each in range(1, count) if each not in joined)
        late = f"{len(joined) + 1} of {count} processes joined within {seconds:g} s, process {missing} did not"
        answer = f"{_REFUSED}{problem}" if problem else late if missing else _READY
        for connection in members:
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
        # The others close first, so that the port is free at once.
        for connection in members:
            with contextlib.suppress(OSError):
                connection.recv(1)
    _judge(answer)


def _answer(address: str, count: int, process: int, deadline: float, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise MissingProcessError(
                f"process {process} of {count} found no process 0 at {address} within {seconds:g} s: see why, and "
                "start all again"
            )
        line = ""
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), left) as connection:
            connection.sendall(f"sdipc {process} {count}\n".encode())
            # Process 0 may have begun later, and is to be the one that tells who is missing.
            connection.settimeout(seconds + 1)
            line = _read_line(connection)
        if line:
            return _judge(line)
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _judge(answer: str) -> None:
    """Raises what process 0 found to be wrong."""
    if answer.startswith(_REFUSED):
        problem = answer.removeprefix(_REFUSED)
        raise InputError(f"{problem}: start all processes with the same count, each with its own id")
    if answer != _READY:
        raise MissingProcessError(f"{answer}: see why, and start all again")


def _read_line(connection: socket.socket) -> str:
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < _LONGEST_LINE:
            if not (more := connection.recv(_LONGEST_LINE)):
                break
            data += more
    return data.decode(errors="replace").strip()
