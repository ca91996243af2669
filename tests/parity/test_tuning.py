"""Training against PyTorch's own networks, automatic gradients and optimizers."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel

import sdipc_jax as sdipc
from sdipc_jax import tuning
from sdipc_jax.samplers import SchedulerConfig
from tests.compare import relative_error
from tests.parity.oracle import nchw, nhwc
from tests.parity.tuning_oracle import Twin, by_name
from tests.tiny import SCHEDULER, write_checkpoint

CAPTIONS = ["a cat", "two red dogs", "", "b"]
LENGTH = 3


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: write_checkpoint(
            tmp_path_factory.mktemp(kind) / "tiny",
            scheduler=SchedulerConfig.from_json(SCHEDULER | {"prediction_type": kind}),
        )
        for kind in ("epsilon", "v_prediction")
    }


@pytest.fixture(scope="module")
def batch(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    bundle = sdipc.load(folders["epsilon"])
    shape = (len(CAPTIONS), 8, 8, 4)
    return {
        "latents": generator.standard_normal(shape, np.float32),
        "deviation": generator.uniform(0.05, 0.2, shape).astype(np.float32),
        "pixels": generator.standard_normal((len(CAPTIONS), 28, 28, 3), np.float32),
        "text": np.asarray(sdipc.text_prompt(bundle, sdipc.tokenize(bundle, CAPTIONS))),
    }


@pytest.mark.parametrize("prediction_type, optimizer", [("epsilon", "adamw"), ("v_prediction", "sgd")])
def test_one_step(
    folders: dict[str, Path],
    batch: dict[str, np.ndarray],
    prediction_type: str,
    optimizer: str,
    measured: Callable[[str, float], float],
) -> None:
    values: dict[str, Any] = {"adamw": {"learning_rate": 1e-5}, "sgd": {"learning_rate": 1.0, "clip_norm": 0.1}}
    chosen = tuning.TuningSettings(
        optimizer=optimizer, prompt_length=LENGTH, steps=10, text_weight=0.7, **values[optimizer]
    )
    bundle, key = sdipc.load(folders[prediction_type]), jax.random.key(7)
    state = tuning.init(bundle, chosen)
    draws = tuning.draw(key, jnp.arange(len(CAPTIONS)), state.frozen, chosen, batch)
    differentiated = jax.jit(jax.value_and_grad(tuning.loss, has_aux=True), static_argnums=2)
    (found, _), gradients = differentiated(state.params, state.frozen, chosen, batch, draws)

    twin = Twin(folders[prediction_type], state)
    before = by_name(state.params)
    assert before.keys() == twin.trained.keys()
    loss = twin.loss(batch, draws, 0.7, CAPTIONS)
    loss.backward()
    worst = {"loss": abs(float(found) / float(loss) - 1)}
    worst["gradient"] = max(
        relative_error(leaf, twin.trained[name].grad.numpy()) for name, leaf in by_name(gradients).items()
    )

    torch.nn.utils.clip_grad_norm_(twin.trained.values(), chosen.clip_norm)
    if optimizer == "adamw":
        made: Any = torch.optim.AdamW(twin.trained.values(), lr=1e-5, weight_decay=1e-2)
    else:
        made = torch.optim.SGD(twin.trained.values(), lr=1.0, weight_decay=1e-2)
    made.step()
    after, metrics = tuning.step(state, batch, key)
    worst["step loss"] = abs(float(metrics["loss"]) / float(loss) - 1)
    changes = {}
    for name, leaf in by_name(after.params).items():
        expected = twin.trained[name].detach().numpy() - before[name]
        changes[name] = relative_error(leaf - before[name], expected)
        # No change at all is as wrong as can be.
        assert relative_error(np.zeros_like(expected), expected) == 1
    worst["update"] = max(changes.values())
    for what, error in worst.items():
        measured(f"tuning step, {prediction_type}, {optimizer}: {what}", error)
    assert worst["loss"] <= 1e-5
    assert worst["step loss"] <= 1e-5
    assert worst["gradient"] <= 1e-4
    assert worst["update"] <= (1e-2 if optimizer == "adamw" else 1e-4)


def test_thirty_steps_of_customising(
    folders: dict[str, Path], batch: dict[str, np.ndarray], measured: Callable[[str, float], float]
) -> None:
    """At two hundred times the paper's rate, so that thirty steps change the loss visibly."""
    chosen = tuning.TuningSettings(mode="ct", prompt_length=LENGTH, learning_rate=1e-3)
    bundle = sdipc.load(folders["epsilon"])
    state = tuning.init(bundle, chosen)
    twin, untrained = Twin(folders["epsilon"], state), Twin(folders["epsilon"], state)
    made = torch.optim.AdamW(twin.trained.values(), lr=1e-3, weight_decay=1e-2)
    found, expected, key = [], [], jax.random.key(3)
    for turn in range(30):
        each = jax.random.fold_in(key, turn)
        draws = tuning.draw(each, jnp.arange(len(CAPTIONS)), state.frozen, chosen, batch)
        state, metrics = tuning.step(state, batch, each)
        found.append(float(metrics["loss"]))
        made.zero_grad()
        loss = twin.loss(batch, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.trained.values(), 1.0)
        made.step()
        expected.append(float(loss.detach()))
    errors = np.abs(np.array(found) / expected - 1)
    assert measured("thirty steps of ct, loss", errors.max()) <= 1e-4
    assert abs(float(untrained.loss(batch, draws)) / expected[-1] - 1) > 1e-2


def test_latents_are_those_of_pytorch(folders: dict[str, Path]) -> None:
    bundle = sdipc.load(folders["epsilon"])
    pictures = [np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8) for index in range(3)]
    cache = tuning.make_cache(bundle, tuning.TuningSettings(mode="ct"), pictures, batch_size=2)
    vae = AutoencoderKL.from_pretrained(folders["epsilon"] / "vae")
    with torch.no_grad():
        encoded = vae.encode(nchw(np.stack(pictures).astype(np.float32) / 127.5 - 1)).latent_dist
    assert relative_error(cache.latents, nhwc(encoded.mean) * vae.config.scaling_factor) <= 1e-5
    assert relative_error(cache.deviation, nhwc(encoded.std) * vae.config.scaling_factor) <= 1e-5


def test_a_tuned_folder_opens_in_pytorch(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = sdipc.load(folders["epsilon"])
    state = tuning.init(bundle, tuning.TuningSettings(mode="ct", prompt_length=LENGTH))
    state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    sdipc.save(tuning.apply(bundle, tuning.delta(state)), tmp_path / "tuned")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "tuned/unet").state_dict()
    for name, value in by_name({"unet": state.params["unet"]}).items():
        np.testing.assert_array_equal(unet[name.removeprefix("unet.")].numpy(), value)
    _, report = CLIPModel.from_pretrained(tmp_path / "tuned/clip", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
