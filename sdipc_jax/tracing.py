"""What can be told of a program while it is traced."""

from typing import Any

import jax


def platform() -> str:
    """What the program is for, in so far as it can be told."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    # There is none outside of a mesh, and JAX 0.10.0's do not say it.
    return getattr(device, "platform", None) or jax.default_backend()


def varying_axes(array: Any) -> frozenset[str]:
    """The axes of a mesh over which an array differs, as far as an enclosing `shard_map` keeps account of it.

    None outside of one, under `pmap` and `vmap`, and where it was told not to (`check_vma=False`).
    """
    kind: Any = jax.typeof(array)
    return kind.manual_axis_type.varying
