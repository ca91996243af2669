"""What does shards on a node of a Ray cluster, and what it asks the cluster for."""

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sdipc_jax.batch.job import Job, Work
from sdipc_jax.batch.pipeline import Device, Progress
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.compilation import keep_compiled, use_eigen
from sdipc_jax.errors import InputError, printable
from sdipc_jax.parallel.software import software
from sdipc_jax.records import Record


@dataclass(frozen=True)
class Need:
    """What a worker asks Ray for.

    Attributes:
        resource: `CPU`, `GPU`, `TPU` or a name of the cluster's own.
        amount: how many of them.
    """

    resource: str
    amount: int

    @classmethod
    def of(cls, asked: str | None, nodes: Sequence[Mapping[str, float]]) -> "Need":
        """What is asked for, else a host's TPU chips, a GPU, or a node's cores.

        >>> Need.of(None, [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}])
        Need(resource='GPU', amount=1)
        >>> Need.of("CPU=4", [])
        Need(resource='CPU', amount=4)
        """
        if asked is not None:
            name, _, amount = asked.partition("=")
            return cls(name, int(amount))
        least = {
            name: int(min(node[name] for node in nodes if node.get(name, 0) >= 1))
            for name in ("TPU", "GPU", "CPU")
            if any(node.get(name, 0) >= 1 for node in nodes)
        }
        for name in ("TPU", "GPU"):
            if name in least:
                return cls(name, 1 if name == "GPU" else least[name])
        return cls("CPU", least.get("CPU", 1))

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many workers the nodes have room for.

        >>> Need("GPU", 1).room([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}])
        4
        """
        return sum(int(node.get(self.resource, 0) // self.amount) for node in nodes)

    def options(self, without: Collection[str] = ()) -> Record:
        """As Ray takes it.

        Args:
            without: nodes on which the worker must not be.
        """
        known = {"CPU": "num_cpus", "GPU": "num_gpus"}
        options: Record = {"num_cpus": 0}
        if self.resource in known:
            options[known[self.resource]] = self.amount
        else:
            options["resources"] = {self.resource: self.amount}
        if without:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(without))})"}
        return options

    def __str__(self) -> str:
        return f"{self.resource}={self.amount}"


class Worker:
    """What Ray makes an actor of: a process on a node that does shards of a job.

    Args:
        folder: the driver's, from which relative paths start.
        versions: the driver's `software()`.
    """

    def __init__(
        self, job: JobSettings, folder: str, offline: bool, versions: Record, make_device: Callable[..., Device]
    ) -> None:
        self.settings, self.folder, self.offline, self.versions = job, folder, offline, versions
        self.make_device = make_device

    def node(self) -> str:
        """What Ray calls the node that this is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self) -> tuple[str, ...]:
        """Loads the weights; gives what a person should know.

        Raises:
            InputError: this node has other software, files or folders than the driver.
        """
        with _named():
            use_eigen()
            keep_compiled()
            if self.offline:
                os.environ["HF_HUB_OFFLINE"] = "1"
            with suppress(OSError):
                # Without it only whole paths are found, and relative ones are missing by name.
                os.chdir(self.folder)
            for name, here in software().items():
                if here != self.versions[name]:
                    raise InputError(
                        f"{name} is {here} there and {self.versions[name]} with the driver, expected the same software "
                        "on all nodes: install it"
                    )
            self.job = Job.make(self.settings)
            self.job.manifest.check()
            self.device, notes = self.job.recipe.device(self.make_device)
            return notes

    def work(self, work: Work, most_failures: int | None) -> Progress:
        """Does what is left of some shards.

        Args:
            most_failures: stop when more rows than this have failed.
        """
        with _named():
            return self.job.do(
                work,
                self.device,
                lambda progress: most_failures is not None and progress.failed > most_failures,
            )


@contextmanager
def _named() -> Iterator[None]:
    """Says of what is refused on which node it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"on {printable(socket.gethostname())}: {error}") from None
