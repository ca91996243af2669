"""From prompts to pictures: keys, guidance, what compiles, and where it runs."""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sdipc_jax import (
    Bundle,
    InputError,
    closed_form,
    convert,
    edit_prompt,
    encode_images,
    generate,
    generate_with_progress,
    image_prompt,
    text_prompt,
    tokenize,
)
from sdipc_jax.checkpoints.bundle import SafetySide
from sdipc_jax.models import CLIPVisionModel, StableDiffusionSafetyChecker
from sdipc_jax.pictures.preprocessing import Preprocessing, preprocess
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.sampling.decoding import finish, to_uint8
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from sdipc_jax.sampling.safety import preprocess_on_device
from tests.random_weights import random_params, random_tree
from tests.tiny import jax_tree, quick_unet

# The package's attribute of this name is the function.
MODULE: Any = importlib.import_module("sdipc_jax.sampling.decoding")

STEPS = 3
LARGEST_SEED = 2**32 - 1
# How near pictures of programs for batches of different shapes are.
CLOSE = 2 / 255


@pytest.fixture(scope="module")
def least(tiny: Bundle) -> Bundle:
    """The checkpoint with a UNet that compiles quickly."""
    config = dataclasses.replace(tiny.config, unet=quick_unet(tiny.config.unet))
    weights = random_tree(config.abstract_params()["unet"], seed=0)
    return Bundle(tiny.params | {"unet": jax_tree(weights)}, config)


@pytest.fixture(scope="module")
def vectors(least: Bundle) -> jax.Array:
    """Two pictures, converted."""
    pixels = np.random.default_rng(0).standard_normal((2, 28, 28, 3), np.float32)
    return convert(closed_form(least), encode_images(least, jnp.asarray(pixels)))


@pytest.fixture(scope="module")
def context(least: Bundle, vectors: jax.Array) -> jax.Array:
    """The prompts of two pictures."""
    return image_prompt(least, vectors)


def sample(bundle: Bundle, context: Any, **settings: Any) -> np.ndarray:
    return np.asarray(
        generate(bundle, context, **{"seeds": 7, "indices": np.arange(len(context)), "steps": STEPS} | settings)
    )


def noise_of(seed: int, index: int, shape: tuple[int, ...] = (4, 8, 8), step: int | None = None) -> jax.Array:
    """The recipe of the contract; `step` for the later noise of stochastic samplers."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
    key = key if step is None else jax.random.fold_in(key, step + 1)
    return jax.random.normal(key, shape, jnp.float32)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects every compilation, those of single operations included."""
    found: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_pictures_and_what_they_depend_on(least: Bundle, context: jax.Array) -> None:
    pictures = sample(least, context)
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == np.float32
    assert 0 <= pictures.min() < 0.3
    assert 0.7 < pictures.max() <= 1
    changed = {
        "seed": sample(least, context, seeds=8),
        "index": sample(least, context, indices=5),
        "prompt": sample(least, jnp.roll(context, 3, axis=2)),
        "guidance": sample(least, context, guidance_scale=5.0),
        "eta": sample(least, context, eta=1.0),
        "negative": sample(least, context, negative=jnp.roll(context, 3, axis=2)),
    }
    for what, found in changed.items():
        assert (np.abs(found - pictures).max(axis=(1, 2, 3)) > CLOSE).all(), what


@pytest.mark.parametrize(
    "seeds, indices",
    [(0, (0, 1)), ((0, LARGEST_SEED), 0), ((2**31, 2**31 - 1), (LARGEST_SEED, 3)), (np.uint32(LARGEST_SEED), 5)],
)
def test_noise_follows_the_recipe(least: Bundle, context: jax.Array, seeds: Any, indices: Any) -> None:
    pairs = zip(np.broadcast_to(seeds, 2).tolist(), np.broadcast_to(indices, 2).tolist(), strict=True)
    latents = np.stack([noise_of(seed, index) for seed, index in pairs])
    found = sample(least, context, seeds=seeds, indices=indices)
    np.testing.assert_array_equal(found, sample(least, context, latents=latents))


def test_indices_are_0_unless_told(least: Bundle, context: jax.Array) -> None:
    plain = np.asarray(generate(least, context, seeds=[7, 8], steps=STEPS))
    np.testing.assert_array_equal(plain, sample(least, context, seeds=[7, 8], indices=0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_scaled_as_the_sampler_starts(least: Bundle, context: jax.Array, name: str) -> None:
    sigma = SAMPLERS[name].schedule(least.config.scheduler, STEPS).init_noise_sigma
    assert (sigma > 2) == name.startswith("euler")
    size: dict[str, Any] = {"height": 24, "width": 20, "steps": STEPS, "sampler": name}
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 5), np.float32)
    _, (x, _) = begin(least, context, seeds=0, latents=latents, **size)
    np.testing.assert_allclose(x, latents.transpose(0, 2, 3, 1) * sigma, rtol=1e-6)
    # Noise is drawn as (C, h, w).
    _, (x, _) = begin(least, context, seeds=[4, 5], **size)
    noise = np.stack([noise_of(4, 0, (4, 6, 5)), noise_of(5, 0, (4, 6, 5))])
    np.testing.assert_allclose(x, noise.transpose(0, 2, 3, 1) * sigma, rtol=1e-6)


@pytest.mark.parametrize("name, eta", [("ddim", 1.0), ("euler-a", 0.0)])
def test_later_noise_follows_the_recipe(least: Bundle, context: jax.Array, name: str, eta: float) -> None:
    silent = dataclasses.replace(
        least, params=least.params | {"unet": jax.tree.map(jnp.zeros_like, least.params["unet"])}
    )
    request, state = begin(silent, context, seeds=[4, 5], indices=6, steps=STEPS, sampler=name, eta=eta)
    found, _ = advance(silent, request, state, 0, STEPS)
    # A UNet without weights gives 0, so that the loop can be written out.
    x, _ = state
    for i in range(STEPS):
        noise = jnp.stack([noise_of(seed, 6, step=i) for seed in (4, 5)]).transpose(0, 2, 3, 1)
        x, _ = SAMPLERS[name].step(request.schedule, i, x, jnp.zeros_like(x), (), noise, eta)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(least: Bundle, context: jax.Array) -> None:
    pictures = sample(least, context, seeds=[1, 2], indices=[3, 4])
    beside_another = sample(least, jnp.stack([context[0], -context[1]]), seeds=[1, 9], indices=[3, 0])
    np.testing.assert_array_equal(beside_another[0], pictures[0])
    # Another place in the batch is another row of the matrices that are multiplied, and may round differently.
    swapped = sample(least, context[::-1], seeds=[2, 1], indices=[4, 3])
    np.testing.assert_allclose(swapped[::-1], pictures, atol=1e-5)
    for n in range(2):
        alone = sample(least, context[n : n + 1], seeds=n + 1, indices=n + 3)
        np.testing.assert_allclose(alone[0], pictures[n], atol=CLOSE)


def test_negative_prompt_is_the_empty_text_unless_told(least: Bundle, context: jax.Array) -> None:
    pictures, empty = sample(least, context), text_prompt(least, tokenize(least, [""]))
    np.testing.assert_array_equal(sample(least, context, negative=empty), pictures)
    np.testing.assert_array_equal(sample(least, context, negative=jnp.repeat(empty, 2, axis=0)), pictures)
    one_other = sample(least, context, negative=jnp.concatenate([empty, 2 * empty]))
    np.testing.assert_array_equal(one_other[0], pictures[0])
    assert np.abs(one_other[1] - pictures[1]).max() > CLOSE


def test_guidance_for_each_picture(least: Bundle, context: jax.Array) -> None:
    mixed = sample(least, context, guidance_scale=np.array([3.0, 7.5]))
    np.testing.assert_array_equal(mixed[0], sample(least, context, guidance_scale=3.0)[0])
    np.testing.assert_array_equal(mixed[1], sample(least, context)[1])


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_of_1_or_less_is_the_prompt_alone(least: Bundle, context: jax.Array, guidance: float) -> None:
    found = sample(least, context, guidance_scale=guidance, negative=jnp.full_like(context, jnp.nan))
    assert np.isfinite(found).all()
    # Above 1 the formula holds, and gives nearly the same near 1.
    np.testing.assert_allclose(sample(least, context, guidance_scale=1 + 1e-4), found, atol=CLOSE)


def test_no_guidance_is_half_the_work(least: Bundle, context: jax.Array) -> None:
    def work(guidance: Any) -> float:
        request, state = begin(least, context, seeds=0, steps=STEPS, guidance_scale=guidance)
        return advance.lower(least, request, state, 0, 1).compile().cost_analysis()["flops"]

    assert 0.45 < work(1.0) / work(7.5) < 0.55
    # The host does not wait for a device to tell it the number, and some pictures may be guided.
    assert work(jnp.float32(1.0)) == work(np.array([0.5, 7.5])) == work(7.5)
    on_device = sample(least, context, guidance_scale=jnp.float32(1.0))
    np.testing.assert_allclose(sample(least, context, guidance_scale=1.0), on_device, atol=CLOSE)


def test_guidance_formula(least: Bundle, context: jax.Array) -> None:
    # With no step after it, the DDIM of one step is linear in the UNet's output: pictures' latents show the formula.
    def latents(guidance: float, negative: Any = None) -> np.ndarray:
        request, state = begin(least, context, seeds=0, steps=STEPS, guidance_scale=guidance, negative=negative)
        return np.asarray(advance(least, request, state, 0, 1)[0])

    other = jnp.roll(context, 3, axis=2)
    conditional, unconditional = latents(1.0), latents(4.0, negative=context)
    np.testing.assert_allclose(unconditional, conditional, atol=1e-5)
    swapped = begin(least, other, seeds=0, steps=STEPS, guidance_scale=1.0)
    unconditional = np.asarray(advance(least, *swapped, 0, 1)[0])
    expected = unconditional + 4.0 * (conditional - unconditional)
    np.testing.assert_allclose(latents(4.0, negative=other), expected, rtol=1e-4, atol=1e-4)


def test_guidance_in_an_interval_is_guidance_in_those_steps(least: Bundle, context: jax.Array) -> None:
    """Against the loop in pieces, each with guidance or without."""
    settings: dict[str, Any] = {"seeds": 0, "steps": 6, "sampler": "dpm++2m"}
    guided, state = begin(least, context, **settings)
    alone, _ = begin(least, context, **settings, guidance_scale=1.0)
    times = np.asarray(guided.schedule.timesteps) / least.config.scheduler.num_train_timesteps
    acts = (times >= 0.3) & (times <= 0.7)
    assert acts.tolist() == [False, False, True, True, True, False]
    for step, inside in enumerate(acts):
        state = advance(least, guided if inside else alone, state, step, step + 1)
    found = generate(least, context, **settings, guidance_interval=(0.3, 0.7))
    np.testing.assert_allclose(found, finish(least, state)[0], atol=1e-5)
    assert np.abs(found - generate(least, context, **settings)).max() > CLOSE
    everywhere = generate(least, context, **settings, guidance_interval=(0.0, 1.0))
    np.testing.assert_allclose(everywhere, generate(least, context, **settings), atol=1e-5)


def test_outside_the_interval_negative_prompts_take_no_part(least: Bundle, context: jax.Array) -> None:
    nowhere = {"negative": jnp.full_like(context, jnp.nan), "guidance_interval": (1.0, 1.0)}
    np.testing.assert_allclose(
        sample(least, context, **nowhere), sample(least, context, guidance_scale=1.0), atol=CLOSE
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_deep_features_are_those_of_the_last_whole_run(
    least: Bundle, context: jax.Array, guidance_scale: float
) -> None:
    """Against the loop written out, prompt by prompt."""
    settings: dict[str, Any] = {"seeds": 0, "steps": 7, "sampler": "dpm++2m", "guidance_scale": guidance_scale}
    request, (x, history) = begin(least, context, **settings)
    unet = jax.jit(partial(least.config.unet_model.apply, with_deep=True))
    variables = {"params": least.params["unet"]}
    prompts = [request.context[-len(context) :]] + ([request.context[: len(context)]] if guidance_scale > 1 else [])
    deep: list[Any] = [None] * len(prompts)
    for i in range(7):
        predictions = []
        for number, prompt in enumerate(prompts):
            inputs = (variables, x, jnp.full(len(x), request.schedule.timesteps[i]), prompt)
            prediction, features = unet(*inputs) if i % 3 == 0 else unet(*inputs, deep[number])
            deep[number] = features
            predictions.append(prediction)
        output = predictions[0]
        if guidance_scale > 1:
            output = predictions[1] + guidance_scale * (predictions[0] - predictions[1])
        x, history = SAMPLERS["dpm++2m"].step(request.schedule, i, x, output, history, None, 0.0)
    found = generate(least, context, **settings, cache_interval=3)
    np.testing.assert_allclose(found, finish(least, (x, history))[0], atol=1e-5)
    exact = generate(least, context, **settings)
    assert np.abs(found - exact).max() > CLOSE
    np.testing.assert_array_equal(generate(least, context, **settings, cache_interval=1), exact)
    ends: list[int] = []
    in_pieces, _ = generate_with_progress(
        least, context, lambda done, _: ends.append(done), **settings, cache_interval=np.int64(3)
    )
    assert all(end % 3 == 0 for end in ends[:-1])
    np.testing.assert_array_equal(in_pieces, found)
    before = advance._cache_size()
    assert np.abs(generate(least, context, **settings, cache_interval=2) - found).max() > CLOSE
    assert advance._cache_size() == before


def test_no_text_and_no_weight_give_the_picture_of_vary(least: Bundle, vectors: jax.Array, context: jax.Array) -> None:
    edited = edit_prompt(least, vectors, tokenize(least, [""]), 0.0)
    np.testing.assert_array_equal(sample(least, edited), sample(least, context))
    night = edit_prompt(least, vectors, tokenize(least, ["at night"]), 0.0)
    assert np.abs(sample(least, night) - sample(least, context)).max() > CLOSE


def test_27_is_not_27_5(least: Bundle) -> None:
    features = jnp.asarray(np.random.default_rng(3).standard_normal((2, 32), np.float32))
    pictures = [
        to_uint8(
            generate(
                least, image_prompt(least, convert(closed_form(least, scale=scale), features)), seeds=0, steps=STEPS
            )
        )
        for scale in (27.0, 27.5)
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_pieces_of_the_loop_are_the_loop(least: Bundle, context: jax.Array, name: str) -> None:
    settings: dict[str, Any] = {"seeds": [1, 2], "steps": STEPS, "sampler": name, "eta": 0.5}
    whole = np.asarray(generate(least, context, **settings))
    assert np.isfinite(whole).all()
    request, state = begin(least, context, **settings)
    for i in range(request.evaluations):
        state = advance(least, request, state, i, i + 1)
    np.testing.assert_array_equal(finish(least, state)[0], whole)


def test_progress_is_reported_and_changes_nothing(least: Bundle, context: jax.Array) -> None:
    reports: list[tuple[int, int]] = []
    pictures, flagged = generate_with_progress(
        least, context, lambda *report: reports.append(report), seeds=[1, 2], steps=STEPS, sampler="pndm"
    )
    np.testing.assert_array_equal(pictures, generate(least, context, seeds=[1, 2], steps=STEPS, sampler="pndm"))
    assert not flagged.any()
    assert reports[0] == (1, STEPS + 1)
    assert reports[-1] == (STEPS + 1, STEPS + 1)
    assert reports == sorted(set(reports))


def test_other_values_compile_nothing(least: Bundle, vectors: jax.Array) -> None:
    other_weights = jax.tree.map(lambda leaf: leaf * 0.9, least)
    shifted = jnp.asarray(np.asarray(vectors) + 1)
    noise = np.random.default_rng(0).standard_normal((2, 2, 4, 8, 8), np.float32)
    texts = [tokenize(least, [text]) for text in ("at night", "blue")]

    def run(bundle: Bundle, vectors: Any, tokens: Any, alpha: float, **settings: Any) -> np.ndarray:
        context = edit_prompt(bundle, vectors, tokens, alpha)
        return sample(bundle, context, **{"negative": text_prompt(bundle, tokens)} | settings)

    def run_all(seed: int, guidance: float, alpha: float, eta: float, n: int) -> list[np.ndarray]:
        settings: dict[str, Any] = {"seeds": seed, "guidance_scale": guidance, "eta": eta}
        return [
            run(least, vectors, texts[n], alpha, **settings),
            run(least, (vectors, shifted)[n], texts[0], alpha, **settings, latents=noise[n]),
            run((least, other_weights)[n], vectors, texts[0], alpha, **settings),
        ]

    with compilations() as found:
        first = run_all(seed=0, guidance=7.5, alpha=0.9, eta=0.0, n=0)
        jax.jit(lambda x: x + 1)(0)
    assert found, "compilations are not counted"
    with compilations() as found:
        second = run_all(seed=LARGEST_SEED, guidance=3.0, alpha=-1.5, eta=0.7, n=1)
    assert not found
    assert all(np.abs(a - b).max() > CLOSE for a, b in zip(first, second, strict=True))


def non_splat_constants(text: str) -> int:
    """How many numbers a lowered program holds in constants."""
    shapes = re.findall(r'stablehlo\.constant dense<(?:\[|")[^>]*> : tensor<((?:\d+x)+)\w+>', text)
    return sum(int(np.prod([int(side) for side in shape.split("x")[:-1]])) for shape in shapes)


def in_loops(text: str, pattern: str) -> tuple[int, int]:
    """How often a pattern is found in a compiled program's text: within loops, and before or after them."""
    parts = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \([^\n]*\{\n)", text)
    computations = {re.match(r"(?:ENTRY )?%?([\w.-]+)", part.strip())[1]: part for part in parts}  # type: ignore[index]
    within: set[str] = set()
    waiting = re.findall(r"\bbody=%?([\w.-]+)", text)
    while waiting:
        if (name := waiting.pop()) not in within:
            within.add(name)
            waiting += re.findall(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)", computations[name])
    counts = {name: len(re.findall(pattern, part)) for name, part in computations.items()}
    inside = sum(count for name, count in counts.items() if name in within)
    return inside, sum(counts.values()) - inside


def test_keys_and_values_of_the_prompt_are_computed_once(least: Bundle, context: jax.Array) -> None:
    """XLA moves what no step changes out of the loop; this tells if it ceases to."""
    request, state = begin(least, context, seeds=0, steps=STEPS)
    text = advance.lower(least, request, state, 0, STEPS).compile().as_text()
    rows, tokens = 2 * len(context), context.shape[1]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(least.params["unet"])]
    layers = sum("attn2" in path and ("to_k" in path or "to_v" in path) for path in paths)
    assert layers > 0
    assert in_loops(text, rf"= f32\[{rows * tokens},\d+\]\S* dot\(") == (0, layers)
    # Nor are they put in another order there.
    assert in_loops(text, rf"= f32\[{rows},\d+,(\d+,{tokens}|{tokens},\d+)\]\S* transpose\(") == (0, layers)


def test_the_loop_holds_no_weights_and_never_leaves_the_device(least: Bundle, context: jax.Array) -> None:
    request, state = begin(least, context, seeds=0, steps=STEPS, eta=0.5)
    leaves_device = re.compile(r"callback|infeed|outfeed|stablehlo\.(send|recv)")
    text = advance.lower(least, request, state, 0, STEPS).as_text()
    assert "stablehlo.while" in text
    assert not leaves_device.search(text)
    assert non_splat_constants(text) < 100

    def worse(state: Any) -> Any:
        jax.debug.callback(lambda x: None, state[0])
        return state[0] @ np.random.default_rng(0).standard_normal((4, 100), np.float32)

    text = jax.jit(worse).lower(state).as_text()
    assert leaves_device.search(text)
    assert non_splat_constants(text) >= 400


def test_the_loop_reads_nothing_from_the_host(least: Bundle, context: jax.Array) -> None:
    request, state = begin(least, context, seeds=0, steps=STEPS)
    first, last = jnp.asarray(0), jnp.asarray(STEPS)
    with jax.transfer_guard("disallow"):
        advance(least, request, state, first, last)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            advance(least, request, (np.zeros(state[0].shape, np.float32), ()), first, last)


def in_pairs(x: jax.Array) -> jax.Array:
    return x.reshape(2, len(x) // 2, *x.shape[1:])


def on_two_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """`shard_map` over the pictures, the checkpoint on every device."""
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:2], ("data",))
    whole, parts = PartitionSpec(), PartitionSpec("data")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(whole, parts, parts), out_specs=parts))


WAYS: dict[str, Callable[..., Any]] = {
    "jit": lambda function, *inputs: jax.jit(function)(*inputs),
    "vmap": lambda function, bundle, *inputs: jnp.concatenate(
        jax.vmap(function, in_axes=(None, 0, 0))(bundle, *map(in_pairs, inputs))
    ),
    "shard_map": lambda function, *inputs: on_two_devices(function)(*inputs),
    "pmap": lambda function, bundle, *inputs: np.concatenate(
        jax.pmap(function, in_axes=(None, 0, 0), devices=jax.devices("cpu")[:2])(bundle, *map(in_pairs, inputs))
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interval", [None, (0.2, 0.6)])
def test_the_same_pictures_wherever_they_are_made(least: Bundle, context: jax.Array, way: str, interval: Any) -> None:
    def pictures(bundle: Bundle, context: jax.Array, seeds: jax.Array) -> jax.Array:
        return generate(bundle, context, seeds=seeds, steps=STEPS, eta=0.5, guidance_interval=interval)

    seeds = jnp.array([3, LARGEST_SEED], jnp.uint32)
    found = WAYS[way](pictures, least, context, seeds)
    np.testing.assert_allclose(found, pictures(least, context, seeds), atol=CLOSE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_sharded(least: Bundle, context: jax.Array, name: str) -> None:
    # shard_map refuses loops whose state differs between devices only from its first step on, as with one seed here.
    def pictures(bundle: Bundle, context: jax.Array, guidance: jax.Array) -> jax.Array:
        return generate(bundle, context, seeds=0, steps=STEPS, sampler=name, guidance_scale=guidance)

    found = jax.eval_shape(on_two_devices(pictures), least, context, jnp.ones(2))
    assert (found.shape, found.dtype) == ((2, 32, 32, 3), jnp.float32)


def test_float32_stays_float32_where_64_bits_are_on(least: Bundle, context: jax.Array) -> None:
    with jax.enable_x64(True):
        for name in ("ddim", "dpm++2m"):
            found = jax.eval_shape(
                lambda *inputs, name=name: generate(*inputs, seeds=1, steps=2, sampler=name), least, context
            )
            assert found.dtype == jnp.float32
        _, (x, _) = begin(least, context, seeds=LARGEST_SEED, indices=1)
    np.testing.assert_array_equal(x[0].transpose(2, 0, 1), noise_of(LARGEST_SEED, 1))


def test_odd_latents(tiny: Bundle, context: jax.Array) -> None:
    tall = sample(tiny, context[:1], height=28, width=20, steps=1)
    assert tall.shape == (1, 28, 20, 3)
    latents = np.asarray(noise_of(7, 0, (4, 7, 5)))[None]
    np.testing.assert_array_equal(sample(tiny, context[:1], height=28, width=20, steps=1, latents=latents), tall)


def test_bfloat16_is_near_float32(least: Bundle, context: jax.Array) -> None:
    config = dataclasses.replace(least.config, dtype="bfloat16")
    expected = config.abstract_params()
    half = Bundle(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), least.params, expected), config)
    assert half.params["unet"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    found = sample(half, context, guidance_scale=1.0)
    assert found.dtype == np.float32
    difference = np.abs(found - sample(least, context, guidance_scale=1.0)).mean()
    assert 0 < difference < 0.02


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seeds": -1}, "seeds is -1, expected a whole number from 0 to 4294967295"),
        ({"seeds": 2**32}, "seeds is 4294967296, expected a whole number"),
        ({"seeds": 2**64}, "seeds is 18446744073709551616, expected a whole number"),
        ({"seeds": [3, -2]}, "seeds is -2, expected a whole number"),
        ({"seeds": np.array([2**32, 0])}, "seeds is 4294967296, expected a whole number"),
        ({"seeds": 0.5}, "seeds is 0.5, expected a whole number"),
        ({"seeds": [1, 2, 3]}, r"seeds has shape \(3,\), expected \(2,\), one value a picture, or one for all"),
        ({"indices": -1}, "indices is -1, expected a whole number"),
        ({"indices": 2**32}, "indices is 4294967296, expected a whole number"),
        ({"guidance_scale": np.nan}, "guidance_scale is nan, expected a finite number"),
        ({"guidance_scale": [7.5, np.inf]}, "guidance_scale is inf, expected a finite number"),
        ({"guidance_scale": 1e39}, r"guidance_scale is 1e\+39, expected a finite number"),
        ({"guidance_scale": np.ones((2, 1))}, r"guidance_scale has shape \(2, 1\), expected \(2,\)"),
        ({"eta": np.nan}, "eta is nan, expected 0 to 1"),
        ({"eta": 1.5}, "eta is 1.5, expected 0 to 1"),
        ({"eta": -0.1}, "eta is -0.1, expected 0 to 1"),
        ({"eta": [0.1, 0.2]}, r"eta has shape \(2,\), expected"),
        ({"steps": 0}, "steps is 0, expected 1 to 1000"),
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"sampler": "heun"}, "sampler is 'heun', expected one of ddim, pndm, euler, euler-a, dpm"),
        ({"karras": True}, "karras is on, but ddim has no such option"),
        ({"guidance_interval": (0.7, 0.3)}, r"guidance_interval is \(0.7, 0.3\), expected two shares"),
        ({"guidance_interval": (0.7, 1.3)}, r"guidance_interval is \(0.7, 1.3\), expected two shares"),
        ({"cache_interval": 0}, "cache_interval is 0, expected a whole number from 1"),
        ({"cache_interval": -2}, "cache_interval is -2, expected a whole number from 1"),
        ({"cache_interval": 1.5}, "cache_interval is 1.5, expected a whole number from 1"),
        (
            {"cache_interval": 2, "guidance_interval": (0.1, 0.9)},
            "found both guidance_interval and cache_interval, expected one",
        ),
        ({"height": 30}, "height is 30, expected a multiple of 4: try 32"),
        ({"width": 2}, "width is 2, expected a multiple of 4: try 4"),
        ({"height": 0}, "height is 0, expected a multiple of 4: try 4"),
        (
            {"latents": np.zeros((2, 4, 8, 9), np.float32)},
            r"latents have shape \(2, 4, 8, 9\), expected \(2, 4, 8, 8\)",
        ),
        (
            {"latents": np.zeros((1, 4, 8, 8), np.float32)},
            r"latents have shape \(1, 4, 8, 8\), expected \(2, 4, 8, 8\)",
        ),
        ({"negative": jnp.zeros((3, 20, 24))}, r"negative has shape \(3, 20, 24\), expected \(2, 20, 24\)"),
        ({"negative": jnp.zeros((2, 20, 25))}, r"negative has shape \(2, 20, 25\), expected \(2, 20, 24\)"),
    ],
)
def test_refusals(least: Bundle, context: jax.Array, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as refusal:
        sample(least, context, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((0, 20, 24), "there are no prompts, expected at least one"),
        ((2, 20, 23), r"context has shape \(2, 20, 23\), expected \(2, 20, 24\)"),
        ((2, 77, 24), r"context has shape \(2, 77, 24\), expected \(2, 20, 24\)"),
        ((20, 24), r"context has shape \(20, 24\), expected \(N, L, D\) with one row a picture: give context\[None\]"),
    ],
)
def test_prompts_of_another_shape_are_refused(least: Bundle, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        generate(least, jnp.zeros(shape), seeds=0)


def test_decoding_in_chunks_is_decoding_at_once(least: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = jax.random.normal(jax.random.key(0), (5, 8, 8, 4))
    found = []
    for pictures in (1, 2, 5):
        monkeypatch.setattr(MODULE, "_DECODED_PIXELS", pictures * 32 * 32)
        found.append(np.asarray(jax.jit(finish.__wrapped__)(least, (latents, ()))[0]))
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    np.testing.assert_allclose(found[1], found[2], atol=1e-5)
    model, params = least.config.vae_model, {"params": least.params["vae"]}
    decoded = model.apply(params, latents / least.config.vae.scaling_factor, method="decode")
    np.testing.assert_allclose(found[0], np.clip(decoded / 2 + 0.5, 0, 1), atol=1e-5)


def test_to_uint8_rounds() -> None:
    assert to_uint8(jnp.array([0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0])).tolist() == [0, 0, 1, 255, 255]


def test_flagged_pictures_are_black_and_reported(least: Bundle) -> None:
    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    pictures = np.asarray(finish(least, (latents, ()))[0])
    side = SafetySide(least.config.vision_side.vision, Preprocessing(size=28, crop_size=(28, 28)))
    pixels = np.stack([preprocess(picture, side.preprocessing) for picture in to_uint8(pictures)])
    params = random_params(StableDiffusionSafetyChecker(side.vision), pixels)
    pooled = CLIPVisionModel(side.vision).apply({"params": params["vision_model"]}, pixels)
    embeddings = np.array(pooled @ params["visual_projection"]["kernel"])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert embeddings[0] @ embeddings[1] < 0.995
    # Only the concept that looks like the second picture is ever near enough.
    params["concept_embeds"][3] = embeddings[1]
    params["concept_embeds_weights"] = np.full(17, 2, np.float32)
    params["concept_embeds_weights"][3] = 0.998
    params["special_care_embeds_weights"] = np.full(3, 2, np.float32)
    checked = Bundle(
        least.params | {"safety_checker": jax.tree.map(jnp.asarray, params)},
        dataclasses.replace(least.config, safety=side),
    )
    found, flagged = finish(checked, (latents, ()))
    assert flagged.tolist() == [False, True]
    np.testing.assert_allclose(found[0], pictures[0], atol=1e-6)
    assert not found[1].any()


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (16, 20), (100, 100), (40, 64)])
@pytest.mark.parametrize("target", [28, (30, 28)])
def test_preprocessing_on_the_device_is_that_of_the_host(size: tuple[int, int], target: Any) -> None:
    # Pillow may go through tall pictures in another order, and then rounds differently in between.
    settings = Preprocessing(size=target, crop_size=(28, 28))
    generator = np.random.default_rng(0)
    # Blocks of extreme values overshoot, and halves at their edges have to be rounded.
    blocks = np.kron(generator.integers(0, 256, (size[0] // 4, size[1] // 4, 3)), np.ones((4, 4, 1)))
    for levels in (blocks.astype(np.uint8), generator.integers(0, 256, (*size, 3), np.uint8)):
        found = preprocess_on_device(jnp.asarray(levels, jnp.float32)[None], settings)[0]
        np.testing.assert_allclose(found, preprocess(levels, settings), atol=1e-5)
