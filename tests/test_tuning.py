"""What trains and what does not, the losses, and what a delta file promises."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.keys import flatten, torch_name
from sdipc_jax.errors import InputError
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.tuning import losses
from sdipc_jax.tuning.step import row_numbers
from tests.compare import relative_error
from tests.tiny import SCHEDULER, SMALL_UNET, tiny_bundle

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(5)
CAPTIONS = ["a cat", "a dog", "a red cat", "", "two dogs"]
LENGTH = 2


def settings(**values: Any) -> tuning.TuningSettings:
    return tuning.TuningSettings(**{"prompt_length": LENGTH, "steps": 20, "schedule": "constant"} | values)


FT = settings(learning_rate=1e-3, ema=0.9)
CT = settings(mode="ct", optimizer="sgd", learning_rate=0.1, dropout=0.5)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (40, 30 + 9 * index, 3), np.uint8) for index in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def cache(tiny: Bundle, pictures: list[np.ndarray]) -> tuning.Cache:
    return tuning.make_cache(tiny, FT, pictures, CAPTIONS)


@pytest.fixture(scope="module")
def ct_cache(cache: tuning.Cache) -> tuning.Cache:
    return dataclasses.replace(cache, text=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A checkpoint with the tiny one's shapes and a UNet of one level, which compiles in half the time."""
    return tiny_bundle(tmp_path_factory.mktemp("small") / "parts", unet=SMALL_UNET)


@pytest.fixture(scope="module")
def tuned_state(tiny: Bundle, cache: tuning.Cache) -> tuple[tuning.State, tuning.State, tuning.Metrics]:
    """Before and after two steps of FT."""
    before = tuning.init(tiny, FT)
    after, _ = tuning.step(before, cache.batch([0, 1]), KEY)
    after, metrics = tuning.step(after, cache.batch([2, 3]), jax.random.fold_in(KEY, 1))
    return before, after, metrics


@pytest.fixture(scope="module")
def tuned(tiny: Bundle, tuned_state: tuple[tuning.State, tuning.State, Any]) -> tuple[tuning.Delta, Bundle]:
    delta = tuning.delta(tuned_state[1])
    return delta, tuning.apply(tiny, delta)


def names(params: dict[str, Any]) -> set[str]:
    return {f"{path[0]}.{torch_name(path[1:])}" for path in flatten(params)}


CROSS_ATTENTION = {
    f"unet.{block}.transformer_blocks.0.attn2.{name}.weight"
    for block in (
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
    for name in ("to_k", "to_v")
}
PROMPTS = {
    f"clip.deep_prompts.{name}"
    for name in ("embeddings", "projection.weight", "projection.bias", "layer_norm.weight", "layer_norm.bias")
}


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("both", CROSS_ATTENTION | PROMPTS),
        ("kv", CROSS_ATTENTION),
        ("prompts", PROMPTS),
        ("fc", {"clip.inverse.weight"}),
        ("fc_init", {"clip.inverse.weight"}),
    ],
)
def test_what_trains(tiny: Bundle, cache: tuning.Cache, variant: str, expected: set[str]) -> None:
    state = tuning.init(tiny, settings(variant=variant, ema=0.5))
    assert names(state.params) == expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # Two moments for each trained number, and a count: the rest has no optimizer state.
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) - 2 * trained in (1, 2)
    # The tower is in a step's memory only where gradients go through it.
    assert ("clip" in state.frozen.params) == state.settings.trains_prompts
    batch = dict(cache.batch([0, 1]))
    if not state.settings.trains_prompts:
        batch["features"] = np.zeros((len(batch.pop("pixels")), 32), np.float32)
    after, metrics = jax.eval_shape(tuning.step, state, batch, KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(metrics) == {"loss", "loss_image", "loss_text", "gradient_norm", "learning_rate"}


def test_leaves_that_moved(
    tiny: Bundle, tuned_state: tuple[tuning.State, tuning.State, tuning.Metrics], tuned: tuple[tuning.Delta, Bundle]
) -> None:
    before, after, metrics = tuned_state
    moved = {
        f"{path[0]}.{torch_name(path[1:])}"
        for path, leaf in flatten(after.params).items()
        if not np.array_equal(leaf, flatten(before.params)[path])
    }
    assert moved == CROSS_ATTENTION | PROMPTS
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    np.testing.assert_allclose(metrics["loss"], metrics["loss_image"] + metrics["loss_text"], rtol=1e-6)
    # In the tuned bundle too: W_i and W_t^+ and all else are what they were.
    was, now = flatten(tiny.params), flatten(tuned[1].params)
    changed = {path for path, leaf in now.items() if path not in was or not np.array_equal(leaf, was[path])}
    assert {f"{path[0]}.{torch_name(path[1:])}" for path in changed} == CROSS_ATTENTION | PROMPTS
    first, second = sdipc.closed_form(tiny), sdipc.closed_form(tuned[1])
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_customising_ignores_captions_and_lowers_the_loss(
    small: Bundle, cache: tuning.Cache, ct_cache: tuning.Cache
) -> None:
    state = tuning.init(small, CT)
    assert (CT.text_weight, CT.schedule, tuning.TuningSettings(mode="ct").learning_rate) == (0, "constant", 5e-6)
    batch = ct_cache.batch([0, 1, 2, 3])
    losses_seen = []
    for _ in range(12):
        state, metrics = tuning.step(state, batch, KEY)
        losses_seen.append(float(metrics["loss"]))
        assert "loss_text" not in metrics
        assert metrics["loss"] == metrics["loss_image"]
    assert losses_seen[-1] < 0.97 * losses_seen[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses_seen))
    with_text = jax.eval_shape(tuning.step, state, cache.batch([0, 1]), KEY)[1]
    assert "loss_text" not in with_text


def test_many_concepts_equal_separate_runs(small: Bundle, ct_cache: tuning.Cache) -> None:
    rows, keys = ([0, 1, 2, 3], [4, 3, 1, 0]), jax.random.split(KEY, 2)
    many = tuning.init_many(small, CT, 2)
    batches = jax.tree.map(lambda *parts: np.stack(parts), *(ct_cache.batch(each) for each in rows))
    for turn in range(3):
        many, metrics = tuning.step_many(many, batches, jax.vmap(partial(jax.random.fold_in, data=turn))(keys))
    for index, each in enumerate(rows):
        state = tuning.init(small, CT)
        for turn in range(3):
            state, expected = tuning.step(state, ct_cache.batch(each), jax.random.fold_in(keys[index], turn))
        np.testing.assert_allclose(metrics["loss"][index], expected["loss"], rtol=1e-5)
        found = tuning.select(many, index)
        assert int(found.step) == 3
        trees = (found.params, state.params, tuning.init(small, CT).params)
        for leaf, exact, start in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True):
            assert relative_error(leaf, exact) <= 1e-5
            assert relative_error(leaf - start, exact - start) <= 1e-4


def test_batches_divided_over_time_and_devices_equal_one(small: Bundle, ct_cache: tuning.Cache) -> None:
    """Two batches on two devices, a picture each, against four pictures at once."""
    whole = ct_cache.batch([0, 1, 2, 3])
    start = tuning.init(small, CT)
    expected, metrics = tuning.step(start, whole, KEY)
    found = tuning.init(small, CT.model_copy(update={"accumulate": 2}))
    # What is averaged over the devices is the same on all: vmap would refuse `out_axes=None` otherwise.
    divided = jax.jit(
        jax.vmap(
            partial(tuning.step, axis_name="data"), in_axes=(None, 0, None), out_axes=(None, None), axis_name="data"
        )
    )
    seen = []
    for rows in ([0, 1], [2, 3]):
        part = ct_cache.batch(rows) | {"rows": np.array(rows)}
        found, parts = divided(found, jax.tree.map(lambda leaf: leaf[:, None], part), KEY)
        seen.append(float(parts["loss"]))
        if len(seen) == 1:
            jax.tree.map(np.testing.assert_array_equal, found.params, start.params)
    np.testing.assert_allclose(np.mean(seen), metrics["loss"], rtol=1e-5)
    trees = (start.params, expected.params, found.params)
    for first, exact, leaf in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True):
        assert relative_error(leaf - first, exact - first) <= 1e-4


def test_a_batch_in_turns_is_the_batch(small: Bundle, ct_cache: tuning.Cache) -> None:
    batch, start = ct_cache.batch([0, 1, 2, 3]), tuning.init(small, CT)
    expected, metrics = tuning.step(start, batch, KEY)
    found, measured = tuning.step(start, batch, KEY, turns=2)
    # The mean of the norms of the two parts' gradients would be larger.
    assert measured.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5)
    trees = (start.params, expected.params, found.params)
    for first, exact, leaf in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True):
        assert relative_error(leaf - first, exact - first) <= 1e-4


def test_rows_count_over_all_devices() -> None:
    shards = {"latents": np.zeros((3, 2, 8, 8, 4), np.float32)}
    rows = jax.vmap(partial(row_numbers, axis_name="data"), axis_name="data")(shards)
    assert rows.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert row_numbers({"latents": shards["latents"][0], "rows": np.array([7, 4])}).tolist() == [7, 4]


def test_only_gradients_and_metrics_are_exchanged(small: Bundle, ct_cache: tuning.Cache) -> None:
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    state, batch = tuning.init(small, CT), ct_cache.batch([0, 1, 2, 3])
    step = jax.shard_map(
        partial(tuning.step, axis_name="data"), mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=(P(), P())
    )
    exchanged = []
    _collect(jax.make_jaxpr(step)(state, batch, KEY).jaxpr, exchanged)
    assert {name for name, _ in exchanged} <= {"psum", "psum_invariant"}
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert trained <= sum(size for _, size in exchanged) <= trained + 4


def _collect(jaxpr: Any, exchanged: list[tuple[str, int]]) -> None:
    collectives = ("psum", "all_gather", "all_to_all", "ppermute", "pmax", "pmin", "reduce_scatter")
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(collectives):
            exchanged.append((equation.primitive.name, sum(v.aval.size for v in equation.invars)))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _collect(inner, exchanged)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_is_predicted(
    tiny: Bundle, cache: tuning.Cache, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formulas in float64, with a UNet that gives its noisy input back."""
    scheduler = SchedulerConfig.from_json(SCHEDULER | {"prediction_type": prediction_type})
    bundle = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, scheduler=scheduler))
    kv = settings(variant="kv", text_weight=0.5)
    state = tuning.init(bundle, kv)
    batch = dict(cache.batch([0, 1, 2]))
    batch["features"] = np.random.default_rng(1).standard_normal((3, 32), np.float32)
    draws = tuning.draw(KEY, jnp.array([4, 0, 9]), state.frozen, kv, batch)
    seen = []

    def unet(_: Any, params: Any, noisy: Any, timesteps: Any, context: Any) -> Any:
        seen.append((timesteps, context))
        return noisy

    monkeypatch.setattr(losses, "apply", unet)
    total, parts = tuning.loss(state.params, state.frozen, kv, batch, draws)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    share = np.cumprod(1 - betas)[np.asarray(draws.timesteps)][:, None, None, None]
    latents = batch["latents"] + batch["deviation"] * np.asarray(draws.latent_noise, np.float64)
    noise = np.asarray(draws.noise, np.float64)
    noisy = np.sqrt(share) * latents + np.sqrt(1 - share) * noise
    target = noise if prediction_type == "epsilon" else np.sqrt(share) * noise - np.sqrt(1 - share) * latents
    expected = np.mean((noisy - target) ** 2)
    np.testing.assert_allclose(parts["loss_image"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, 1.5 * expected, rtol=1e-5)
    # The first half is prompted by pictures, the second by captions, at the same timesteps.
    ((timesteps, context),) = seen
    np.testing.assert_array_equal(timesteps, np.tile(draws.timesteps, 2))
    vectors = sdipc.convert(sdipc.closed_form(bundle), batch["features"])
    np.testing.assert_allclose(context[:3], sdipc.image_prompt(bundle, vectors), rtol=1e-5, atol=1e-5)
    expected = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, CAPTIONS[:3]))
    np.testing.assert_allclose(context[3:], expected, rtol=1e-5, atol=1e-5)


def test_draws_depend_on_the_row_alone(tiny: Bundle, cache: tuning.Cache) -> None:
    state = tuning.init(tiny, FT)
    batch = cache.batch([0, 1])
    together = tuning.draw(KEY, jnp.arange(256), state.frozen, FT, batch)
    alone = tuning.draw(KEY, jnp.array([7]), state.frozen, FT, batch)
    jax.tree.map(lambda all_rows, one: np.testing.assert_array_equal(all_rows[7], one[0]), together, alone)
    assert together.timesteps.min() < 30
    assert together.timesteps.max() > 970
    kept = np.asarray(together.keep)
    assert set(np.unique(kept).tolist()) == {0.0, np.float32(1 / 0.9)}
    assert 0.89 < np.mean(kept > 0) < 0.91
    other = tuning.draw(jax.random.fold_in(KEY, 1), jnp.arange(256), state.frozen, FT, batch)
    assert np.mean(np.asarray(other.timesteps) == np.asarray(together.timesteps)) < 0.05


def test_first_prompts_are_as_in_the_paper(tiny: Bundle) -> None:
    state = tuning.init(tiny, settings(variant="prompts", seed=3))
    prompts = state.params["clip"]["deep_prompts"]
    bound = np.sqrt(6 / (3 * 7**2 + 32))
    assert prompts["embeddings"].shape == (2, LENGTH, 32)
    assert 0.9 * bound < np.abs(prompts["embeddings"]).max() <= bound
    np.testing.assert_allclose(np.std(prompts["projection"]["kernel"]), np.sqrt(2 / 32), rtol=0.1)
    np.testing.assert_array_equal(prompts["layer_norm"]["scale"], 1)
    np.testing.assert_array_equal(prompts["layer_norm"]["bias"], 0)
    other = tuning.init(tiny, settings(variant="prompts", seed=4)).params["clip"]["deep_prompts"]
    assert not np.array_equal(other["embeddings"], prompts["embeddings"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_prompts_are_inserted_or_overwrite(tiny: Bundle, cache: tuning.Cache, overwrite: bool) -> None:
    """By which patches the features still depend on."""
    chosen = settings(variant="prompts", overwrite_first_layer=overwrite, dropout=0.0)
    tuned = tuning.apply(tiny, tuning.delta(tuning.init(tiny, chosen)))
    assert tuned.config.clip is not None
    assert tuned.config.clip.prompts is not None
    assert tuned.config.clip.prompts.overwrite_first_layer is overwrite
    pixels = np.repeat(cache.pixels[:1], 3, axis=0)
    pixels[1, :7, : 7 * LENGTH] = 0.5  # the first two patches, which are overwritten
    pixels[2, :7, 7 * LENGTH : 7 * (LENGTH + 1)] = 0.5  # the third
    plain, first, third = np.asarray(sdipc.encode_images(tuned, pixels))
    assert (relative_error(first, plain) < 1e-5) is overwrite
    assert relative_error(third, plain) > 1e-3


def test_trained_layer_starts_as_the_closed_form(tiny: Bundle, cache: tuning.Cache) -> None:
    features = np.random.default_rng(2).standard_normal((3, 32), np.float32)
    expected = sdipc.convert(sdipc.closed_form(tiny), features)
    found = {}
    for variant in ("fc_init", "fc"):
        tuned = tuning.apply(tiny, tuning.delta(tuning.init(tiny, settings(variant=variant))))
        found[variant] = sdipc.convert(sdipc.closed_form(tuned), features)
    np.testing.assert_array_equal(found["fc_init"], expected)
    assert relative_error(found["fc"], expected) > 0.5
    np.testing.assert_allclose(np.linalg.norm(found["fc"], axis=1), np.linalg.norm(expected, axis=1), rtol=1e-5)


def test_delta_file_round_trip(
    tiny: Bundle, tiny_folder: Path, tuned: tuple[tuning.Delta, Bundle], cache: tuning.Cache, tmp_path: Path
) -> None:
    delta, bundle = tuned
    file = tmp_path / "new" / "tuned.safetensors"
    tuning.save_delta(delta, file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    stored = load_file(file)
    assert set(stored) == CROSS_ATTENTION | PROMPTS
    assert all(tensor.dtype == np.float32 for tensor in stored.values())
    # PyTorch's layout: outputs first.
    assert stored["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape == (32, 24)
    loaded = sdipc.load(str(tiny_folder), tuned=file)
    assert loaded.config == bundle.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, bundle.params)
    tuning.save_delta(delta, file.parent / "again.safetensors")
    assert (file.parent / "again.safetensors").read_bytes() == file.read_bytes()
    again = tuning.load_delta(file)
    assert (again.mode, again.step, again.base) == ("ft", 2, tuning.digest(tiny))
    features = sdipc.encode_images(loaded, cache.pixels)
    assert relative_error(features, sdipc.encode_images(tiny, cache.pixels)) > 1e-2
    # An average is the result where there is one.
    assert not np.array_equal(delta.tensors["clip.deep_prompts.embeddings"], 0)


def test_average_is_the_result(tuned_state: tuple[tuning.State, tuning.State, Any]) -> None:
    before, after, _ = tuned_state
    result = tuning.delta(after).tensors["clip.deep_prompts.embeddings"]
    first, last = (state.params["clip"]["deep_prompts"]["embeddings"] for state in (before, after))
    assert not np.array_equal(result, last)
    assert np.abs(result - first).max() < np.abs(last - first).max()


def test_exported_folder_is_read_back_bit_for_bit(
    tuned: tuple[tuning.Delta, Bundle], tiny: Bundle, tmp_path: Path
) -> None:
    layer = tuning.delta(tuning.init(tiny, settings(variant="fc")))
    bundle = tuning.apply(tuned[1], layer, check=False)
    sdipc.save(bundle, tmp_path / "exported")
    assert (tmp_path / "exported/clip/deep_prompts.safetensors").is_file()
    again = sdipc.load(tmp_path / "exported")
    assert again.config.clip is not None
    assert bundle.config.clip is not None
    assert (again.config.clip.prompts, again.config.clip.trained_inverse) == (bundle.config.clip.prompts, True)
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    assert tuning.digest(again) == tuning.digest(bundle)
    # Tuning goes on from what is there.
    state = tuning.init(again, settings())
    np.testing.assert_array_equal(
        state.params["clip"]["deep_prompts"]["embeddings"], bundle.params["clip"]["deep_prompts"]["embeddings"]
    )
    with pytest.raises(InputError, match="has DeepPrompts"):
        tuning.init(again, settings(prompt_length=LENGTH + 1))


def test_delta_for_another_checkpoint_is_refused(
    tiny: Bundle, tuned: tuple[tuning.Delta, Bundle], tmp_path: Path
) -> None:
    delta, bundle = tuned
    other = tiny_bundle(tmp_path / "other", seed=1)
    with pytest.raises(InputError) as error:
        tuning.apply(other, delta)
    assert delta.base in str(error.value)
    assert tuning.digest(other) in str(error.value)
    # A bundle that was tuned is another checkpoint too; one loaded in bfloat16 is not.
    with pytest.raises(InputError, match="digest"):
        tuning.apply(bundle, delta)
    half = dataclasses.replace(tiny, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params))
    assert tuning.digest(half) == delta.base


def test_damaged_deltas_are_refused(tiny: Bundle, tuned: tuple[tuning.Delta, Bundle], tmp_path: Path) -> None:
    delta, _ = tuned
    file = tmp_path / "tuned.safetensors"
    tensors = {name: np.asarray(tensor) for name, tensor in delta.tensors.items()}

    def refuse(match: str, **changes: Any) -> None:
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        with pytest.raises(InputError, match=match):
            tuning.apply(tiny, dataclasses.replace(delta, tensors=changed))

    refuse("has unet.none", **{"unet.none": np.zeros(3, np.float32)})
    refuse("has shape", **{"clip.deep_prompts.projection.bias": np.zeros(31, np.float32)})
    refuse("has shape", **{"clip.deep_prompts.embeddings": np.zeros((3, LENGTH, 32), np.float32)})
    refuse("has no clip.deep_prompts.layer_norm.bias", **{"clip.deep_prompts.layer_norm.bias": None})
    save_file(tensors, file)
    with pytest.raises(InputError, match="no mode in its metadata"):
        tuning.load_delta(file)
    tuning.save_delta(dataclasses.replace(delta, tensors=tensors | {"x": np.array([np.nan], np.float32)}), file)
    with pytest.raises(InputError, match="NaN"):
        tuning.load_delta(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="whole safetensors file"):
        tuning.load_delta(file)
    with pytest.raises(InputError, match="no such file"):
        tuning.load_delta(tmp_path / "none.safetensors")


def test_cache_is_what_the_networks_give(tiny: Bundle, cache: tuning.Cache, pictures: list[np.ndarray]) -> None:
    assert len(cache) == len(pictures)
    assert cache.latents.shape == (5, 8, 8, 4)
    assert cache.features is None
    # Five pictures in batches of four and of two: the same rows.
    again = tuning.make_cache(tiny, settings(variant="kv"), pictures, CAPTIONS, batch_size=2)
    np.testing.assert_allclose(again.latents, cache.latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.text, cache.text, rtol=1e-4, atol=1e-5)
    assert again.pixels is None
    np.testing.assert_allclose(again.features, sdipc.encode_images(tiny, cache.pixels), rtol=1e-4, atol=1e-4)
    batch = cache.batch([0, 1], [3, 4])
    np.testing.assert_array_equal(batch["pixels"], cache.pixels[[0, 1]])
    for name in ("latents", "deviation", "text"):
        np.testing.assert_array_equal(batch[name], getattr(cache, name)[[3, 4]])


def test_targets_are_others_of_the_class() -> None:
    classes = ["a", "b", "a", "a", "b", "c"]
    generator = np.random.default_rng(0)
    seen = {(reference, int(tuning.choose_targets([reference], classes, generator)[0]))
            for _ in range(60) for reference in range(6)}  # fmt: skip
    assert seen == {(0, 2), (0, 3), (2, 0), (2, 3), (3, 0), (3, 2), (1, 4), (4, 1), (5, 5)}


def test_settings_and_batches_that_do_not_fit_are_refused(
    tiny: Bundle, cache: tuning.Cache, pictures: list[np.ndarray]
) -> None:
    for values, match in [
        ({"mode": "lora"}, "mode is 'lora'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rat": 1}, "not a setting"),
    ]:
        with pytest.raises(InputError, match=match):
            tuning.TuningSettings(**values)
    assert tuning.TuningSettings(epochs=100).for_pictures(10).steps == 250
    assert tuning.TuningSettings(mode="ct").for_pictures(5).steps == 30
    with pytest.raises(InputError, match="steps is not given"):
        tuning.init(tiny, tuning.TuningSettings())
    with pytest.raises(InputError, match="at most the 16 patches"):
        tuning.init(tiny, settings(prompt_length=17, overwrite_first_layer=True))
    sample = SchedulerConfig.from_json(SCHEDULER | {"prediction_type": "sample"})
    bundle = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, scheduler=sample))
    with pytest.raises(InputError, match="predicts the sample"):
        tuning.init(bundle, FT)
    with pytest.raises(InputError, match="no captions"):
        tuning.make_cache(tiny, FT, pictures)
    with pytest.raises(InputError, match="no text"):
        tuning.step(tuning.init(tiny, FT), dataclasses.replace(cache, text=None).batch([0, 1]), KEY)
    with pytest.raises(InputError, match="no features"):
        tuning.step(tuning.init(tiny, settings(variant="kv")), cache.batch([0, 1]), KEY)


def test_rematerialisation_keeps_a_fraction(small: Bundle) -> None:
    """By the arrays that the forward pass leaves for the backward pass."""
    kept = {}
    for rematerialise in (False, True):
        state = tuning.init(small, CT.model_copy(update={"rematerialise": rematerialise}))
        batch = {"latents": np.zeros((4, 16, 16, 4), np.float32), "pixels": np.zeros((4, 28, 28, 3), np.float32)}
        draws = tuning.draw(KEY, jnp.arange(4), state.frozen, CT, batch)
        backward = jax.eval_shape(partial(_backward, state.frozen, state.settings, batch, draws), state.params)
        kept[rematerialise] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(tuning.init(small, CT).frozen.params))
    assert kept[True] - frozen < 0.3 * (kept[False] - frozen)


def _backward(frozen: Any, chosen: tuning.TuningSettings, batch: Any, draws: Any, params: Any) -> Any:
    return jax.vjp(lambda params: losses.objective(chosen)(params, frozen, chosen, batch, draws)[0], params)[1]


def test_rates_clipping_and_bfloat16(tiny: Bundle, cache: tuning.Cache) -> None:
    """Of the optimizer alone, on gradients of one."""
    params = tuning.init(tiny, FT).params
    ones = jax.tree.map(jnp.ones_like, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    def moved(**values: Any) -> Any:
        optimizer = tuning.make_optimizer(settings(optimizer="sgd", weight_decay=0, **values))
        return jax.jit(lambda: optimizer.update(ones, optimizer.init(params), params)[0])()

    clipped = moved(learning_rate=0.5, prompt_learning_rate=0.25, clip_norm=2.0)
    np.testing.assert_allclose(clipped["clip"]["deep_prompts"]["embeddings"], -0.25 * 2 / np.sqrt(count), rtol=1e-5)
    kernel = clipped["unet"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["kernel"]
    np.testing.assert_allclose(kernel, -0.5 * 2 / np.sqrt(count), rtol=1e-5)
    free = moved(learning_rate=0.5, clip_norm=None)
    assert all((leaf == -0.5).all() for leaf in jax.tree.leaves(free))
    half = tuning.init(tiny, settings(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.frozen.params)} == {jnp.dtype("bfloat16")}
    after, metrics = jax.eval_shape(tuning.step, half, cache.batch([0, 1]), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, metrics))} == {jnp.dtype("float32")}
