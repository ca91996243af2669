"""Numbers that belong to pictures, one each or one for all: checked where the host knows them, and put in rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sdipc_jax.errors import InputError


@dataclass(frozen=True)
class Rule:
    """What a number may be, and the dtype that it has on the device."""

    dtype: Any
    expected: str
    holds: Callable[[Any], bool]


WHOLE = Rule(
    jnp.uint32, "a whole number from 0 to 4294967295", lambda value: isinstance(value, int) and 0 <= value < 2**32
)
FINITE = Rule(jnp.float32, "a finite number", lambda value: abs(value) <= float(np.finfo(np.float32).max))
SHARE = Rule(jnp.float32, "0 to 1", lambda value: 0 <= value <= 1)


def on_host(values: Any) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values))


def rows(name: str, values: Any, count: int, rule: Rule) -> Array:
    """One value a picture.

    Raises:
        InputError: a value that breaks the rule, as far as the host knows, or another number of them.
    """
    leaves = jax.tree.leaves(values)
    if any(isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
        raise InputError(f"{name} is a key of JAX, expected {rule.expected}: give the number that it was made of")
    xp: Any = np if on_host(values) else jnp
    if xp is np:
        for value in np.ravel(values).tolist():
            if not rule.holds(value):
                raise InputError(f"{name} is {value!r}, expected {rule.expected}: choose another")
    array = xp.asarray(values, rule.dtype)
    if array.shape not in ((), (1,), (count,)):
        raise InputError(f"{name} has shape {array.shape}, expected {(count,)}, one value a picture, or one for all")
    # What the host knows is put into rows there: nothing needs to be compiled for it.
    return jax.device_put(xp.broadcast_to(array, (count,)))
