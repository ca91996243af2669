"""The mesh, and how arrays lie on it: weights whole on every device, batches divided."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdipc_jax.errors import InputError, one_line, shortened

# The mesh's one axis, over which the rows of a batch are divided.
AXIS = "data"

Tree = TypeVar("Tree")


def check_devices() -> None:
    """Refuses a kind of device that is asked for and not there.

    Raises:
        InputError: with what was asked for, and by what.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        # JAX tells the reason, or where it asserts nothing at all.
        reason = shortened(one_line(error).partition(" (set ")[0], 150) or "JAX finds none"
        config: Any = jax.config
        raise InputError(
            f"JAX_PLATFORMS is {config.jax_platforms or 'not set'}, but no such device works here ({reason}), "
            "expected one that this machine has: unset it, set JAX_PLATFORMS=cpu, or install JAX for it, as with "
            "pip install 'sdipc-jax[cuda]'"
        ) from None


def make_mesh(spec: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data`.

    Args:
        spec: `data=8` for the first 8 devices, all of them if None.
        devices: to choose from; those of all processes if None. `jax.local_devices()` are this process's own.

    Raises:
        InputError: another spec, more devices than there are, or a process left without a device.

    >>> make_mesh("data=1").shape["data"]
    1
    """
    check_devices()
    devices = jax.devices() if devices is None else devices
    processes = {device.process_index for device in devices}
    here = f"there are {len(devices)} devices" + (f" in {len(processes)} processes" if len(processes) > 1 else "")
    count = len(devices)
    if spec is not None:
        match = re.fullmatch(r"data=([1-9]\d{0,5})", spec)
        if match is None:
            raise InputError(f"mesh is {spec!r}, expected data=N with N devices, such as data={count}: {here}")
        count = int(match[1])
    if count > len(devices):
        raise InputError(
            f"mesh is {spec!r}, but {here}, expected at most data={len(devices)}: ask for fewer, or on CPUs set "
            "JAX_NUM_CPU_DEVICES"
        )
    if processes != {device.process_index for device in devices[:count]}:
        raise InputError(
            f"mesh is {spec!r}, but {here}, and some processes would have none to work on: ask for "
            f"data={len(devices)} or start fewer processes"
        )
    # Auto, because networks say nothing about shardings: inside shard_map each device runs the whole program.
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def on_each_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map`, without its account of what differs between devices: Pallas kernels do not keep one."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Every array whole on every device of the mesh; costs nothing where it is there already.

    Args:
        tree: arrays that are the same on every process, such as a `Bundle`.
    """
    sharding = NamedSharding(mesh, P())

    def copy(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        copies = [jax.device_put(leaf, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(np.shape(leaf), sharding, copies)

    return jax.tree.map(copy, tree)


def place(mesh: Mesh, tree: Tree) -> Tree:
    """Divides arrays (N, ...) over the mesh by rows, N a multiple of its size.

    Args:
        tree: arrays that hold all rows and are the same on every process; each process copies its devices' rows alone.
    """
    sharding = NamedSharding(mesh, P(AXIS))

    def divide(leaf: Any) -> jax.Array:
        shape = np.shape(leaf)
        parts = sharding.addressable_devices_indices_map(shape)
        rows = [jax.device_put(leaf[index], device) for device, index in parts.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, rows)

    return jax.tree.map(divide, tree)
