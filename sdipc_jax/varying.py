"""What `shard_map` knows of an array."""

from typing import Any

import jax


def varying_axes(array: Any) -> frozenset[str]:
    """The axes of a mesh over which an array differs, as far as an enclosing `shard_map` keeps account of it.

    None outside of one, under `pmap` and `vmap`, and where it was told not to (`check_vma=False`).
    """
    kind: Any = jax.typeof(array)
    return kind.manual_axis_type.varying
