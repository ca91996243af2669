"""SDXL's prompt, which is more than one array: that of Stable Diffusion 1.x and 2.x is its context alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.errors import InputError
from sdipc_jax.settings import SizeSettings


@partial(jax.tree_util.register_dataclass, data_fields=["context", "pooled", "sizes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What SDXL reads of N prompts. A pytree; rows are taken as of an array, `prompt[rows]`.

    Attributes:
        context: the states of both text towers side by side.
        pooled: the second tower's embedding of each text, a point in the joint space. Of R prompts for each picture
            there is one each, which are added up with the weights that the prompts have at an evaluation, in the mean
            over layers and places; or one for all of them.
        sizes: in pixels, of each picture or of all: height and width of the original, top and left of the crop, height
            and width of the target. If None those of the picture that is made, not cropped; in a negative prompt those
            of the prompt.
    """

    context: Float[Array, "N *R L D"]
    pooled: Float[Array, "N *R P"]
    sizes: Float[Array, "*N 6"] | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __iter__(self) -> Iterator["Prompt"]:
        return (self[row : row + 1] for row in range(len(self)))

    def __getitem__(self, rows: Any) -> "Prompt":
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def with_sizes(self, original: Any, target: Any, crop: Any = (0, 0)) -> "Prompt":
        """The prompt of pictures that were cut out of larger ones, as SDXL knows them from its training.

        Args:
            original: height and width before the crop, (2,) for all pictures or (N, 2).
            target: height and width after it, likewise.
            crop: what was cut off at top and left, likewise.
        """
        pairs = [jnp.broadcast_to(jnp.asarray(pair, jnp.float32), (len(self), 2)) for pair in (original, crop, target)]
        return dataclasses.replace(self, sizes=jnp.concatenate(pairs, axis=1))


# A prompt of whichever checkpoint. Static types cannot tell which it is.
if TYPE_CHECKING:
    AnyPrompt = Any
else:
    AnyPrompt = Float[Array, "N L D"] | Prompt


def abstract_prompt(config: Config, count: int) -> Any:
    """The shapes of the prompts that a checkpoint's UNet reads."""
    shape = (count, config.tokens.length, config.unet.cross_attention_dim)
    context = jax.ShapeDtypeStruct(shape, jnp.float32)
    if config.text_2 is None:
        return context
    return Prompt(context, jax.ShapeDtypeStruct((count, config.text_2.projection_dim), jnp.float32))  # type: ignore[arg-type]


def context_of(prompt: Any) -> Float[Array, "N *R L D"]:
    """What cross-attention reads of a prompt."""
    return prompt.context if isinstance(prompt, Prompt) else prompt


def with_context(prompt: Any, context: Float[Array, "N *R L D"]) -> Any:
    """The prompt with other states."""
    return dataclasses.replace(prompt, context=context) if isinstance(prompt, Prompt) else context


def sizes_told(config: Config, height: int, width: int, *told: SizeSettings) -> dict[str, tuple[int, ...]]:
    """The sizes that SDXL reads, by the names of the settings; of several that say something the first counts.

    Args:
        height, width: of the picture that is made, which count where nothing is said.

    Returns:
        Nothing for checkpoints that read no sizes.

    Raises:
        InputError: these are told some.
    """
    # In the order in which `Prompt.with_sizes` takes them.
    defaults: dict[str, tuple[int, ...]] = {
        "original_size": (height, width),
        "target_size": (height, width),
        "crop": (0, 0),
    }
    if config.text_2 is None:
        for name in defaults:
            if any(getattr(each, name) for each in told):
                raise InputError(
                    f"found --{name.replace('_', '-')} for a checkpoint that reads no sizes, as SDXL does: leave it out"
                )
        return {}
    return {
        name: next((found for each in told if (found := getattr(each, name))), default)
        for name, default in defaults.items()
    }


def check_axes(what: str, found: Any, axes: Sequence[str], most: int) -> None:
    """Refuses what is no array, or has an axis too few: likely slips, said in their own words.

    Args:
        axes: the names of those that there must be.
        most: how many there may be.

    Raises:
        InputError: with what to give.
    """
    shape = ", ".join(axes)
    if isinstance(found, str) or not hasattr(found, "shape"):
        kind = f"the text {found!r}" if isinstance(found, str) else f"a {type(found).__name__}"
        advice = "encode texts with `tokenize` and `text_prompt`" if isinstance(found, str) else "give an array"
        raise InputError(f"{what} is {kind}, expected an array ({shape}): {advice}")
    if len(found.shape) == len(axes) - 1:
        raise InputError(
            f"{what} has shape {found.shape}, expected ({shape}) with one row a picture: give {what}[None]"
        )
    if not len(axes) <= len(found.shape) <= most:
        raise InputError(f"{what} has shape {found.shape}, expected ({shape}): change its shape")


def check_prompt(what: str, prompt: Any, most: int = 3) -> None:
    """`check_axes` for a prompt; None and SDXL's are no slips."""
    if prompt is not None and not isinstance(prompt, Prompt):
        check_axes(what, prompt, ("N", "L", "D"), most)


def unet_inputs(
    config: Config, what: str, prompt: Any, count: int, sizes: Float[Array | np.ndarray, "*N 6"]
) -> tuple[Float[Array, "N *R L D"], dict[str, Array]]:
    """A prompt as the UNet takes it: its context, and by name what else SDXL's reads.

    Args:
        what: what to call it in errors.
        count: of pictures.
        sizes: those of a prompt that says nothing of them.

    Raises:
        InputError: another kind of checkpoint's prompt, or shapes that do not fit.
    """
    expected = config.added_inputs(count)
    if isinstance(prompt, Prompt) != bool(expected):
        kind = "a Prompt, as SDXL reads" if expected else "an array, as this checkpoint reads"
        raise InputError(f"{what} is {type(prompt).__name__}, expected {kind}: make it with this bundle")
    if not expected:
        return prompt, {}
    chosen = jnp.asarray(sizes if prompt.sizes is None else prompt.sizes, jnp.float32)
    added = {"text_embeds": prompt.pooled, "time_ids": chosen if chosen.ndim > 1 else chosen[None]}
    shapes = {name: each.shape for name, each in expected.items()}
    if prompt.pooled.ndim > 2:
        shapes["text_embeds"] = (count, *prompt.context.shape[1:-2], shapes["text_embeds"][1])
    for name, array in added.items():
        shape = shapes[name]
        if array.ndim != len(shape) or array.shape[1:] != shape[1:] or len(array) not in (1, count):
            raise InputError(f"{what} has {name} of shape {array.shape}, expected {shape}: make it with this bundle")
    return prompt.context, {name: jnp.broadcast_to(array, shapes[name]) for name, array in added.items()}
