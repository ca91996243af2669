"""The programs that this package has compiled, as text: what shows that a refactoring was one.

`python -m tests.programs FOLDER` writes them to a folder, a file each.
"""

import dataclasses
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdipc_jax import Bundle, tuning
from sdipc_jax.batch import sampler as batch_sampler
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.parallel import make_mesh
from sdipc_jax.parallel.sampling import advance_on, finish_on
from sdipc_jax.prompts.contexts import edit_prompt, image_prompt, text_prompt
from sdipc_jax.prompts.projection import Projection, convert
from sdipc_jax.prompts.tokens import Texts
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin, winograd_kernels
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.program import still, train_step
from sdipc_jax.tuning.step import moving
from tests.tiny import SMALL_UNET, tiny_bundle

COUNT = 2


def lowered() -> Iterator[tuple[str, Any]]:
    """Each program, lowered, after its name. Nothing is compiled."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield from _of_sampling(tiny_bundle(folder / "tiny").config)
        yield from _of_prompts(tiny_bundle(folder / "prompts").config)
        yield from _of_tuning(tiny_bundle(folder / "tuning"))
        yield from _of_batches(tiny_bundle(folder / "batches").config)
        yield from _of_large_networks(tiny_bundle(folder / "large", safety=True).config)


def digests() -> dict[str, str]:
    """The sha256 of each program."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts()}


def texts() -> Iterator[tuple[str, str]]:
    """Each program as text."""
    for name, program in lowered():
        yield name, normalised(program.as_text())


def normalised(text: str) -> str:
    """StableHLO without what names things in Python alone: functions are numbered as they appear.

    >>> normalised('func.func private @b(%arg0) {jax.result_info = "x[0]"}\\ncall @a(@b)')
    'func.func private @0(%arg0) {}\\ncall @1(@0)'
    """
    text = re.sub(r'(, )?jax\.result_info = "[^"]*"', "", text)
    text = re.sub(r" loc\(.*?\)$", "", text, flags=re.MULTILINE)
    numbers: dict[str, str] = {}
    # Meshes have names of their own, which are JAX's.
    return re.sub(
        r"@(?!mesh\b|empty_mesh\b)[\w.$-]+", lambda found: "@" + numbers.setdefault(found[0], str(len(numbers))), text
    )


def abstract(config: Config) -> Bundle:
    """A bundle of shapes."""
    return Bundle(config.abstract_params(), config)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def latents(config: Config) -> tuple[jax.ShapeDtypeStruct, None]:
    channels, height, width = config.latent_shape(config.defaults.height, config.defaults.width)
    return array(COUNT, height, width, channels), None


def pixels(config: Config, count: int) -> jax.ShapeDtypeStruct:
    side = config.vision_side.vision.image_size
    return array(count, side, side, 3)


def context(config: Config) -> jax.ShapeDtypeStruct:
    return array(COUNT, config.tokens.length, config.unet.cross_attention_dim)


def started(bundle: Bundle, **settings: Any) -> Any:
    """A request and the first state, as shapes."""
    prompts = context(bundle.config)
    return jax.eval_shape(lambda bundle, context: begin(bundle, context, seeds=0, **settings), bundle, prompts)


def _of_sampling(config: Config) -> Iterator[tuple[str, Any]]:
    bundle = abstract(config)
    mesh = make_mesh("data=1")
    for name, settings in (
        ("ddim", {"sampler": "ddim", "eta": 0.5}),
        ("pndm", {"sampler": "pndm"}),
        ("euler", {"sampler": "euler"}),
        ("euler-a", {"sampler": "euler-a"}),
        ("dpm++2m", {"sampler": "dpm++2m", "karras": True}),
        ("no guidance", {"guidance_scale": 1.0}),
        ("guidance in an interval", {"guidance_interval": (0.2, 0.8)}),
        ("deep features kept", {"cache_interval": 2}),
    ):
        request, state = started(bundle, **settings)
        yield f"advance, {name}", advance.lower(bundle, request, state, 0, 1)
    half = abstract(dataclasses.replace(config, dtype="bfloat16"))
    yield "advance, bfloat16", advance.lower(half, *started(half), 0, 1)
    yield "advance on a mesh", advance_on.lower(mesh, bundle, *started(bundle), 0, 1)
    yield "finish", finish.lower(bundle, latents(config))
    yield "finish on a mesh", finish_on.lower(mesh, bundle, latents(config))


def _of_large_networks(config: Config) -> Iterator[tuple[str, Any]]:
    """What small ones do without: a safety checker, Winograd's form, encoding in parts."""
    safe = abstract(config)
    yield "finish, with a safety checker", finish.lower(safe, latents(config))
    # Wide and large enough for Winograd's form.
    unet = dataclasses.replace(SMALL_UNET, block_out_channels=(256,))
    sides = config.defaults.model_copy(update={"height": 96, "width": 96})
    wide = abstract(dataclasses.replace(config, unet=unet, defaults=sides))
    yield "advance, wide", advance.lower(wide, *started(wide), 0, 1)
    yield "kernels, wide", winograd_kernels.lower(wide, 24, 24)
    embedded = abstract(read_config("embedded"))
    yield "advance, embedded", advance.lower(embedded, *started(embedded), 0, 1)
    yield "finish, embedded", finish.lower(embedded, latents(embedded.config))
    yield "encode_images, embedded, many", encode_images.lower(embedded, pixels(embedded.config, 20))


def _of_prompts(config: Config) -> Iterator[tuple[str, Any]]:
    bundle = abstract(config)
    tokens, vectors = array(COUNT, config.tokens.length, dtype=jnp.int32), array(COUNT, config.text.hidden_size)
    features = array(COUNT, config.vision_side.vision.hidden_size)
    yield "encode_images", encode_images.lower(bundle, pixels(config, COUNT))
    yield "text_prompt", text_prompt.lower(bundle, tokens)
    yield "image_prompt", jax.jit(image_prompt).lower(bundle, vectors)
    yield "edit_prompt", jax.jit(edit_prompt).lower(bundle, vectors, tokens, array(COUNT))
    for mode in ("tspace", "cspace"):
        projection = abstract_projection(config, mode)
        yield f"convert, {mode}", convert.lower(projection, features)


def abstract_projection(config: Config, mode: Any = "tspace") -> Projection:
    joint, width = config.vision_side.projection_dim, config.text.hidden_size
    return Projection(
        visual=array(config.vision_side.vision.hidden_size, joint),
        inverse=array(joint, width),
        scale=array(),
        singular_values=array(min(joint, width)),
        rank=array(dtype=jnp.int32),
        mode=mode,
    )


def _of_tuning(bundle: Bundle) -> Iterator[tuple[str, Any]]:
    for mode in ("ft", "ct"):
        # Its digest and closed form are the host's, and take weights.
        state = tuning.init(bundle, tuning.TuningSettings(mode=mode, prompt_length=2, steps=20, ema=0.9))
        batch = training_batch(bundle.config, text=mode == "ft")
        yield (
            f"tuning step, {mode}",
            tuning.step.lower(state, batch, jax.random.key(0)),
        )
        if mode == "ft":
            train: Any = train_step(make_mesh("data=1"))
            yield "tuning step on a mesh", train.lower(moving(state), still(state), batch)


def training_batch(config: Config, *, text: bool) -> Batch:
    batch = Batch(latents=latents(config)[0], pixels=pixels(config, COUNT))
    return Batch(**batch, text=context(config)) if text else batch


def _of_batches(config: Config) -> Iterator[tuple[str, Any]]:
    bundle, mesh = abstract(config), make_mesh("data=1")
    texts = Texts(array(COUNT, config.tokens.length, dtype=jnp.int32))  # type: ignore[arg-type]
    numbers = array(COUNT, dtype=jnp.uint32)
    rows = batch_sampler._Rows(
        vectors=array(COUNT, config.text.hidden_size),
        tokens=texts,
        negative=texts,
        alpha=array(COUNT),
        seeds=numbers,
        indices=numbers,
        asked={},
    )
    static = batch_sampler._Static(32, 32, 4, "ddim", False, True, None, 1)
    yield "batch step", batch_sampler._sample.lower(mesh, static, bundle, rows, array(), array())
    projection = abstract_projection(config)
    yield "batch vectors", batch_sampler._encode.lower(mesh, bundle, projection, pixels(config, COUNT))


if __name__ == "__main__":
    for title, content in texts():
        Path(sys.argv[1], f"{title}.mlir").write_text(content)
