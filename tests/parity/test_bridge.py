"""Parameter trees of diffusers' FlaxStableDiffusionPipeline, taken from and given to the real one."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import (
    FlaxAutoencoderKL,
    FlaxStableDiffusionPipeline,
    FlaxUNet2DConditionModel,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import safety_checker_flax
from flax.core import unfreeze

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bridge import from_flax_pipeline, to_flax_pipeline
from sdipc_jax.checkpoints.bundle import SafetySide, apply
from sdipc_jax.checkpoints.keys import flatten
from sdipc_jax.models import UNetConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from tests.compare import relative_error
from tests.parity.sampler_oracle import quiet
from tests.random_weights import random_tree
from tests.tiny import tiny_bundle

COMPONENTS = ("unet", "vae", "text_encoder", "safety_checker")
# diffusers' Flax knows no other number of groups in the UNet than 32.
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=(2, 4),
    layers_per_block=1,
)


# Nor does it start a safety checker with pictures of another size than this.
SIZE = 224


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flax")
    config = tiny_bundle(root / "parts", safety=True, unet=UNET).config
    vision = dataclasses.replace(config.safety.vision, image_size=SIZE, patch_size=SIZE // 4)
    safety = SafetySide(vision, Preprocessing(size=SIZE, crop_size=(SIZE, SIZE)))
    config = dataclasses.replace(config, safety=safety)
    sdipc.save(sdipc.Bundle(random_tree(config.abstract_params(), 0), config), root / "tiny")
    return root / "tiny"


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder)


def _zeros_for(init_weights: Callable[..., Any]) -> Callable[..., Any]:
    def zeros(self: Any, rng: jax.Array) -> Any:
        shapes = jax.eval_shape(partial(init_weights, self), rng)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return zeros


@pytest.fixture(scope="module")
@quiet()
def flax_pipeline(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The pipeline and its params, through PyTorch's own converter; it reads nothing but .bin files."""
    pickled = tmp_path_factory.mktemp("flax") / "pickled"
    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(pickled, safe_serialization=False)
    with ExitStack() as patches:
        # The networks are run to find out shapes alone: these two can do without, which is minutes faster, and the
        # safety checker gives an argument that JAX has since dropped.
        for kind in (FlaxUNet2DConditionModel, FlaxAutoencoderKL):
            patches.enter_context(mock.patch.object(kind, "init_weights", _zeros_for(kind.init_weights)))
        patches.enter_context(mock.patch(f"{safety_checker_flax.__name__}.jax_cosine_distance", lambda a, b: a @ b.T))
        pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(pickled, from_pt=True)
    return pipeline, {name: unfreeze(tree) for name, tree in params.items() if name in COMPONENTS}


def test_gives_the_tree_of_the_pipeline(bundle: sdipc.Bundle, flax_pipeline: tuple[Any, dict[str, Any]]) -> None:
    found, (_, expected) = to_flax_pipeline(bundle), flax_pipeline
    assert set(found) == set(COMPONENTS) == set(expected)
    for name in COMPONENTS:
        ours, theirs = flatten(found[name]), flatten(expected[name])
        assert ours.keys() == theirs.keys(), name
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg="/".join(path))


def test_takes_the_tree_of_the_pipeline(bundle: sdipc.Bundle, flax_pipeline: tuple[Any, dict[str, Any]]) -> None:
    empty = sdipc.Bundle(jax.tree.map(jnp.zeros_like, bundle.params), bundle.config)
    taken = from_flax_pipeline(empty, flax_pipeline[1])
    for name in COMPONENTS:
        jax.tree.map(np.testing.assert_array_equal, taken.params[name], bundle.params[name])
    # Theirs has no vision side.
    assert not any(leaf.any() for leaf in jax.tree.leaves(taken.params["clip"]))


def test_the_pipeline_runs_on_our_tree(bundle: sdipc.Bundle, flax_pipeline: tuple[Any, dict[str, Any]]) -> None:
    """Not to 1e-5: diffusers' Flax has a wrong epsilon and the tanh GELU, which is why this package has its own."""
    pipeline, _ = flax_pipeline
    generator = np.random.default_rng(0)
    sample = generator.standard_normal((1, 8, 8, 4), np.float32)
    context = generator.standard_normal((1, 20, 24), np.float32)
    timesteps = jnp.array([300])
    channels_first = sample.transpose(0, 3, 1, 2)
    params = to_flax_pipeline(bundle)
    theirs = pipeline.unet.apply({"params": params["unet"]}, channels_first, timesteps, context).sample
    ours = apply(bundle.config.unet_model, bundle.params["unet"], sample, timesteps.astype(jnp.float32), context)
    assert relative_error(np.asarray(theirs).transpose(0, 2, 3, 1), np.asarray(ours)) < 0.01
    decoded = pipeline.vae.apply({"params": params["vae"]}, channels_first, method=pipeline.vae.decode).sample
    expected = apply(bundle.config.vae_model, bundle.params["vae"], sample, method="decode")
    assert relative_error(np.asarray(decoded).transpose(0, 2, 3, 1), np.asarray(expected)) < 1e-4


def test_refuses_another_checkpoint(bundle: sdipc.Bundle, flax_pipeline: tuple[Any, dict[str, Any]]) -> None:
    _, params = flax_pipeline
    with pytest.raises(sdipc.InputError, match="params has no vae"):
        from_flax_pipeline(bundle, {name: tree for name, tree in params.items() if name != "vae"})
    unet = params["unet"] | {"conv_in": {"kernel": np.zeros((3, 3, 9, 32)), "bias": np.zeros(32)}}
    with pytest.raises(sdipc.InputError, match=r"unet: conv_in/kernel has shape \(3, 3, 9, 32\)"):
        from_flax_pipeline(bundle, params | {"unet": unet})
    unet = {name: tree for name, tree in params["unet"].items() if name != "conv_in"}
    with pytest.raises(sdipc.InputError, match="unet: conv_in/bias is missing"):
        from_flax_pipeline(bundle, params | {"unet": unet})
