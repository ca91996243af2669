"""A Ray cluster of several nodes on this machine, whose nodes can be killed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MEMORY = 100 * 2**20
# What Ray and the processes that it starts are told before anything is imported.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


class Nodes:
    """A cluster whose head has no cores, so that workers are on nodes that are added."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": _MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    def add(self, cores: int = 1) -> Any:
        """A node more."""
        node = self.cluster.add_node(num_cpus=cores, object_store_memory=_MEMORY)
        self.nodes.append(node)
        return node

    def kill(self, node: Any) -> None:
        """As if the machine were gone: nothing says good-bye."""
        self.nodes.remove(node)
        node.kill_raylet(check_alive=False)
        self.cluster.worker_nodes.discard(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False)

    def clear(self) -> None:
        """Leaves the head alone."""
        while self.nodes:
            self.cluster.remove_node(self.nodes.pop())

    def workers(self) -> list[int]:
        """The processes of workers that are there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line, parent = path.read_bytes(), path.with_name("environ").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::Worker") and f"SDIPC_TEST={os.getpid()}".encode() in parent:
                found.append(int(path.parent.name))
        return found


@contextmanager
def started(cache: Path) -> Iterator[Nodes]:
    """A cluster; the driver in this process is connected to it."""
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache), "SDIPC_TEST": str(os.getpid())}
    import ray

    nodes = Nodes()
    os.environ["RAY_ADDRESS"] = nodes.cluster.address
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
