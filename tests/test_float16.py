"""float16: close to float32, and float32 itself where float16 would overflow."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.batch import sampler as batch_sampler
from sdipc_jax.batch.asked import NOTHING
from sdipc_jax.checkpoints.delta import digest, make_delta, save_delta
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.errors import InputError
from sdipc_jax.models import AutoencoderKL, VAEConfig
from sdipc_jax.models.attention import Transformer2DModel, dot_product_attention
from sdipc_jax.models.layers import GroupNorm, layer_norm
from sdipc_jax.parallel import make_mesh
from sdipc_jax.prompts.tokens import Texts
from sdipc_jax.sampling.request import decide
from sdipc_jax.settings import SamplerSettings
from tests.compare import relative_error
from tests.random_weights import random_params
from tests.tiny import SMALL_UNET, tiny_bundle, write_checkpoint

HALF = jnp.float16
LARGEST = float(np.finfo(np.float16).max)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def both(module: nn.Module, params: Any, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a module gives in float16 and in float32, for the same numbers."""
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf, HALF), (params, inputs))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves)
    found = jax.jit(module.clone(dtype=HALF).apply)({"params": halves[0]}, *halves[1])
    assert found.dtype == HALF
    return np.asarray(found, np.float32), np.asarray(jax.jit(module.apply)({"params": wide[0]}, *wide[1]))


def test_scores_of_attention_are_float32() -> None:
    """As in Stable Diffusion 2.1, whose scores float16 does not hold."""
    query, key, value = (
        jnp.asarray(normal(2, 9, 2, 32, seed=n) * scale, HALF) for n, scale in enumerate((150, 150, 1))
    )
    products = np.einsum("nqhd,nkhd->nhqk", *(np.asarray(x, np.float64) for x in (query, key)))
    assert np.abs(products).max() > 2 * LARGEST
    found = dot_product_attention(query, key, value)
    expected = dot_product_attention(*(x.astype(jnp.float32) for x in (query, key, value)))
    assert found.dtype == HALF
    assert relative_error(np.asarray(found, np.float32), np.asarray(expected)) <= 1e-3


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_norms_square_in_float32(kind: str) -> None:
    module = GroupNorm(2, 1e-5) if kind == "group" else layer_norm(1e-5, jnp.float32)
    x = 5e3 * normal(2, 6, 8)
    assert np.square(x).max() > LARGEST
    found, expected = both(module, random_params(module, x, seed=1), x)
    assert relative_error(found, expected) <= 1e-3


def test_a_transformer_whose_scores_overflow() -> None:
    module = Transformer2DModel(heads=2, groups=4)
    x, context = normal(1, 4, 5, 16), normal(1, 7, 12, seed=1)
    params = random_params(module, x, context, seed=2)
    block = params["transformer_blocks_0"]
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k"):
            block[attention][name]["kernel"] = block[attention][name]["kernel"] * 60
    found, expected = both(module, params, x, context)
    # Large scores are a choice of one key, which a rounding may change; most of them it does not.
    assert np.isfinite(found).all()
    assert np.median(np.abs(found - expected)) <= 5e-3


def overflowing_vae() -> tuple[VAEConfig, Any]:
    """An autoencoder whose activations float16 does not hold, though its weights are far from that."""
    config = VAEConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    params = random_params(AutoencoderKL(config), normal(1, 8, 8, 3), seed=3)
    kernel = params["decoder"]["mid_block"]["resnets_0"]["conv2"]["kernel"]
    params["decoder"]["mid_block"]["resnets_0"]["conv2"]["kernel"] = kernel * (3e4 / np.abs(kernel).max())
    return config, params


def test_the_autoencoder_is_float32_unless_its_file_says_otherwise(tmp_path: Path) -> None:
    config, params = overflowing_vae()
    bundle = tiny_bundle(tmp_path / "tiny", dtype="float16", vae=config)

    def decoded(model: AutoencoderKL) -> jax.Array:
        return jax.jit(partial(model.apply, method="decode"))({"params": params}, normal(1, 4, 4, 4))

    found = decoded(bundle.config.vae_model)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    assert not np.isfinite(decoded(AutoencoderKL(config, HALF))).all()
    shapes = bundle.config.abstract_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["vae"])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["unet"])} == {jnp.dtype("float16")}
    fixed = dataclasses.replace(bundle.config, vae=dataclasses.replace(config, force_upcast=False))
    assert fixed.vae_model.dtype == HALF
    assert dataclasses.replace(fixed, dtype="float32").vae_model.dtype == jnp.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("half") / "checkpoint", unet=SMALL_UNET)


def test_pictures_are_those_of_float32(folder: Path) -> None:
    made = {}
    for dtype in ("float32", "float16"):
        bundle = sdipc.load(folder, dtype=dtype)
        context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a"]))
        made[dtype] = 255 * np.asarray(sdipc.generate(bundle, context, seeds=1, steps=2))
    assert bundle.params["unet"]["conv_in"]["kernel"].dtype == HALF
    assert np.abs(made["float16"] - made["float32"]).mean() <= 1.5


def test_a_tuning_is_compared_and_applied_before_weights_are_cast(folder: Path, tmp_path: Path) -> None:
    plain = sdipc.load(folder)
    kernel = plain.params["unet"]["conv_in"]["kernel"] + 1
    delta = make_delta({"unet": {"conv_in": {"kernel": kernel}}}, 1, "ft", digest(plain))
    save_delta(delta, tmp_path / "tuned.safetensors")
    found = sdipc.load(folder, tuned=tmp_path / "tuned.safetensors", dtype="float16")
    expected = sdipc.load(folder, dtype="float16")
    assert found.config == expected.config
    expected.params["unet"]["conv_in"]["kernel"] = kernel.astype(HALF)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params["unet"])} == {jnp.dtype(HALF)}
    half_vae = sdipc.load(folder, tuned=tmp_path / "tuned.safetensors", vae_dtype="float16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half_vae.params["vae"])} == {jnp.dtype(HALF)}
    save_delta(dataclasses.replace(delta, base="0" * 64), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="the tuning was made for the checkpoint with digest 0000"):
        sdipc.load(folder, tuned=tmp_path / "other.safetensors", dtype="float16")
    delta = make_delta({"unet": {"conv_in": {"kernel": kernel * 1e5}}}, 1, "ft", digest(plain))
    save_delta(delta, tmp_path / "large.safetensors")
    with pytest.raises(InputError, match=r"unet\.conv_in\.weight holds numbers above 65504"):
        sdipc.load(folder, tuned=tmp_path / "large.safetensors", dtype="float16")


def test_what_float16_does_not_hold_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="dtype is 'float8', expected one of float32, bfloat16, float16"):
        read_config(folder, dtype="float8")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    try:
        # Weights that float16 holds, and activations that it does not: nothing is written.
        tensors = load_file(file)
        name = "mid_block.resnets.0.conv2.weight"
        tensors[name] = tensors[name] * (6e4 / np.abs(tensors[name]).max())
        save_file(tensors, file)
        arguments = ["text", "a", "--model", str(folder), "--num-images", "1", "--steps", "2", "--mesh", "data=1"]
        out = tmp_path / "out"
        assert cli.main([*arguments, "--dtype", "float16", "--output-dir", str(out)]) == 2
        assert "a picture came out as NaN, expected finite numbers: with dtype float16" in capsys.readouterr().err
        assert not list(out.glob("*.png"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, file)
        with pytest.raises(InputError, match=rf"{name} holds numbers above 65504, which float16 does not"):
            sdipc.load(folder, dtype="float16")
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("dtype, told", [("float16", True), ("float32", False)])
def test_batches_tell_whether_pictures_are_finite(dtype: str, told: bool, tmp_path: Path) -> None:
    config = tiny_bundle(tmp_path / "tiny", dtype=dtype, unet=SMALL_UNET).config

    def shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype)

    texts = Texts(shape(2, 20, dtype=jnp.int32))  # type: ignore[arg-type]
    whole = shape(2, dtype=jnp.uint32)
    rows = batch_sampler._Rows(shape(2, 24), texts, texts, shape(2), whole, whole, asked={})
    static = batch_sampler._Static(32, 32, 2, "ddim", False, True, None, 1)
    bundle = sdipc.Bundle(config.abstract_params(), config)
    sample = partial(batch_sampler._sample, make_mesh("data=1"), static)
    finite = jax.eval_shape(sample, bundle, rows, shape(), shape())[2]
    assert (finite.shape == (2,) and finite.dtype == bool) if told else finite is None


def test_a_batch_with_a_picture_of_nan_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder, dtype="float16")
    encoded = [{"picture": np.zeros((1, 24), np.float32)}]
    monkeypatch.setattr(batch_sampler.Sampler, "_encoded", lambda self, items: encoded)
    text = Texts(np.zeros((20,), np.int32))  # type: ignore[arg-type]
    item: Any = SimpleNamespace(
        record={"alpha": 0.0, "seed": 0, "index": 0, "negative_prompt": ""},
        tokens=text,
        negative=text,
        unwanted=[],
        asked=NOTHING,
    )
    job: Any = SimpleNamespace(batch_size=1, karras=False, eta=0.0)
    sampler = batch_sampler.Sampler(
        sdipc.Bundle({}, config), cast(Any, None), job, decide(config, SamplerSettings()), make_mesh("data=1")
    )
    for finite in (True, False):
        made = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, bool), np.array([finite])
        monkeypatch.setattr(batch_sampler, "_sample", lambda *arguments, made=made: made)
        batch = batch_sampler.Batch((32, 32), [item], ["a"])
        if finite:
            assert sampler.pictures(batch)[0].shape == (1, 32, 32, 3)
        else:
            with pytest.raises(InputError, match=r"a picture came out as NaN, .* with dtype float16"):
                sampler.pictures(batch)
