"""The programs that the device runs: one for the vision tower, one for each size of picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from sdipc_jax.batch.items import Item, Size, index_of
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batches import in_batches, pad
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError
from sdipc_jax.parallel import AXIS, on_each_device, place, replicate
from sdipc_jax.prompts.contexts import edit_prompt, negative_prompt
from sdipc_jax.prompts.projection import Projection, convert
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Record
from sdipc_jax.sampling.decoding import NOT_FINITE, finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
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
    negative_given: Any = None
    sizes: Any = None


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
        """Each item's vector (eq. 6): the weighted mean of those of its pictures."""
        pixels = np.stack([each for item in items for each in item.pixels])

        def encode(part: np.ndarray) -> Array:
            return _encode(self.mesh, self.bundle, self.projection, place(self.mesh, part))

        rows = iter(in_batches(encode, pixels, size=_ENCODED * self.mesh.size))
        means = []
        for item in items:
            weights = np.asarray(item.record.get("weights", [1.0]), np.float64)
            own = np.stack([next(rows) for _ in item.pixels])
            # One picture's vector stays as it is, to the bit.
            mean = (weights / weights.sum()) @ own.reshape(len(own), -1)
            means.append(own[0] if len(own) == 1 else mean.reshape(own[0].shape))
        return np.stack(means).astype(np.float32)

    def pictures(self, batch: Batch) -> tuple[UInt8[np.ndarray, "N H W 3"], Bool[np.ndarray, " N"]]:
        """The items' pictures, and which of them the safety checker flagged, which are black."""
        records = [item.record for item in batch.items]
        rows = _Rows(
            vectors=self.vectors(batch.items),
            tokens=_stack([item.tokens for item in batch.items]),
            negative=_stack([item.negative for item in batch.items]),
            # With an empty text and alpha 0 eq. 8 is eq. 7, bit for bit: one program for both.
            alpha=np.array([each["alpha"] or 0.0 for each in records], np.float32),
            seeds=np.array([each["seed"] for each in records], np.uint32),
            indices=np.array(
                [
                    index_of(item_id) if each["index"] is None else each["index"]
                    for each, item_id in zip(records, batch.ids, strict=True)
                ],
                np.uint32,
            ),
            negative_given=self._given([each["negative_prompt"] for each in records]),
            sizes=self._sizes(records),
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


def _stack(texts: Sequence[Any]) -> Any:
    """Rows of texts, an array of each."""
    return jax.tree.map(lambda *rows: np.stack(rows), *texts)


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
        prompt = edit_prompt(bundle, rows.vectors, rows.tokens.tokens, rows.alpha, rows.tokens.weights)
        request, state = begin(
            bundle,
            prompt if rows.sizes is None else prompt.with_sizes(*rows.sizes),
            negative=negative_prompt(bundle, rows.negative.tokens, rows.negative.weights, rows.negative_given),
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
