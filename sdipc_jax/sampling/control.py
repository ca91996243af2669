"""ControlNets in the loop: what they see, and how much of it counts for each picture at each evaluation.

bundle = sdipc.add_controlnet(bundle, "control_v11p_sd15_canny")
pictures = sdipc.generate(bundle, context, controls=[sampling.Control(edges, scale=0.8, end=0.6)], seeds=0)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.sampling.rows import FINITE, SHARE, on_host, rows
from sdipc_jax.tracing import varying


@partial(jax.tree_util.register_dataclass, data_fields=["pictures", "scale", "start", "end"], meta_fields=[])
@dataclass(frozen=True)
class Control:
    """What one ControlNet is shown, taken as it is.

    Attributes:
        pictures: in [0, 1], of the size of the results, one for each row or one for all.
        scale: what its residuals are multiplied by, one number or one for each row.
        start, end: the shares of the evaluations between which it counts, likewise. As in diffusers it does not at
            those that begin before `start` or end after `end`.
    """

    pictures: Float[Array | np.ndarray, "#N H W 3"]
    scale: Any = 1.0
    start: Any = 0.0
    end: Any = 1.0


class Conditioning(NamedTuple):
    """A control as the loop reads it.

    Attributes:
        hint: the pictures as the network's first layers see them, the same at all evaluations.
        scale: of each row at each evaluation.
    """

    hint: Float[Array, "N h w C_0"]
    scale: Float[Array, "N evaluations"]


def condition(
    bundle: Bundle, controls: Sequence[Control], count: int, evaluations: int, size: tuple[int, int]
) -> tuple[Conditioning, ...]:
    """The controls of `count` rows.

    Raises:
        InputError: not one control for each network, pictures of another size, or numbers out of range.
    """
    if controls and len(controls) != len(bundle.config.controlnets):
        raise InputError(
            f"found {len(controls)} controls for {len(bundle.config.controlnets)} ControlNets, expected one for each: "
            "add networks with add_controlnet, or leave controls out"
        )
    return tuple(_condition(bundle, place, control, count, evaluations, size) for place, control in enumerate(controls))


def _condition(
    bundle: Bundle, place: int, control: Control, count: int, evaluations: int, size: tuple[int, int]
) -> Conditioning:
    expected = (count, *size, 3)
    if control.pictures.shape not in (expected, (1, *size, 3)):
        raise InputError(
            f"control pictures have shape {control.pictures.shape}, expected {expected}, or one for all: resize them"
        )
    scale = rows("the control's scale", control.scale, count, FINITE)
    start = rows("the control's start", control.start, count, SHARE)
    end = rows("the control's end", control.end, count, SHARE)
    if on_host((control.start, control.end)) and np.any(np.asarray(control.start) >= np.asarray(control.end)):
        raise InputError(
            f"the control's start is {control.start} and its end {control.end}, expected start < end: correct them"
        )
    begins, ends = (np.float32((np.arange(evaluations) + shift) / evaluations) for shift in (0, 1))
    counts = (begins >= start[:, None]) & (ends <= end[:, None])
    hint = embed_control(bundle, place, control.pictures)
    return Conditioning(jnp.broadcast_to(hint, (count, *hint.shape[1:])), scale[:, None] * counts)


@kept_program(static_argnums=(1,))
def embed_control(bundle: Bundle, place: int, pictures: Float[Array, "N H W 3"]) -> Float[Array, "N h w C_0"]:
    """Pictures in [0, 1] as the network at this place sees them, with each step's latents to be added."""
    params = bundle.params["controlnets"][str(place)]["controlnet_cond_embedding"]
    return apply(bundle.config.controlnets[place].embedding(bundle.config.compute_dtype), params, pictures)


def control_residuals(
    bundle: Bundle,
    controls: Sequence[Conditioning],
    i: Array,
    inputs: Float[Array, "M h w C"],
    *others: Any,
    **added: Any,
) -> tuple[Array, ...]:
    """What all ControlNets together add to the UNet's features at evaluation i; nothing if there are none.

    Args:
        inputs, others, added: as the UNet takes them, with the rows of the controls once or twice.
    """
    # A UNet that repaints reads more channels.
    sample = inputs[..., : bundle.config.vae.latent_channels] if controls else inputs
    sums: tuple[Array, ...] = ()
    for place, control in enumerate(controls):
        times = len(inputs) // len(control.hint)
        hint, scale = (jnp.concatenate([leaf] * times) for leaf in (control.hint, control.scale[:, i]))
        residuals = _residuals(bundle, place, scale, sample, *others, hint, **added)
        sums = tuple(map(jnp.add, sums, residuals)) if sums else residuals
    return sums


def _residuals(bundle: Bundle, place: int, scale: Float[Array, " M"], *inputs: Any, **added: Any) -> tuple[Array, ...]:
    """Those of one network, which does not run where it counts for no row."""
    model = bundle.config.controlnets[place].model(bundle.config.compute_dtype)
    params = bundle.params["controlnets"][str(place)]

    def run() -> tuple[Array, ...]:
        residuals = apply(model, params, *inputs, **added)
        return tuple((scale[:, None, None, None] * each.astype(jnp.float32)).astype(each.dtype) for each in residuals)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))
    return jax.lax.cond(jnp.any(scale != 0), run, lambda: varying(zeros, like=(params, scale, inputs, added)))
