"""A data set in, shards of pictures out, each exactly once: resumable generation.

Imports parallel, sampling, prompts, checkpoints, datasets, samplers and pictures.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdipc_jax.batch.mapping import RowMapper

__all__ = ["RowMapper"]


def __getattr__(name: str) -> Any:
    """What is in `__all__`, imported when it is first asked for: the command's options need no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdipc_jax.batch import mapping

    return getattr(mapping, name)
