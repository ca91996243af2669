"""Tuning where a map is fitted to captions: SDXL's prompts of several parts, and each place's own state."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import apply
from sdipc_jax.checkpoints.keys import flatten, torch_name
from sdipc_jax.cli import main
from sdipc_jax.tuning import losses
from tests.compare import relative_error
from tests.test_sdxl_pictures import CAPTIONS, quick_sdxl, with_clip
from tests.tuning_runs import write_pictures

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(3)


def settings(**values: Any) -> tuning.TuningSettings:
    return tuning.TuningSettings(**{"prompt_length": 2, "steps": 2, "schedule": "constant"} | values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder / "sdxl")


@pytest.fixture(scope="module")
def projection(bundle: sdipc.Bundle) -> sdipc.Projection:
    return sdipc.calibrate(bundle, CAPTIONS, ridge=0.5)


@pytest.fixture(scope="module")
def cache(bundle: sdipc.Bundle) -> tuning.Cache:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (40, 30 + 9 * index, 3), np.uint8) for index in range(2)]
    return tuning.make_cache(bundle, settings(variant="kv"), pictures, ["a cat", "a dog!"])


def test_the_loss_is_that_of_the_networks_called_by_hand(
    bundle: sdipc.Bundle, projection: sdipc.Projection, cache: tuning.Cache
) -> None:
    chosen = settings(variant="kv", text_weight=0.5)
    state, batch = tuning.init(bundle, chosen, projection), cache.batch([0, 1])
    draws = losses.draw(KEY, jnp.arange(2), state.frozen, chosen, batch)
    found, parts = losses.loss(state.params, state.frozen, chosen, batch, draws)
    latents = batch["latents"] + batch["deviation"] * draws.latent_noise
    share = np.asarray(state.frozen.alpha_bars)[np.asarray(draws.timesteps)][:, None, None, None]
    noisy = np.sqrt(share) * latents + np.sqrt(1 - share) * draws.noise
    sizes = np.tile(np.array([32, 32, 0, 0, 32, 32], np.float32), (2, 1))
    texts = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a cat", "a dog!"]))
    pictures = sdipc.image_prompt(bundle, sdipc.convert(projection, batch["features"]))
    expected = [
        np.mean(
            np.square(
                apply(
                    bundle.config.unet_model, bundle.params["unet"], noisy, draws.timesteps.astype(jnp.float32),
                    prompt.context, text_embeds=prompt.pooled, time_ids=sizes,
                )
                - draws.noise
            )
        )
        for prompt in (pictures, texts)
    ]  # fmt: skip
    assert relative_error(parts["loss_image"], expected[0]) <= 1e-5
    assert relative_error(parts["loss_text"], expected[1]) <= 1e-5
    assert relative_error(found, expected[0] + 0.5 * expected[1]) <= 1e-5


def test_keys_and_values_of_all_layers_train(projection: sdipc.Projection, tmp_path: Path) -> None:
    bundle = with_clip(tmp_path)
    state = tuning.init(bundle, settings(variant="kv"), projection)
    trained = {torch_name(path[1:]) for path in flatten(state.params)}
    # Depths 1 and 2: at the lower level are one layer on the way down and two on the way up, and one in the middle.
    assert len(trained) == 2 * (2 + 2 * 2 + 2)
    unet = {torch_name(path) for path in flatten(bundle.params["unet"])}
    assert trained == {name for name in unet if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


def test_a_step_changes_what_trains_and_nothing_else(
    bundle: sdipc.Bundle, projection: sdipc.Projection, cache: tuning.Cache
) -> None:
    before = tuning.init(bundle, settings(variant="kv", learning_rate=1e-3), projection)
    after, metrics = tuning.step(before, cache.batch([0, 1]), KEY)
    assert np.isfinite(metrics["loss"])
    tuned, untuned = flatten(tuning.apply(bundle, tuning.delta(after)).params), flatten(bundle.params)
    changed = {path for path, leaf in tuned.items() if (np.asarray(leaf) != np.asarray(untuned[path])).any()}
    assert changed == {path for path in untuned if path[-3:-1] in (("attn2", "to_k"), ("attn2", "to_v"))}
    assert changed == set(flatten(after.params))


def test_each_places_own_state_trains_too(bundle: sdipc.Bundle, cache: tuning.Cache) -> None:
    own = sdipc.calibrate(bundle, CAPTIONS, ridge=0.5, after_end="own")
    chosen = settings(variant="kv", mode="ct")
    state = tuning.init(bundle, chosen, own)
    batch = cache.batch([0, 1])
    draws = losses.draw(KEY, jnp.arange(2), state.frozen, chosen, batch)
    found = losses.image_context(state.frozen.params, state.frozen, chosen, batch, draws)
    expected = sdipc.image_prompt(bundle, sdipc.convert(own, batch["features"]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_layer_in_the_place_of_the_inverse_is_refused(bundle: sdipc.Bundle, projection: sdipc.Projection) -> None:
    with pytest.raises(sdipc.InputError, match="variant is fc_init, which trains a layer in the place of the inverse"):
        tuning.init(bundle, settings(variant="fc_init"), projection)
    with pytest.raises(sdipc.InputError, match="where the inverse does not reach"):
        tuning.init(bundle, settings(variant="kv"))


def test_the_command_tunes_and_vary_takes_the_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_pictures(tmp_path / "data", {"cat": 2})
    file = tmp_path / "run.yaml"
    run = tmp_path / "run"
    file.write_text(
        f"model: {folder / 'sdxl'}\ndata: {data}\noutput_dir: {run}\nsteps: 1\nbatch_size: 2\nprompt_length: 2\n"
        "sample_every: 1\nsample_pictures: 1\nlearning_rate: 0.001\n"
    )
    arguments = ["tune", "ft", str(file), "--mesh", "data=1", "--quiet"]
    assert main([*arguments, "variant=fc"]) == 2
    assert "variant is fc" in capsys.readouterr().err
    assert main(arguments) == 0
    assert (run / "samples/step-000001.png").is_file()
    output = tmp_path / "prompts.safetensors"
    picture = data / "cat/000.png"
    command = ["prompt", str(picture), "--model", str(folder / "sdxl"), "--output", str(output), "--quiet"]
    assert main([*command, "--tuned", str(run / "tuned.safetensors")]) == 0
