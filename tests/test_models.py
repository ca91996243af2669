"""The networks against PyTorch's numbers (golden files), and the mistakes that those numbers must catch."""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sdipc_jax.models import attention, clip, layers, vae
from sdipc_jax.models.attention import attend_by_queries, attend_in_blocks, dot_product_attention
from sdipc_jax.models.safety import flag
from sdipc_jax.models.unet import Downsample2D, Upsample2D
from tests import cases
from tests.cases import Case
from tests.compare import relative_error

GOLDEN = np.load(Path(__file__).parent / "golden/models.npz")
TOLERANCE = 1e-5


def by_name(made: list[Case]) -> list:
    return [pytest.param(case, id=case.name) for case in made]


@pytest.mark.parametrize("case", by_name(cases.block_cases()))
def test_block(case: Case) -> None:
    assert relative_error(case.run(), GOLDEN[f"block/{case.name}"]) <= TOLERANCE


@pytest.mark.parametrize("case", by_name([*cases.unet_cases(), *cases.sdxl_unet_cases()]))
def test_unet(case: Case) -> None:
    assert relative_error(case.run(), GOLDEN[f"unet/{case.name}"]) <= TOLERANCE


@pytest.mark.parametrize("case", by_name(cases.vae_cases()))
def test_vae(case: Case) -> None:
    outputs = case.run(cases.decode_after_encode(case.module))
    for part, found in zip(("mean", "log_variance", "pictures"), outputs, strict=True):
        assert relative_error(found, GOLDEN[f"vae/{case.name}/{part}"]) <= TOLERANCE, part


@pytest.mark.parametrize("case", by_name(cases.text_cases()))
def test_text_tower(case: Case) -> None:
    assert relative_error(case.run(), GOLDEN[f"text/{case.name}"]) <= TOLERANCE


@pytest.mark.parametrize("case", by_name(cases.sdxl_text_cases()))
def test_sdxl_text_tower(case: Case) -> None:
    outputs = case.run(cases.sdxl_states(case.module))
    for part, found in zip(("states", "pooled"), outputs, strict=False):
        assert relative_error(found, GOLDEN[f"sdxl text/{case.name}/{part}"]) <= TOLERANCE, part


@pytest.mark.parametrize("case", by_name(cases.vision_cases()))
def test_vision_tower(case: Case) -> None:
    assert relative_error(case.run(), GOLDEN[f"vision/{case.name}"]) <= TOLERANCE


@pytest.mark.parametrize("case", by_name(cases.safety_cases()))
def test_safety_checker(case: Case) -> None:
    np.testing.assert_array_equal(case.run(), GOLDEN[f"safety/{case.name}"])


def test_some_pictures_are_flagged_and_some_are_not() -> None:
    decisions = [flagged for name in GOLDEN if name.startswith("safety/") for flagged in GOLDEN[name]]
    assert 0 < sum(decisions) < len(decisions)


@pytest.mark.parametrize("name, epsilon", [("group-norm-1e-5", 1e-6), ("group-norm-1e-6", 1e-5)])
def test_golden_files_catch_a_wrong_epsilon(name: str, epsilon: float) -> None:
    case = next(case for case in cases.block_cases() if case.name == f"{name}-0.01")
    wrong = case.module.clone(epsilon=epsilon)
    assert relative_error(case.run(wrong.apply), GOLDEN[f"block/{case.name}"]) > TOLERANCE


def error_of_clone(kind: str, case: Case, **changes: object) -> float:
    """The error of a module that is traced again, as it is now."""
    return relative_error(case.run(case.module.clone(**changes).apply), GOLDEN[f"{kind}/{case.name}"])


def named(made: list[Case], name: str) -> Case:
    return next(case for case in made if case.name == name)


# The transformer block's epsilons are what others got wrong (1e-5 for the first norm's 1e-6).
@pytest.mark.parametrize("name", ["transformer", "transformer-linear", "vae-resnet", "vae-middle", "vae-attention"])
def test_golden_files_catch_a_wrong_epsilon_within_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = named(cases.block_cases(), f"{name}-0.01")
    assert error_of_clone("block", case) <= TOLERANCE
    call = layers.GroupNorm.__call__

    def wrong(self: layers.GroupNorm, x: jax.Array) -> jax.Array:
        object.__setattr__(self, "epsilon", 1e-5)
        return call(self, x)

    monkeypatch.setattr(layers.GroupNorm, "__call__", wrong)
    assert error_of_clone("block", case) > TOLERANCE


def test_golden_files_catch_the_tanh_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    assert error_of_clone("block", named(cases.block_cases(), "geglu-1")) > TOLERANCE
    assert error_of_clone("unet", cases.unet_cases()[0]) > TOLERANCE


def test_golden_files_catch_plain_gelu_for_quick_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.ACTIVATIONS, "quick_gelu", layers.gelu)
    assert error_of_clone("text", cases.text_cases()[0]) > TOLERANCE


def test_golden_files_catch_a_missing_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "dot_product_attention", lambda q, k, v, mask: dot_product_attention(q, k, v))
    assert error_of_clone("text", cases.text_cases()[0]) > TOLERANCE


def test_golden_files_catch_sines_before_cosines() -> None:
    case = cases.unet_cases()[0]
    flipped = dataclasses.replace(case.module.config, flip_sin_to_cos=False)
    assert error_of_clone("unet", case, config=flipped) > TOLERANCE


def test_golden_files_catch_even_padding_in_the_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.vae_cases()[0]
    monkeypatch.setattr(
        vae, "Downsample2D", lambda channels, _, dtype, name: Downsample2D(channels, (1, 1), dtype, name=name)
    )
    mean, _ = case.run(lambda variables, pictures: case.module.apply(variables, pictures, method="encode"))
    assert relative_error(mean, GOLDEN[f"vae/{case.name}/mean"]) > TOLERANCE


def test_group_norm_by_hand() -> None:
    x = jnp.array([[[1.0, 3.0, 10.0, 10.0], [5.0, 7.0, 10.0, 14.0]]])
    params = {"scale": jnp.array([1.0, 2.0, 1.0, 1.0]), "bias": jnp.array([0.0, 0.0, 1.0, 0.0])}
    found = layers.GroupNorm(groups=2, epsilon=0.0).apply({"params": params}, x)
    # Group 1 has mean 4 and variance 5, group 2 mean 11 and variance 3.
    s5, s3 = np.sqrt(5), np.sqrt(3)
    expected = [[[-3 / s5, -2 / s5, -1 / s3 + 1, -1 / s3], [1 / s5, 6 / s5, -1 / s3 + 1, 3 / s3]]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_group_norm_keeps_its_precision_on_a_large_mean() -> None:
    x = np.random.default_rng(0).standard_normal((1, 64, 8))
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    norm = layers.GroupNorm(groups=2, epsilon=1e-6)
    plain = norm.apply({"params": params}, jnp.asarray(x, jnp.float32))
    shifted = norm.apply({"params": params}, jnp.asarray(x + 1000, jnp.float32))
    assert relative_error(shifted, plain) < 1e-3


def test_attention_by_hand() -> None:
    # One query of depth 4 halves its products: scores ln 3 and 0 weigh the values 3 to 1.
    query = jnp.array([[[[2 * np.log(3.0), 0, 0, 0]]]], jnp.float32)
    key = jnp.array([[[[1.0, 0, 0, 0]], [[0, 5.0, 0, 0]]]])
    value = jnp.array([[[[4.0, 0, 0, 8.0]], [[0, 4.0, 0, 8.0]]]])
    np.testing.assert_allclose(dot_product_attention(query, key, value), [[[[3, 1, 0, 8]]]], rtol=1e-6)


def test_76_equal_keys_are_one_key_with_ln_76_on_its_logit() -> None:
    generator = np.random.default_rng(0)
    query, start, vector = (generator.standard_normal(shape) for shape in ((5, 8), (8,), (8,)))
    values = generator.standard_normal((2, 8))

    def softmax(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    two = softmax(query @ np.stack([start, vector]).T / np.sqrt(8) + np.array([0, np.log(76)])) @ values
    keys = np.stack([start] + [vector] * 76).astype(np.float32)
    states = np.stack([values[0]] + [values[1]] * 76).astype(np.float32)
    inputs = (jnp.asarray(array, jnp.float32)[None, :, None] for array in (query, keys, states))
    np.testing.assert_allclose(dot_product_attention(*inputs)[0, :, 0], two, rtol=1e-5)


@pytest.mark.parametrize("case", cases.unet_cases(), ids=lambda case: case.name)
def test_a_unet_on_its_own_deep_features_is_the_unet(case: Case) -> None:
    variables = {"params": case.params}
    whole, deep = jax.jit(partial(case.module.apply, with_deep=True))(variables, *case.inputs)
    shallow = jax.jit(case.module.apply)
    np.testing.assert_allclose(shallow(variables, *case.inputs, deep), whole, rtol=1e-5, atol=1e-5)
    assert relative_error(shallow(variables, *case.inputs, 2 * deep), whole) > 1e-2
    work = [
        program.lower(variables, *case.inputs, *inputs).cost_analysis()["flops"]
        for program, inputs in ((jax.jit(case.module.apply), ()), (shallow, (deep,)))
    ]
    assert work[1] < 0.7 * work[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_deep_prompts_are_as_if_they_stood_between_class_token_and_patches(overwrite: bool) -> None:
    case = cases.vision_cases()[0]
    config, params = case.module.config, case.params["vision_model"]
    shape = (config.num_hidden_layers, 5, config.hidden_size)
    prompts = np.random.default_rng(9).standard_normal(shape, np.float32)
    tower = clip.CLIPVisionTransformer(config)
    run = jax.jit(partial(tower.apply, capture_intermediates=True), static_argnums=3)
    result, captured = run({"params": params}, case.inputs[0], prompts, overwrite)
    outputs = captured["intermediates"]
    x = outputs["pre_layrnorm"]["__call__"][0]
    first = x[:, 1 + 5 :] if overwrite else x[:, 1:]
    for index, own in enumerate(prompts):
        between = jnp.broadcast_to(own, (len(x), *own.shape))
        x = jnp.concatenate([x[:, :1], between, first if index == 0 else x[:, 1 + 5 :]], axis=1)
        layer = {"params": params["encoder"]["layers"][str(index)]}
        x = jax.jit(clip.CLIPEncoderLayer(config).apply)(layer, x)
    assert relative_error(outputs["encoder"]["__call__"][0][-1][:, 0], x[:, 0]) <= 1e-5
    # Nothing is computed of the prompts, and of the last layer the class token alone.
    tokens = [outputs["encoder"]["layers"][str(n)]["__call__"][0].shape[1] for n in range(config.num_hidden_layers)]
    assert tokens == [1 + first.shape[1]] * (config.num_hidden_layers - 1) + [1]
    for index in range(config.num_hidden_layers):
        moved = prompts.copy()
        moved[index] *= -1
        assert relative_error(run({"params": params}, case.inputs[0], moved, overwrite)[0], result) > 1e-3


@pytest.mark.parametrize(
    "special, concept, expected",
    [
        (-0.2, -0.0004, False),
        (-0.2, 0.0004, False),
        (-0.2, 0.0006, True),
        (0.1, -0.0004, True),  # near a special-care concept the thresholds are lower by 0.01
        (0.1, -0.0098, False),
        (0.0004, -0.0004, False),
    ],
)
def test_safety_thresholds(special: float, concept: float, expected: bool) -> None:
    special_cosines = jnp.full((1, 3), -0.5).at[0, 1].set(0.2 + special)
    concept_cosines = jnp.full((1, 17), -0.5).at[0, 16].set(0.2 + concept)
    found = flag(special_cosines, concept_cosines, jnp.full(3, 0.2), jnp.full(17, 0.2))
    assert found.tolist() == [expected]


@pytest.mark.parametrize(("queries", "keys"), [(1, 128), (511, 130), (512, 200), (513, 129), (1030, 333)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("attend", [attend_in_blocks, attend_by_queries])
def test_attention_in_blocks_is_attention(attend: Any, queries: int, keys: int, dtype: Any) -> None:
    rng = np.random.default_rng(queries)
    query, key, value = (jnp.asarray(rng.normal(size=(2, length, 3, 10)), dtype) for length in (queries, keys, keys))
    exact = [np.asarray(x, np.float64) for x in (query, key, value)]
    scores = np.einsum("nqhd,nkhd->nhqk", *exact[:2]) / np.sqrt(10)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(axis=-1, keepdims=True), exact[2])
    found = attend(query, key, value)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize(("queries", "keys"), [(70, 131), (1, 257), (261, 261), (64, 63)])
def test_gradients_of_attention_to_parts(queries: int, keys: int) -> None:
    """Products are in parts where 64 divides no number of tokens."""
    rng = np.random.default_rng(keys)
    inputs = [jnp.asarray(rng.normal(size=(2, length, 3, 8)), jnp.float32) for length in (queries, keys, keys)]

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(8)
        return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)

    def gradients(attend: Any) -> tuple[jax.Array, ...]:
        return jax.jit(jax.grad(lambda *inputs: jnp.sum(jnp.sin(attend(*inputs))), argnums=(0, 1, 2)))(*inputs)

    for found, expected in zip(gradients(dot_product_attention), gradients(plain), strict=True):
        assert relative_error(np.asarray(found), np.asarray(expected)) <= 1e-5


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "shard_map"])
def test_large_attention_goes_in_blocks(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU no array of all scores is left in the program, and results and gradients stay."""
    monkeypatch.setattr(attention, "_QUERIES", 16)
    inputs = [jax.random.normal(key, (2, 40, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)]

    def run(*inputs: jax.Array) -> jax.Array:
        def attend(*inputs: jax.Array) -> jax.Array:
            return attention.dot_product_attention(*inputs)

        if transform == "grad":
            return jax.grad(lambda *inputs: jnp.sum(jnp.sin(attend(*inputs))))(*inputs)
        if transform == "vmap":
            return jax.vmap(lambda *one: attend(*(x[None] for x in one))[0])(*inputs)
        if transform == "shard_map":
            mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            spec = jax.sharding.PartitionSpec("data")
            return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(*inputs)
        return attend(*inputs)

    results = []
    for cached, is_left in ((2**22, True), (0, False)):
        monkeypatch.setattr(attention, "_CACHED_SCORES", cached)
        program = jax.jit(lambda *inputs: run(*inputs)).lower(*inputs).compile()
        assert (re.search(r"f32\[[\d,]*40,40\]", program.as_text()) is not None) == is_left
        results.append(program(*inputs))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "depth"), [(256, 128, 2, 40), (640, 384, 1, 80), (128, 256, 1, 256)]
)
def test_flash_attention_of_tpus_is_attention(queries: int, keys: int, heads: int, depth: int) -> None:
    """Results and gradients, its kernels interpreted on a CPU."""
    rng = np.random.default_rng(queries)
    inputs = [jnp.asarray(rng.normal(size=(2, length, heads, depth)), jnp.float32) for length in (queries, keys, keys)]

    def both(attend: Any) -> Any:
        gradients = jax.grad(lambda *inputs: jnp.sum(jnp.sin(attend(*inputs))), argnums=(0, 1, 2))
        return attend(*inputs), gradients(*inputs)

    with pltpu.force_tpu_interpret_mode():
        found = both(attention.attend_on_tpu)
    for each, expected in zip(jax.tree.leaves(found), jax.tree.leaves(both(attention._attend_at_once)), strict=True):
        np.testing.assert_allclose(each, expected, atol=1e-5)


def test_tpus_take_flash_attention_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, whole tiles of 128 tokens, a depth that it was written for, and nothing that XLA would divide."""
    asked: list[tuple[int, ...]] = []

    def flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        asked.append(query.shape)
        return query

    def attend(dtype: Any = jnp.bfloat16, tokens: int = 128, depth: int = 8, **mapped: Any) -> None:
        shape = (2, tokens, 2, depth)
        run: Any = dot_product_attention
        if mapped:
            mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
            spec = jax.sharding.PartitionSpec("data")
            run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, **mapped)
        jax.eval_shape(lambda *inputs: run(*inputs), *[jax.ShapeDtypeStruct(shape, dtype)] * 3)

    monkeypatch.setattr(attention, "_CACHED_SCORES", 0)
    monkeypatch.setattr(attention, "attend_on_tpu", flash)
    attend(check_vma=False)
    assert asked == [(1, 128, 2, 8)]
    attend(check_vma=True)
    attend(check_vma=False, axis_names={"data"})
    # There are two devices, over which a program without shard_map may be divided.
    attend()
    assert len(asked) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    attend()
    attend(tokens=384, depth=256)
    assert asked[1:] == [(2, 128, 2, 8), (2, 384, 2, 256)]
    attend(tokens=130)
    attend(depth=160)
    attend(jnp.float32)
    assert len(asked) == 3


def test_gpus_take_the_fused_kernel_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, a depth that 8 divides, an even number of tokens; else plain operations, with a warning for float32."""
    asked: list[str] = []

    def fused(query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str) -> jax.Array:
        asked.append(implementation)
        return query

    def attend(dtype: Any, tokens: int = 40, depth: int = 8) -> jax.Array:
        inputs = [
            jax.random.normal(key, (2, tokens, 2, depth), dtype) for key in jax.random.split(jax.random.key(0), 3)
        ]
        return dot_product_attention(*inputs)

    monkeypatch.setattr(attention, "_CACHED_SCORES", 0)
    plain = {tokens: attend(jnp.bfloat16, tokens) for tokens in (40, 41)}
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (attend(jnp.bfloat16) != plain[40]).any()
    assert asked == ["cudnn"]
    np.testing.assert_array_equal(attend(jnp.bfloat16, tokens=41), plain[41])
    attend(jnp.bfloat16, depth=12)
    attention._warn_of_missing_kernel.cache_clear()
    with pytest.warns(UserWarning, match="this model is in float32"):
        attend(jnp.float32)
    # Not again: a warning is an error here.
    attend(jnp.float32)
    assert asked == ["cudnn"]


@pytest.mark.parametrize(("height", "width", "sides"), [(6, 10, 2), (5, 9, 3)])
def test_convolutions_of_doubled_pictures(height: int, width: int, sides: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 3, 5, 4), np.float32)
    kernel, bias = generator.standard_normal((3, 3, 4, 6), np.float32), generator.standard_normal(6, np.float32)
    padded = np.pad(
        x.repeat(2, 1).repeat(2, 2)[:, :height, :width].astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    expected = bias + sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j].astype(np.float64) for i in range(3) for j in range(3)
    )

    def doubled(kernel: Any, x: Any) -> Any:
        module = Upsample2D(6)
        return module.apply({"params": {"conv": {"kernel": kernel, "bias": bias}}}, x, height, width)

    np.testing.assert_allclose(jax.jit(doubled)(kernel, x), expected, rtol=1e-5, atol=1e-5)
    # Of whole pairs small kernels go over the small picture.
    program = jax.jit(doubled).lower(kernel, x).as_text()
    assert re.findall(r"stablehlo.convolution.*, tensor<(\d)x\dx4x\d+xf32>\) ->", program) == [str(sides)]
