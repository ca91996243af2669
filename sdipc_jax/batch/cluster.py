"""Where a job runs: in this process, or on a Ray cluster, whose workers do shards as a process of its own would."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sdipc_jax.batch.driver import SECONDS_FOR_AN_ANSWER, Driver, Stopping, Tell
from sdipc_jax.batch.job import Job, Work
from sdipc_jax.batch.pipeline import Device, Progress
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.errors import InputError, one_line, shortened


class Place(Protocol):
    """Where work is done.

    Attributes:
        notes: what a person should know when it is.
    """

    notes: tuple[str, ...]

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress: ...


@dataclass
class Here:
    """This process, on its own devices."""

    job: Job
    device: Device
    notes: tuple[str, ...]

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress:
        return self.job.do(work, self.device, stopping, report)


@contextmanager
def here(job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell) -> Iterator[Place]:
    """This process, with the weights loaded."""
    yield Here(job, *job.recipe.device(make_device))


@contextmanager
def on_ray(job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell) -> Iterator[Place]:
    """The cluster that `RAY_ADDRESS` names or this machine belongs to, else one of this machine alone.

    Raises:
        InputError: Ray is not installed, or the cluster is not there.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--on ray takes Ray, which is not installed: pip install 'sdipc-jax[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            _look_for(os.environ.get("RAY_ADDRESS", ""))
            # What workers print stays in Ray's logs: the standard output is for results alone.
            ray.init(log_to_driver=False, logging_level="warning")
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise InputError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS', 'not set')}, but that cluster cannot be joined "
                f"({shortened(one_line(error))}), expected one of this Ray and Python, with this token "
                "(RAY_AUTH_MODE): see to it, or unset it"
            ) from None
    driver = Driver(ray, job, settings, make_device, tell)
    try:
        yield driver
    finally:
        driver.close()
        if mine:
            ray.shutdown()


def _look_for(address: str) -> None:
    """Looks whether somebody is at a host's port: Ray itself tries for minutes.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_FOR_AN_ANSWER).close()
