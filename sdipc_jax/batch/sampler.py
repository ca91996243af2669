"""The programs that the device runs: one for the vision tower, one for each size of picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from sdipc_jax.batch.items import Item, Size, with_index
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batches import in_batches, pad
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError
from sdipc_jax.parallel import AXIS, on_each_device, place, replicate
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts.contexts import as_long, edit_prompt, image_prompt, negative_prompt, text_prompt
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.projection import Projection, at_length, convert, end_states, in_parts, mean_end_state
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Record
from sdipc_jax.sampling import Control, Start, start_from
from sdipc_jax.sampling.decoding import NOT_FINITE, finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from sdipc_jax.sampling.weights import and_the_rest
from sdipc_jax.settings import Defaults

# Pictures that a device encodes at once, whatever the batch of the sampler: one program, and so the same vectors.
_ENCODED = 16


class Batch(NamedTuple):
    """Items of one size that are done together, and their ids."""

    size: Size
    items: Sequence[Item]
    ids: Sequence[str]


class _Rows(NamedTuple):
    """A row of each array for each picture."""

    vectors: Any
    tokens: Any
    negative: Any
    alpha: Any
    seeds: Any
    indices: Any
    asked: Any
    negative_given: Any = None
    sizes: Any = None
    negative_vectors: Any = None


class _Static(NamedTuple):
    """What a program is compiled for."""

    height: int
    width: int
    steps: int
    sampler: str
    karras: bool
    guided: bool
    guidance_interval: tuple[float, float] | None
    cache_interval: int
    strength: float | None = None


@dataclass(frozen=True)
class Sampler:
    """Runs batches on the devices of a mesh.

    Attributes:
        bundle: replicated over the mesh, as is the projection.
        values: steps, guidance and sampler.
    """

    bundle: Bundle
    projection: Projection
    job: JobSettings
    values: Defaults
    mesh: Mesh

    @classmethod
    def make(cls, bundle: Bundle, projection: Projection, job: JobSettings, values: Defaults, mesh: Mesh) -> "Sampler":
        """Copies the weights to the devices."""
        return cls(replicate(mesh, bundle), replicate(mesh, projection), job, values, mesh)

    def vectors(self, items: Sequence[Item]) -> Float32[np.ndarray, "N *places D_text"]:
        """Each item's vector (eq. 6): the weighted mean of those of its pictures, without what is projected out."""
        return np.stack([self._mean(item, own) for item, own in zip(items, self._encoded(items), strict=True)])

    def _encoded(self, items: Sequence[Item]) -> list[dict[str, np.ndarray]]:
        """The vectors of each item's pictures, by their role."""
        each = [{"picture": item.pixels, **item.others} for item in items]
        pixels = np.stack([one for roles in each for group in roles.values() for one in group])

        def encode(part: np.ndarray) -> Array:
            return _encode(self.mesh, self.bundle, self.projection, place(self.mesh, part))

        rows = iter(in_batches(encode, pixels, size=_ENCODED * self.mesh.size))
        return [{role: np.stack([next(rows) for _ in group]) for role, group in roles.items()} for roles in each]

    def _mean(self, item: Item, vectors: dict[str, np.ndarray]) -> Float32[np.ndarray, "*places D_text"]:
        own, record = vectors["picture"], item.record
        weights = np.asarray(record.get("weights", [1.0]), np.float64)
        # One picture's vector stays as it is, to the bit.
        mean = (
            own[0] if len(own) == 1 else ((weights / weights.sum()) @ own.reshape(len(own), -1)).reshape(own[0].shape)
        )
        mean = mean.astype(np.float32)
        unwanted = [self._of_text(texts) for texts in item.unwanted]
        if "without_picture" in vectors:
            unwanted.append(vectors["without_picture"])
        if unwanted:
            middle = self._middle
            directions = np.concatenate(unwanted) - middle
            mean = (
                middle[0]
                + np.asarray(in_parts(self.projection, algebra.project_out, mean[None] - middle, directions))[0]
            )
        if record.get("mean") == "direction":
            mean = np.asarray(at_length(self.projection, mean[None]))[0]
        return mean

    @cached_property
    def _after_end(self) -> Any:
        return plan_conversion(self.bundle.config, self.job).after_end

    @cached_property
    def _middle(self) -> Float32[np.ndarray, "1 *places D_text"]:
        """What the states of all texts have in common."""
        return np.asarray(mean_end_state(self.bundle, self._after_end))

    @cached_property
    def _states(self) -> dict[bytes, np.ndarray]:
        """Those of texts, by their tokens."""
        return {}

    def _of_text(self, texts: Any) -> Float32[np.ndarray, "1 *places D_text"]:
        name = texts.tokens.tobytes()
        if name not in self._states:
            self._states[name] = np.asarray(end_states(self.bundle, texts.tokens[None], self._after_end))
        return self._states[name]

    def _led_away(self, vectors: dict[str, np.ndarray]) -> Float32[np.ndarray, "*places D_text"] | None:
        """The mean of the pictures that guidance leads away from, at a prompt's length."""
        if "negative_picture" not in vectors:
            return None
        mean = in_parts(self.projection, algebra.mean, jnp.asarray(vectors["negative_picture"]))
        return np.asarray(at_length(self.projection, mean))[0]

    def pictures(self, batch: Batch) -> tuple[UInt8[np.ndarray, "N H W 3"], Bool[np.ndarray, " N"]]:
        """The items' pictures, and which of them the safety checker flagged, which are black."""
        records = list(map(with_index, batch.items, batch.ids))
        encoded, wanted = self._encoded(batch.items), batch.items[0].asked
        # Each in its own place they stay as they are.
        apart = "strengths" in wanted.arrays
        rows = _Rows(
            vectors=np.stack(
                [
                    own["picture"] if apart else self._mean(item, own)
                    for item, own in zip(batch.items, encoded, strict=True)
                ]
            ),
            tokens=_stack([item.tokens for item in batch.items]),
            negative=_stack([item.negative for item in batch.items]),
            # With an empty text and alpha 0 eq. 8 is eq. 7, bit for bit: one program for both.
            alpha=np.array([each["alpha"] or 0.0 for each in records], np.float32),
            seeds=np.array([each["seed"] for each in records], np.uint32),
            indices=np.array([each["index"] for each in records], np.uint32),
            negative_given=self._given([each["negative_prompt"] for each in records]),
            sizes=self._sizes(records),
            negative_vectors=_stack([self._led_away(own) for own in encoded]),
            asked=_stack([dict(item.asked.arrays) for item in batch.items]),
        )
        values = self.values
        guidance = values.guidance_scale
        static = _Static(
            *batch.size,
            values.steps,
            values.sampler,
            self.job.karras,
            guidance > 1 or self.bundle.config.unet.embeds_guidance,
            values.guidance_interval,
            values.cache_interval,
            wanted.strength,
        )
        # A batch that is not full is filled up, so that it runs the program that is there.
        placed = place(self.mesh, pad(rows, self.job.batch_size * self.mesh.size))
        eta = jnp.float32(self.job.eta)
        pictures, flagged, finite = _sample(self.mesh, static, self.bundle, placed, jnp.float32(guidance), eta)
        if finite is not None and not np.asarray(finite).all():
            raise InputError(NOT_FINITE.format(dtype=self.bundle.config.dtype))
        return np.asarray(pictures)[: len(records)], np.asarray(flagged)[: len(records)]

    def _given(self, texts: Sequence[str | None]) -> Bool[np.ndarray, " N"] | None:
        """Which negative prompts are texts; None where all are, since nothing said is the empty text."""
        if not self.bundle.config.force_zeros_for_empty_prompt:
            return None
        return np.array([text is not None for text in texts])

    def _sizes(self, records: Sequence[Record]) -> tuple[Float32[np.ndarray, "N 2"], ...] | None:
        """What SDXL is told of sizes, as `Prompt.with_sizes` takes it."""
        if self.bundle.config.text_2 is None:
            return None
        names = ("original_size", "target_size", "crop")
        return tuple(np.array([each[name] for each in records], np.float32) for name in names)


def _stack(rows: Sequence[Any]) -> Any:
    """Rows as one, an array of each of their arrays."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@partial(jax.jit, static_argnums=0)
def _encode(
    mesh: Mesh, bundle: Bundle, projection: Projection, pixels: Float[Array, "N S S 3"]
) -> Float[Array, "N *places D_text"]:
    def encode(bundle: Bundle, projection: Projection, pixels: Array) -> Array:
        return convert(projection, encode_images(bundle, pixels))

    return on_each_device(encode, mesh, (P(), P(), P(AXIS)), P(AXIS))(bundle, projection, pixels)


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    mesh: Mesh, static: _Static, bundle: Bundle, rows: _Rows, guidance_scale: Array, eta: Array
) -> tuple[Int[Array, "N H W 3"], Bool[Array, " N"], Bool[Array, " N"] | None]:
    """The pictures, which are flagged, and in float16 which are finite."""

    def sample(bundle: Bundle, rows: _Rows, guidance_scale: Array, eta: Array) -> tuple[Array, Array, Array | None]:
        context, weights = _contexts(bundle, rows)
        request, state = begin(
            bundle,
            context if rows.sizes is None else context.with_sizes(*rows.sizes),
            weights=weights,
            negative=(
                negative_prompt(bundle, rows.negative.tokens, rows.negative.weights, rows.negative_given)
                if rows.negative_vectors is None
                else image_prompt(bundle, rows.negative_vectors)
            ),
            start=_start(bundle, rows.asked, static.strength),
            controls=_controls(rows.asked),
            seeds=rows.seeds,
            indices=rows.indices,
            steps=static.steps,
            guidance_scale=guidance_scale if static.guided else 1.0,
            guidance_interval=static.guidance_interval,
            cache_interval=static.cache_interval,
            sampler=static.sampler,
            eta=eta,
            height=static.height,
            width=static.width,
            karras=static.karras,
        )
        pictures, flagged = finish(bundle, advance(bundle, request, state, 0, request.evaluations))
        # What the wider dtypes hold was seen to be enough.
        finite = jnp.isfinite(pictures).all(axis=(1, 2, 3)) if bundle.config.dtype == "float16" else None
        # As `to_uint8` does on the host, but a quarter of the bytes to fetch.
        return jnp.round(pictures * 255).astype(jnp.uint8), flagged, finite

    specs = (P(), P(AXIS), P(), P())
    return on_each_device(sample, mesh, specs, P(AXIS))(bundle, rows, guidance_scale, eta)


def _contexts(bundle: Bundle, rows: _Rows) -> tuple[Any, Array | None]:
    """Each row's prompt; or with weights those of its pictures, each where it counts, and what stands elsewhere."""
    texts, asked = rows.tokens, rows.asked
    apart = "strengths" in asked
    if not apart:
        edited = edit_prompt(bundle, rows.vectors, texts.tokens, rows.alpha, texts.weights)
        if "evaluations" not in asked:
            return edited, None
        pictures = jax.tree.map(lambda leaf: leaf[:, None], edited)
    else:
        count, each = asked["strengths"].shape
        flat = image_prompt(bundle, rows.vectors.reshape(count * each, *rows.vectors.shape[2:]))
        pictures = jax.tree.map(lambda leaf: leaf.reshape(count, each, *leaf.shape[1:]), flat)
    rest = jax.tree.map(lambda leaf: leaf[:, None], text_prompt(bundle, texts.tokens, texts.weights))
    both = as_long(pictures, rest, bundle.config.tokens.length)
    counted = asked["evaluations"][:, None, None, :, None, None] * asked["layers"][:, None, :, None, None, None]
    if "places" in asked:
        counted = counted * asked["places"][:, :, None, None]
    if apart:
        counted = counted * asked["strengths"][:, :, None, None, None, None]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *both), and_the_rest(counted)


def _start(bundle: Bundle, asked: dict[str, Array], strength: float | None) -> Start | None:
    if strength is None:
        return None

    def one(row: dict[str, Array]) -> Start:
        pictures = row["init"][None].astype(jnp.float32) / 255
        start = start_from(bundle, pictures, strength, row["redone"][None] if "redone" in row else None)
        return jax.tree.map(lambda leaf: leaf[0], start)

    # One at a time, as results are decoded: large pictures take much memory.
    return jax.lax.map(one, {name: asked[name] for name in ("init", "redone") if name in asked})


def _controls(asked: dict[str, Array]) -> list[Control]:
    if "control" not in asked:
        return []
    numbers = [asked[f"control_{name}"] for name in ("scale", "start", "end")]
    return [
        Control(asked["control"][:, place].astype(jnp.float32) / 255, *(each[:, place] for each in numbers))
        for place in range(asked["control"].shape[1])
    ]
