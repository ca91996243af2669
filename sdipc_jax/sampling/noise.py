"""Keys and noise: one key a picture, so that it depends neither on its batch nor on the number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sdipc_jax.executables import kept_program
from sdipc_jax.tracing import under_our_rules


@kept_program()
@under_our_rules
def keys_of(seeds: Array, indices: Array) -> Key[Array, " N"]:
    """`fold_in(key(seed), index)` of each picture: one key a variation, whatever its batch."""
    key_of = partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(lambda seed, index: jax.random.fold_in(key_of(seed), index))(seeds, indices)


@kept_program(static_argnums=(1,))
@under_our_rules
def draw_noise(keys: Key[Array, " N"], shape: tuple[int, ...]) -> Float[Array, "N C h w"]:
    """Noise of unit variance for each key, float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
